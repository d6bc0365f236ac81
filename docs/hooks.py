"""Hooks of the documentation build."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code)")


def on_page_content(html: str, **_: Any) -> str:
    """Drop Sphinx roles in front of code: docstrings use them, Markdown does not know them."""
    return ROLE.sub("", html)
