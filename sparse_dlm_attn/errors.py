"""Typed errors: each names the argument, the rule, the value got and the next step.

Every error of this project derives from :class:`SparseAttentionError` and from the built-in
exception a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "CallOrderError",
    "DataFileError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "SparseAttentionError",
    "StaleMemoryError",
    "UnavailableError",
    "UnknownNameError",
    "UnsupportedError",
]


class SparseAttentionError(Exception):
    """Base of all errors raised by this project; worker processes can hand them on (they pickle)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[SparseAttentionError], args: tuple[Any, ...], facts: dict[str, Any]) -> Any:
    """Return an error with this message: constructors want what it was made of."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class InvalidArgumentError(SparseAttentionError, ValueError):
    """An argument breaks a rule of the specification.

    Parameters
    ----------
    argument : str
        Name of the argument as the caller wrote it.
    rule : str
        What must hold, as a full predicate ("must be at least 1 token").
    got : object
        The value, shape or dtype that was given.
    hint : str, optional
        The next step for the caller.
    """

    def __init__(self, argument: str, rule: str, got: object, hint: str = "") -> None:
        self.argument = argument
        self.rule = rule
        self.got = got
        self.hint = hint
        super().__init__(f"{argument} {rule}; got {got}." + (f" {hint}" if hint else ""))

    def said_of(self, argument: str, hint: str = "") -> InvalidArgumentError:
        """Return the same error about an argument by another name.

        Parameters
        ----------
        argument : str
            What the caller wrote in place of the argument.
        hint : str, optional
            The next step; default: that of this error.
        """
        kind = InvalidTypeError if isinstance(self, InvalidTypeError) else InvalidArgumentError
        return kind(argument, self.rule, self.got, hint or self.hint)


class InvalidTypeError(InvalidArgumentError, TypeError):
    """An argument has the wrong type or dtype."""


class UnknownNameError(SparseAttentionError, LookupError, ValueError):
    """A backend, policy, parameter or task name is not known.

    Parameters
    ----------
    kind : str
        What was looked up ("backend", "policy", "parameter of policy 'losa'").
    name : str
        The name that was asked for.
    known : iterable of str
        Every valid name.
    hint : str, optional
        The next step for the caller.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind = kind
        self.name = name
        self.known = sorted(known)
        lower = {each.lower(): each for each in self.known}
        nearest = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1)]
        message = f"unknown {kind} {name!r}"
        message += f"; did you mean {nearest[0]!r}?" if nearest else "."
        message += f" Known: {', '.join(self.known) or 'none'}."
        super().__init__(message + (f" {hint}" if hint else ""))

    def __str__(self) -> str:  # LookupError would quote its argument
        return str(self.args[0])


class UnavailableError(SparseAttentionError, ImportError):
    """A registered backend or policy exists but cannot be loaded here.

    Parameters
    ----------
    what : str
        What was asked for ("backend 'triton'").
    reasons : sequence of str
        Why it cannot be loaded.
    remedy : str
        What to install or change.
    """

    def __init__(self, what: str, reasons: Sequence[str], remedy: str) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        self.remedy = remedy
        super().__init__(f"{what} cannot be loaded: {'; '.join(reasons)}. {remedy}")


class UnsupportedError(SparseAttentionError, NotImplementedError):
    """A legal problem that this backend declares it does not compute.

    Parameters
    ----------
    backend : str
        Name of the backend.
    reasons : sequence of str
        Every reason, as :meth:`sparse_dlm_attn.Backend.why_not` lists them.
    """

    def __init__(self, backend: str, reasons: Sequence[str]) -> None:
        self.backend = backend
        self.reasons = tuple(reasons)
        super().__init__(
            f"backend {backend!r} does not support this problem: {'; '.join(reasons)}. "
            "Choose another backend (`sparse-dlm-attn backends` lists them) or change the problem."
        )


class StaleMemoryError(SparseAttentionError, RuntimeError):
    """Memory of an earlier pass was used where it is no longer valid (rule MEMORY-2)."""


class CallOrderError(SparseAttentionError, RuntimeError):
    """A call comes at a moment at which it is not allowed.

    Parameters
    ----------
    call : str
        What was called.
    rule : str
        What must hold, as a full predicate ("must be called within a block").
    got : str
        The state that was found.
    hint : str
        The next step for the caller.
    """

    def __init__(self, call: str, rule: str, got: str, hint: str) -> None:
        self.call = call
        self.rule = rule
        self.got = got
        self.hint = hint
        super().__init__(f"{call} {rule}; found {got}. {hint}")


class DataFileError(SparseAttentionError, OSError):
    """A file that we read or write is missing, unreadable, corrupt or cannot be written."""
