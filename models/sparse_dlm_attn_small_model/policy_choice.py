"""Which policies a command compares, and what one common budget means for each of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_dlm_attn import (
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttentionPolicy,
    UnknownNameError,
    get_policy,
    list_policies,
)
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.registry import split_parameters

BASELINE = "dense"
"""What agreement and savings are measured against."""

DEFAULT_POLICIES = (BASELINE, "losa", "quest", "sliding-window", "streaming-llm", "flashblock", "mage", "sparsed")


@dataclass(frozen=True)
class PolicyChoice:
    """A policy, ready to run."""

    label: str  # "name:key=value,...", which get_policy understands
    policy: PrefixAttentionPolicy[Any]
    budget: int | None  # the common budget that was given to it, in tokens; None if it has none or its own
    specification: str  # the label without the common budget: what was asked for

    def as_json(self) -> dict[str, Any]:
        """Return name, parameters and budget; a value that JSON cannot say as Python shows it."""
        values = {name: getattr(self.policy, name) for name in _fields_of(self.policy)}
        return {
            "name": split_parameters("policy", self.label)[0],
            "parameters": {
                name: value if isinstance(value, bool | int | float | str | None) else repr(value)
                for name, value in values.items()
            },
            "budget": self.budget,
        }


def choose_policies(
    texts: Sequence[str], budgets: Sequence[int], page_size: int, *, baseline: bool = True
) -> list[PolicyChoice]:
    """Return the policies to compare, each once, with every budget that they do not set themselves.

    ``texts`` are as the user wrote them, empty for `DEFAULT_POLICIES`; ``baseline`` puts `dense` first.
    """
    names = list(texts) or list(DEFAULT_POLICIES)
    if baseline:
        names.insert(0, BASELINE)
    chosen: dict[str, PolicyChoice] = {}
    for budget, text in itertools.product(budgets, names):
        choice = choose_policy(text, budget, page_size)
        chosen.setdefault(choice.label, choice)
    return list(chosen.values())


def choose_policy(text: str, budget: int, page_size: int) -> PolicyChoice:
    """Return one policy with the common budget, unless ``text`` sets its own.

    Policies that choose by content have a parameter ``budget`` (``snapkv``: ``capacity``). A window gets the
    budget less what the attention sinks take: they are rounded up to whole pages, as the policies do.
    """
    check_count("--budget", budget, 1)
    name, colon, rest = text.partition(":")
    if not text.strip() or (colon and "=" not in rest and name in list_policies()):
        raise InvalidArgumentError("--policy", "must be written name:key=value,key=value", repr(text))
    policy = get_policy(text)
    written = split_parameters("policy", text)[1]
    fields = _fields_of(policy)
    parameter = next((each for each in ("budget", "capacity", "window") if each in fields), None)
    if parameter is None or parameter in written:
        return PolicyChoice(text, policy, None, text)
    given = budget
    if parameter == "window":
        given = max(budget - -(-int(getattr(policy, "sinks", 0)) // page_size) * page_size, 1)
    try:
        policy = get_policy(text, **{parameter: given})
    except (UnknownNameError, InvalidTypeError):  # an instance, or what a factory without it makes
        return PolicyChoice(text, policy, None, text)
    return PolicyChoice(f"{text}{',' if written else ':'}{parameter}={given}", policy, budget, text)


def _fields_of(policy: Any) -> list[str]:
    """Return the names of a policy's parameters; a foreign policy need not be a dataclass."""
    return [field.name for field in dataclasses.fields(policy)] if dataclasses.is_dataclass(policy) else []
