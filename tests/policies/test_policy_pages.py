"""The pages of the documentation say what the code says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sparse_dlm_attn import get_policy, list_policies

PAGES = Path(__file__).parents[2] / "docs" / "policies"
OURS = sorted(n for n, p in list_policies().items() if p.target.startswith("sparse_dlm_attn.policies."))


def written(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", OURS)
def test_a_page_lists_exactly_the_parameters_defaults_and_meanings_of_the_code(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    section = page.partition("## Parameters\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", section, flags=re.MULTILINE)
    expected = [(f.name, written(f.default), f.metadata["help"])
                for f in fields(get_policy(name))]  # type: ignore[arg-type]
    assert listed == expected
    assert page.startswith(f"# {name}\n")


def test_the_index_leads_to_every_page() -> None:
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w-]+)\]\(\1\.md\)", index, flags=re.MULTILINE)) == OURS


@pytest.mark.parametrize("name", OURS)
def test_parameters_written_in_a_page_are_accepted(name: str) -> None:
    """Every `key=value` and `policy:key=value` that a page mentions builds a policy."""
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for owner, assignment in re.findall(r"`(?:([\w-]+):)?(\w+=[\w.]+(?:,\w+=[\w.]+)*)`", page):
        if assignment != "active=N":
            get_policy(f"{owner or name}:{assignment}")
