"""The pages of the documentation say what the code says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sparse_dlm_attn import get_policy, list_policies

PAGES = Path(__file__).parents[2] / "docs" / "policies"
OURS = sorted(n for n, p in list_policies().items() if p.target.startswith("sparse_dlm_attn.policies."))


@pytest.mark.parametrize("name", OURS)
def test_a_page_lists_every_parameter_and_mentions_none_that_does_not_exist(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    section = page.partition("## Parameters\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", section, flags=re.MULTILINE)
    expected = [
        (field.name, str(field.default).lower(), field.metadata["help"])
        for field in fields(get_policy(name))  # type: ignore[arg-type]
    ]
    assert listed == expected
    for owner, assignment in re.findall(r"`(?:([\w-]+):)?(\w+=[\w.]+(?:,\w+=[\w.]+)*)`", page):
        if assignment != "active=N":
            get_policy(f"{owner or name}:{assignment}")
