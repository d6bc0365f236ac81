"""``python -m sparse_dlm_attn`` is ``sparse-dlm-attn``."""

from __future__ import annotations

import sys

from sparse_dlm_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
