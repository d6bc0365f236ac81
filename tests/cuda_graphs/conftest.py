"""Makes what lies beside the tests importable, and the blocks of the policies' tests."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "policies")]
