"""Files: bounded reads, atomic writes, errors that name the file and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparse_dlm_attn import DataFileError, InvalidArgumentError
from sparse_dlm_attn.cli import files


def test_a_text_is_read_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("Queequeg, caf\u00e9 harpooneer\r\n".encode())
    assert files.read_text(str(path), 100) == path.read_bytes()


def test_no_more_than_the_limit_is_read_from_an_endless_file() -> None:
    with pytest.raises(InvalidArgumentError, match="at most 1000 bytes"):
        files.read_text("/dev/zero", 1000)


def test_a_text_of_exactly_the_limit_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"whale")
    assert files.read_text(str(path), 5) == b"whale"
    with pytest.raises(InvalidArgumentError):
        files.read_text(str(path), 4)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (None, DataFileError, "No such file"),
        (b"", InvalidArgumentError, "at least 1 byte"),
        (b"whale \xff", DataFileError, r"not UTF-8 text \(byte 0xff at offset 6\)"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, content: bytes | None, error: type[Exception], match: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=match):
        files.read_text(str(path), 100)
    with pytest.raises(DataFileError, match="directory"):
        files.read_text(str(tmp_path), 100)


def test_writing_replaces_the_whole_file_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old and longer")
    path.chmod(0o640)
    files.write_atomically(path, b"new", "--out")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["out"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    files.write_atomically(tmp_path / "link", b"new", "--out")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataFileError, match="No space left on device"):
        files.write_atomically(path, b"new", "--out")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_device_is_written_in_place_and_never_replaced() -> None:
    with pytest.raises(DataFileError, match="No space left"):
        files.write_atomically(Path("/dev/full"), b"new", "--out")
    assert Path("/dev/full").is_char_device()


def test_a_target_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="does not exist"):
        files.check_target(tmp_path / "missing" / "out", "--out")
    with pytest.raises(DataFileError, match="is a directory"):
        files.check_target(tmp_path, "--out")
    files.check_target(tmp_path / "out", "--out")
