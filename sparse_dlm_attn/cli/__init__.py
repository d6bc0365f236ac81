"""The command line: ``sparse-dlm-attn`` and ``python -m sparse_dlm_attn``.

The commands of the core are `backends`, `policies` and `doctor`. Other distributions contribute
commands by entry points (group ``sparse_dlm_attn.commands``), so that the core never imports them::

    [project.entry-points."sparse_dlm_attn.commands"]
    decode = "my_package.commands:decode"

A command is a function with typer annotations, or a `typer.Typer`. It prints results on standard
output and everything else on standard error, and raises the typed errors of `sparse_dlm_attn.errors`;
what becomes of them is decided here, once. Exit codes: 0 done, 1 ran but the answer is negative,
2 bad input or something that is not available, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit code.
    """
    from sparse_dlm_attn.cli.application import run

    return run(arguments)
