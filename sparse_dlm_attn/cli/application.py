"""The application: core commands, commands of plug-ins, and what becomes of errors."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparse_dlm_attn.cli.console import discard_rest, show_error
from sparse_dlm_attn.errors import InvalidTypeError, SparseAttentionError, UnknownNameError
from sparse_dlm_attn.registry import Plugin, commands

__all__ = ["BAD_INPUT", "INTERRUPTED", "NEGATIVE", "application", "load_command", "run"]

NEGATIVE, BAD_INPUT, INTERRUPTED = 1, 2, 130
PROGRAM = "sparse-dlm-attn"


class CommandGroup(TyperGroup):
    """Commands of the core first, then those of plug-ins, each imported only when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands; imports no plug-in."""
        own = list(super().list_commands(ctx))
        return own + [name for name in commands() if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name; a broken plug-in becomes a command that says why."""
        own = super().get_command(ctx, cmd_name)
        plugin = commands().get(cmd_name)
        if own is not None or plugin is None:
            return own
        try:
            return load_command(plugin)
        except SparseAttentionError as error:
            return _broken(cmd_name, error)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command with the nearest name, plug-ins included."""
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            raise UnknownNameError("command", args[0], known)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn every failure into one message and an exit code."""
        try:
            result = super().invoke(ctx)
            _flush_results()
            return result
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _is_usage_error(error):
                raise
            if ctx.params.get("show_traceback") or os.environ.get("SDA_TRACEBACK"):
                traceback.print_exc()
            raise typer.Exit(_report(error)) from error


def load_command(plugin: Plugin) -> Any:
    """Import the command of a plug-in.

    Parameters
    ----------
    plugin : Plugin
        An entry of ``sparse_dlm_attn.commands``.

    Returns
    -------
    object
        A command that typer can run.

    Raises
    ------
    SparseAttentionError
        If it cannot be imported or is not a command.
    """
    target = plugin.load()
    if not isinstance(target, typer.Typer):
        if not callable(target):
            raise InvalidTypeError(f"command {plugin.name!r}", "must be a function or a typer.Typer", repr(target))
        function, target = target, typer.Typer(add_completion=False)
        target.command(plugin.name)(function)
    try:
        command = typer.main.get_command(target)
    except Exception as error:  # foreign signatures may be anything
        raise InvalidTypeError(
            f"command {plugin.name!r}",
            "must have a signature that typer understands",
            str(error),
            f"Repair or uninstall {plugin.distribution}.",
        ) from error
    command.name = plugin.name
    return command


def _broken(name: str, error: SparseAttentionError) -> Any:
    """Return a command that accepts any arguments and raises ``error``."""
    holder = typer.Typer(add_completion=False)

    @holder.command(
        name,
        help=f"(not available) {error}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def report() -> None:
        raise error

    return typer.main.get_command(holder)


def _is_usage_error(error: BaseException) -> bool:
    """Whether typer shows this itself (wrong options); its base class moved between versions."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _report(error: BaseException) -> int:
    """Print one message and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        show_error("interrupted; nothing was written.")
        return INTERRUPTED
    if BrokenPipeError in (type(error), type(error.__cause__)):  # whoever read our output has seen enough
        discard_rest(sys.stdout)
        return 0
    if isinstance(error, SparseAttentionError):
        show_error(str(error))
    elif isinstance(error, MemoryError):
        show_error("not enough memory. Shorten the prompt or use fewer workers.")
    elif isinstance(error, OSError):
        discard_rest(sys.stdout)
        show_error(f"cannot read or write: {error}.")
    else:
        show_error(
            f"unexpected {type(error).__name__}: {error}. This is a defect: please report it with the "
            "traceback that SDA_TRACEBACK=1 prints."
        )
    return BAD_INPUT


def _flush_results() -> None:
    """Let a full disk behind standard output fail here, where it can still be reported."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparse_dlm_attn import SPEC_VERSION, __version__

        print(f"sparse-dlm-attn {__version__} (specification {SPEC_VERSION})")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose (or set SDA_TRACEBACK=1).")
    ] = False,
) -> None:
    """Sparse attention for diffusion language models: policies and backends to choose from."""


def application() -> typer.Typer:
    """Return the application with the commands of the core."""
    from sparse_dlm_attn.cli import doctor, listings

    app = typer.Typer(
        cls=CommandGroup,
        no_args_is_help=True,
        callback=_options,
        context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit them
    )
    app.command("backends")(listings.backends)
    app.command("policies")(listings.policies)
    app.command("doctor")(doctor.doctor)
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: ``sys.argv[1:]``.
    """
    if sys.stdout is None:
        show_error("standard output is closed. Redirect it to a file or to /dev/null.")
        return BAD_INPUT
    command = typer.main.get_command(application())
    code = 0
    try:
        with _working_directory_on_path():
            code = _run(command, None if arguments is None else list(arguments))
        _flush_results()
    except OSError as error:  # --version and --help print before any command is invoked
        reported = _report(error)
        return code or reported
    return code


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Let ``module:attr`` name a module of the current directory, as under ``python -m``."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted meanwhile
        here = ""
    if not here or sys.flags.safe_path or sys.path[:1] in ([here], [""]):
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # foreign code may have taken it away
            sys.path.remove(here)


def _run(command: Any, arguments: list[str] | None) -> int:
    try:
        command(args=arguments, prog_name=PROGRAM)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else BAD_INPUT
    return 0
