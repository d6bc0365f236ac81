"""Errors about arguments, said of the options that users gave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sparse_dlm_attn.errors import InvalidArgumentError

__all__ = ["named_as_options"]


@contextmanager
def named_as_options(**names: str) -> Iterator[None]:
    """Say of an option what the body, which does nothing but check, says of the argument behind it.

    Parameters
    ----------
    **names : str
        Option of each argument that is not called ``--like-the-argument``.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        What the body raised, with the option's name. Where the rule refers to another argument, as in
        "must be a multiple of page_size=16", the next step names that one too.
    """

    def option(argument: str) -> str:
        return names.get(argument, f"--{argument.replace('_', '-')}")

    try:
        yield
    except InvalidArgumentError as error:
        if not error.argument.isidentifier():  # it says more than a name already
            raise
        others = " or ".join(map(option, re.findall(r"\b([a-z_]+)=", error.rule)))
        hint = f"Change it or {others}." if others and not error.hint else ""
        raise error.said_of(option(error.argument), hint) from error
