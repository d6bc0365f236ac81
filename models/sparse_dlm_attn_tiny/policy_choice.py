"""Which policies a command compares, and what one common budget means for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_dlm_attn import (
    InvalidArgumentError,
    InvalidTypeError,
    PrefixAttentionPolicy,
    UnknownNameError,
    get_policy,
    policies,
)
from sparse_dlm_attn.policy import check_count
from sparse_dlm_attn.registry import split_parameters

__all__ = ["BASELINE", "DEFAULT_POLICIES", "PolicyChoice", "choose_policies", "choose_policy"]

BASELINE = "dense"
"""What agreement and savings are measured against."""

DEFAULT_POLICIES = (
    BASELINE, "losa", "quest", "sliding-window", "streaming-llm", "flashblock", "mage", "sparsed",
)


@dataclass(frozen=True)
class PolicyChoice:
    """A policy, ready to run.

    Parameters
    ----------
    label : str
        ``"name:key=value,..."`` with every parameter that differs from its default; `get_policy`
        understands it.
    policy : PrefixAttentionPolicy
        The policy itself.
    budget : int or None
        The common budget that was given to it, in tokens; None if it has no budget or its own.
    specification : str
        The label without the common budget: what was asked for.
    """

    label: str
    policy: PrefixAttentionPolicy[Any]
    budget: int | None
    specification: str

    @property
    def name(self) -> str:
        """What stands before the parameters."""
        return split_parameters("policy", self.label)[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter with its value, or how Python shows a value that JSON cannot say."""
        values = {name: getattr(self.policy, name) for name in _fields_of(self.policy)}
        return {
            name: value if isinstance(value, bool | int | float | str | None) else repr(value)
            for name, value in values.items()
        }


def choose_policies(
    texts: Sequence[str], budget: int, page_size: int, *, baseline: bool = True
) -> list[PolicyChoice]:
    """Return the policies to compare, each once.

    Parameters
    ----------
    texts : sequence of str
        As the user wrote them; empty for `DEFAULT_POLICIES`.
    budget : int
        Context tokens that a row may read, for policies that have a budget and were not given one.
    page_size : int
        Tokens a page.
    baseline : bool
        Whether to put the dense policy first if it is not among them.

    Raises
    ------
    SparseAttentionError
        For an unknown policy or parameter, or a value that breaks its rule.
    """
    names = list(texts) or list(DEFAULT_POLICIES)
    if baseline and BASELINE not in names:
        names.insert(0, BASELINE)
    choices = [choose_policy(text, budget, page_size) for text in names]
    return list({choice.label: choice for choice in choices}.values())


def choose_policy(text: str, budget: int, page_size: int) -> PolicyChoice:
    """Return one policy with the common budget, unless ``text`` sets its own.

    Parameters
    ----------
    text : str
        A registered name, ``"name:key=value,..."`` or ``"module:attr"``.
    budget : int
        Context tokens that a row may read.
    page_size : int
        Tokens a page.

    Notes
    -----
    Policies that choose by content have a parameter ``budget`` (``snapkv``: ``capacity``). A window gets the
    budget less what the attention sinks take: they are rounded up to whole pages, as the policies do.
    """
    check_count("--budget", budget, 1)
    name, colon, rest = text.partition(":")
    if not text.strip() or (colon and "=" not in rest and name in policies()):
        raise InvalidArgumentError("--policy", "must be written name:key=value,key=value", repr(text))
    policy = get_policy(text)
    parameter, given = _budget_parameter(policy, budget, page_size)
    written = split_parameters("policy", text)[1]
    if parameter is None or parameter in written:
        return PolicyChoice(text, policy, None, text)
    try:
        policy = get_policy(text, **{parameter: given})
    except (UnknownNameError, InvalidTypeError):  # an instance, or what a factory without it makes
        return PolicyChoice(text, policy, None, text)
    return PolicyChoice(f"{text}{',' if written else ':'}{parameter}={given}", policy, budget, text)


def _budget_parameter(
    policy: PrefixAttentionPolicy[Any], budget: int, page_size: int
) -> tuple[str | None, int]:
    fields = _fields_of(policy)
    for name in ("budget", "capacity"):
        if name in fields:
            return name, budget
    if "window" in fields:
        sinks = -(-int(getattr(policy, "sinks", 0)) // page_size) * page_size
        return "window", max(budget - sinks, 1)
    return None, 0


def _fields_of(policy: Any) -> list[str]:
    """Return the names of a policy's parameters; a foreign policy need not be a dataclass."""
    return [field.name for field in dataclasses.fields(policy)] if dataclasses.is_dataclass(policy) else []
