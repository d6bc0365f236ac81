"""A profile of few problems; a folder with broken backends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from sparse_dlm_attn_conformance.run import register_profiles

register_profiles()
settings.register_profile("sda-few", settings.get_profile("sda-quick"), max_examples=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module `broken`, two that do not load, and settings that must not matter."""
    shutil.copy(Path(__file__).parent / "misbehaving.py", tmp_path / "broken.py")
    (tmp_path / "raises.py").write_text("raise OSError('no driver')", encoding="utf-8")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n", encoding="utf-8")
    return tmp_path
