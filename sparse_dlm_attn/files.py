"""Files that users name: bounded reads, atomic writes, typed errors."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

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
            argument,
            f"must be at most {limit} bytes, so that it fits the model's context",
            f"{name}, which is longer",
            "Shorten the text.",
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
        with open(source, "rb") as stream:  # not by way of Path, which takes "" for the current folder
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
    try:
        special, target = _is_special(path), _resolved(path)
        if target.is_dir():
            raise DataFileError(f"{argument}: {str(path)!r} is a directory. Name a file in it.")
        if not special and not target.parent.is_dir():
            raise DataFileError(f"{argument}: the directory of {str(path)!r} does not exist. Create it first.")
    except DataFileError:
        raise
    except OSError as error:  # a name that is too long, links that go in a circle
        raise _not_written(path, argument, error) from error
    if not os.access(path if special else target.parent, os.W_OK):
        raise DataFileError(f"{argument}: no permission to write {str(path)!r}.")


def write_atomically(path: Path, data: bytes, argument: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, then a rename.

    A target that exists and is no regular file (a device, a pipe) is written in place, since a rename would
    replace it. So is a file that standard output or standard error goes to, from where they stand.

    Parameters
    ----------
    path : pathlib.Path
        File to write; symbolic links are followed. A new file gets the permissions that the umask allows,
        one that exists keeps its own.
    data : bytes
        Its new content.
    argument : str
        Name of the option, for messages.

    Raises
    ------
    DataFileError
        If it cannot be written (disk full, no permission, no such directory). The file is as it was then.
    """
    try:
        stream = _stream_to(path)
        if stream is not None:
            stream.flush()
            stream.buffer.write(data)
            stream.flush()
        elif _is_special(path):
            with path.open("wb") as device:
                device.write(data)
        else:
            _replace(_resolved(path), data)
    except OSError as error:
        raise _not_written(path, argument, error) from error


def _not_written(path: Path, argument: str, error: OSError) -> DataFileError:
    return DataFileError(f"{argument}: cannot write {str(path)!r}: {error.strerror or error}.")


def _is_special(path: Path) -> bool:
    """Whether there is something behind all links that is neither a regular file nor a directory."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _resolved(path: Path) -> Path:
    """Return what a path leads to, through all symbolic links."""
    try:
        return path.resolve()
    except RuntimeError as error:  # before Python 3.13, for links that go in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error


def _stream_to(path: Path) -> TextIO | None:
    """Return the standard stream that goes to the file ``path``, such as /dev/stdout, or None."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if os.path.samefile(path, stream.fileno()):
                return stream
        except (OSError, ValueError, AttributeError):  # no such file; the stream is closed or no file
            continue
    return None


def _replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
