"""Files: bounded reads, atomic writes, errors that name the file and the remedy."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparse_dlm_attn import InvalidArgumentError, files
from sparse_dlm_attn.errors import DataFileError


def test_a_text_is_read_as_it_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("Queequeg, caf\u00e9 harpooneer\r\n".encode())
    assert files.read_text(str(path), 100) == path.read_bytes()


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"whale")
    assert files.read_text(str(tmp_path / "text"), 5) == b"whale"
    for path, limit in ((str(tmp_path / "text"), 4), ("/dev/zero", 1000)):
        with pytest.raises(InvalidArgumentError, match=f"at most {limit} bytes"):
            files.read_text(path, limit)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (None, DataFileError, "No such file"),
        (b"", InvalidArgumentError, "at least 1 byte"),
        (b"whale \xff", DataFileError, r"not UTF-8 text \(byte 0xff at offset 6\)"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes | None, error: type[Exception], match: str) -> None:
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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_gets_the_permissions_that_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "out", b"new", "--out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.parametrize("target", ["real", "not there yet"])
def test_a_symbolic_link_is_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "link to link").symlink_to("link")
    files.check_target(tmp_path / "link to link", "--out")
    files.write_atomically(tmp_path / "link to link", b"new", "--out")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link to link").is_symlink()
    assert (tmp_path / target).read_bytes() == b"new"


def test_a_link_to_a_device_or_a_pipe_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "nothing").symlink_to(os.devnull)
    files.write_atomically(tmp_path / "nothing", b"new", "--out")
    assert (tmp_path / "nothing").is_symlink() and Path(os.devnull).is_char_device()
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    files.check_target(tmp_path / "pipe", "--out")
    files.write_atomically(tmp_path / "pipe", b"new", "--out")
    reader.join()
    assert read == [b"new"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("into", ["file", "pipe"])
def test_what_goes_to_standard_output_joins_what_is_printed(tmp_path: Path, into: str) -> None:
    code = (
        "from pathlib import Path\nfrom sparse_dlm_attn.files import check_target, write_atomically\n"
        "print('before')\ncheck_target(Path('/dev/stdout'), '--out')\n"
        "write_atomically(Path('/dev/stdout'), b'data\\n', '--out')\nprint('after')\n"
    )
    command = [sys.executable, "-c", code]
    if into == "pipe":
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    else:
        with (tmp_path / "log").open("wb") as log:
            subprocess.run(command, stdout=log, check=True)
        found = (tmp_path / "log").read_bytes()
    assert found == b"before\ndata\nafter\n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(DataFileError, match="symbolic links"):
        files.check_target(tmp_path / "circle", "--out")
    with pytest.raises(DataFileError, match="too long"):
        files.check_target(tmp_path / ("x" * 300), "--out")
    files.check_target(tmp_path / "out", "--out")
    files.check_target(tmp_path / ("x" * 255), "--out")
    files.write_atomically(tmp_path / ("x" * 255), b"new", "--out")  # as long as the system allows
    assert sorted(os.listdir(tmp_path)) == ["circle", "x" * 255]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "Is a directory"),
        ("missing/out", "No such file"),
        ("circle", "symbolic links"),
        ("x" * 300, "too long"),
        ("file/out", "Not a directory"),
    ],
)
def test_every_failure_to_write_is_one_typed_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataFileError, match=f"^--out: cannot write .*{reason}"):
        files.write_atomically(tmp_path / name, b"new", "--out")
    assert sorted(os.listdir(tmp_path)) == before
