"""Files that commands read and write: bounded reads, atomic writes, typed errors."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from sparse_dlm_attn.errors import DataFileError, InvalidArgumentError

__all__ = ["check_target", "read_text", "write_atomically"]


def read_text(source: str, limit: int, *, argument: str = "--prompt") -> bytes:
    """Read a UTF-8 text of at most ``limit`` bytes.

    Parameters
    ----------
    source : str
        A path, or ``"-"`` for standard input.
    limit : int
        Most bytes to accept; no more than one byte beyond it is ever read.
    argument : str
        Name of the option, for messages.

    Returns
    -------
    bytes
        The text as it is stored.

    Raises
    ------
    DataFileError
        If it cannot be read or is not UTF-8.
    InvalidArgumentError
        If it is empty or longer than ``limit``.
    """
    name = "standard input" if source == "-" else repr(source)
    try:
        data = _read(source, limit + 1)
    except OSError as error:
        raise DataFileError(f"{argument}: cannot read {name}: {error.strerror or error}.") from error
    if not data:
        raise InvalidArgumentError(argument, "must hold at least 1 byte", f"{name}, which is empty")
    if len(data) > limit:
        raise InvalidArgumentError(
            argument, f"must be at most {limit} bytes, so that it fits the model's context",
            f"{name}, which is longer", "Shorten the text.",
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"{argument}: {name} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}). Convert it, for example with `iconv -t UTF-8`."
        ) from error
    return data


def _read(source: str, limit: int) -> bytes:
    if source != "-":
        with Path(source).open("rb") as stream:
            return _read_all(stream, limit)
    if sys.stdin is None or sys.stdin.closed:
        raise OSError(None, "it is closed")
    return _read_all(sys.stdin.buffer, limit)


def _read_all(stream: BinaryIO, limit: int) -> bytes:
    """Read up to ``limit`` bytes; a pipe may deliver them in pieces."""
    pieces: list[bytes] = []
    while limit > 0 and (piece := stream.read(limit)):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)


def check_target(path: Path, argument: str) -> None:
    """Raise now if ``path`` cannot be written later, before any long work.

    Parameters
    ----------
    path : pathlib.Path
        File to be written.
    argument : str
        Name of the option, for messages.

    Raises
    ------
    DataFileError
        If its folder is missing or not writable, or if it is a folder itself.
    """
    target = path.resolve()
    if target.is_dir():
        raise DataFileError(f"{argument}: {str(path)!r} is a directory. Name a file in it.")
    if not target.parent.is_dir():
        raise DataFileError(
            f"{argument}: the directory of {str(path)!r} does not exist. Create it first."
        )
    if not os.access(target if _is_special(target) else target.parent, os.W_OK):
        raise DataFileError(f"{argument}: no permission to write {str(path)!r}.")


def write_atomically(path: Path, data: bytes, argument: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, then a rename.

    A target that exists and is no regular file (a pipe, a device) is written in place, since a
    rename would replace it.

    Parameters
    ----------
    path : pathlib.Path
        File to write; symbolic links are followed.
    data : bytes
        Its new content.
    argument : str
        Name of the option, for messages.

    Raises
    ------
    DataFileError
        If it cannot be written (disk full, no permission); nothing is left behind then.
    """
    target = path.resolve()
    try:
        if _is_special(target):
            with target.open("wb") as stream:
                stream.write(data)
        else:
            _replace(target, data)
    except OSError as error:
        raise DataFileError(
            f"{argument}: cannot write {str(path)!r}: {error.strerror or error}. Nothing was kept."
        ) from error


def _is_special(target: Path) -> bool:
    try:
        return not stat.S_ISREG(target.stat().st_mode)
    except OSError:
        return False


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _mode(target: Path) -> int:
    """Permissions of the file to be replaced, or what the umask gives a new one."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
