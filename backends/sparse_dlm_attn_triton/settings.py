"""Launch settings: measured defaults, and those that `sparse-dlm-attn tune` found for one's own GPU.

Tuning is off unless it is asked for, by ``get_backend("triton", tuned=True)`` or SDA_TRITON_TUNED=1. It then
holds for the whole process: what PyTorch compiles or captures knows operators, not backends. A shape that
nothing was tuned for is refused, and takes the settings of the nearest batch and context length otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparse_dlm_attn.errors import DataFileError, InvalidArgumentError, UnavailableError
from sparse_dlm_attn.files import check_target, write_atomically
from sparse_dlm_attn.values import check_int

__all__ = [
    "Entry",
    "Kind",
    "Machine",
    "Settings",
    "cache_file",
    "chosen",
    "epoch",
    "forced",
    "load",
    "make_room",
    "store",
    "use_tuned",
    "watched",
]

FORMAT = 1
WHAT = "tuned settings of backend 'triton'"


@dataclass(frozen=True)
class Settings:
    """Tile and grid of the attention kernel of a pass; measured defaults are in docs/backends/triton.md.

    Parameters
    ----------
    block_n : int
        Context tokens of a tile: a power of two, 16 to 256.
    warps : int
        Warps of a program: a power of two up to 16.
    stages : int
        Tiles fetched ahead and in use, 1 to 8.
    programs : int
        Programs to aim for; 264 are two for each multiprocessor of an H100 or H200.
    least_m : int
        Fewest rows of a tile: a power of two, 16 to 128; 64 fill the wider tensor-core instruction of Hopper.

    Raises
    ------
    InvalidArgumentError, InvalidTypeError
        If a value breaks its rule.
    """

    block_n: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 264
    least_m: int = 16

    def __post_init__(self) -> None:
        ranges = {
            "block_n": (16, 256),
            "warps": (1, 16),
            "stages": (1, 8),
            "programs": (1, 65536),
            "least_m": (16, 128),
        }
        for name, (least, most) in ranges.items():
            value = check_int(name, getattr(self, name))
            if not least <= value <= most:
                raise InvalidArgumentError(name, f"must lie in {least}..{most}", value)
            if name not in ("stages", "programs") and value & (value - 1):
                raise InvalidArgumentError(name, "must be a power of two", value)

    def as_dict(self) -> dict[str, int]:
        """Return the values by name."""
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """What a launch is about: settings are kept for it.

    ``group`` is query heads a KV head, ``tokens`` the rows of the block, ``heads`` sequences x KV heads, ``context``
    the tokens that the pages of a sequence can hold. The nearest heads and context are taken; the rest is exact.
    """

    dtype: str
    head_dim: int
    page_size: int
    group: int
    tokens: int
    heads: int
    context: int

    @property
    def exact(self) -> tuple[Any, ...]:
        """What has to be equal."""
        return self.dtype, self.head_dim, self.page_size, self.group, self.tokens

    def distance(self, other: Kind) -> float:
        """Return how far sizes are apart: octaves of heads and context, together."""
        pairs = (self.heads, other.heads), (self.context, other.context)
        return sum(abs(math.log2(max(ours, 1) / max(theirs, 1))) for ours, theirs in pairs)

    @property
    def command(self) -> str:
        """What tunes for it, with as many KV heads as ``heads`` says and one sequence."""
        return (
            f"sparse-dlm-attn tune --dtype {self.dtype} --head-dim {self.head_dim} --page-size "
            f"{self.page_size} --tokens {self.tokens} --kv-heads {self.heads} --q-heads "
            f"{self.heads * self.group} --contexts {self.context}"
        )


@dataclass(frozen=True)
class Machine:
    """What settings were measured on: GPU, Triton, and a digest of the kernels' sources."""

    gpu: str
    triton: str
    kernels: str

    @classmethod
    def here(cls, device: Any = None) -> Machine:
        """Return this machine with a GPU, the current one by default."""
        import torch

        return cls(torch.cuda.get_device_name(device), _version("triton"), _digest())


@dataclass(frozen=True)
class Entry:
    """The fastest settings of a machine and kind, with microseconds of a whole pass by default and with these."""

    machine: Machine
    kind: Kind
    settings: Settings
    default_us: float
    tuned_us: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON can say it."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Entry:
        """Return what `as_dict` made a record of."""
        return cls(
            Machine(**record["machine"]),
            Kind(**record["kind"]),
            Settings(**record["settings"]),
            float(record["default_us"]),
            float(record["tuned_us"]),
        )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _digest() -> str:
    """Return a digest of the package: other kernels, other settings."""
    sources = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def cache_file() -> Path:
    """Return where settings are kept: SDA_TRITON_SETTINGS, else a file in the user's cache directory."""
    named = os.environ.get("SDA_TRITON_SETTINGS")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return folder / "sparse_dlm_attn" / "triton.json"


def load(path: Path) -> list[Entry]:
    """Return all settings that are kept, of any machine; none if there is no file.

    Raises
    ------
    DataFileError
        If the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"settings file {str(path)!r} cannot be read: {error}.") from error
    try:
        kept = json.loads(text)
        if kept["format"] != FORMAT:
            raise ValueError(f"format {kept['format']} is not {FORMAT}")
        return [Entry.of(record) for record in kept["entries"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataFileError(
            f"settings file {str(path)!r} does not hold settings: {error}. Delete it and run "
            "`sparse-dlm-attn tune` again."
        ) from error


def make_room(path: Path) -> None:
    """Raise now if settings could not be stored later; makes the folder of the default file."""
    if path == cache_file():
        path.parent.mkdir(parents=True, exist_ok=True)
    check_target(path, "--file")
    load(path)


def store(path: Path, entries: Sequence[Entry]) -> None:
    """Keep entries, each instead of the one for its machine and kind."""
    kept = {(entry.machine, entry.kind): entry for entry in (*load(path), *entries)}
    text = json.dumps({"format": FORMAT, "entries": [entry.as_dict() for entry in kept.values()]}, indent=1)
    write_atomically(path, f"{text}\n".encode(), "--file")


_epoch = [0]  # changes of what follows, so that plans made before are not used after
_tuned: dict[Machine, tuple[Entry, ...]] = {}  # what this process was told to use
_forced: list[Settings] = []  # what a tuner tries
_watching: list[list[Settings]] = []  # where a tuner looks for the defaults


def use_tuned(device: Any = None) -> tuple[Entry, ...]:
    """Use in this process what was tuned for a GPU, the current one by default; return it.

    Raises
    ------
    UnavailableError
        If there is nothing for it with this Triton and these kernels.
    DataFileError
        If the file cannot be read.
    """
    machine, path = Machine.here(device), cache_file()
    entries = load(path)
    found = tuple(entry for entry in entries if entry.machine == machine)
    if not found:
        others = {entry.machine for entry in entries}
        known = "; ".join(f"{one.gpu} with Triton {one.triton}" for one in others) or "nothing"
        raise UnavailableError(
            WHAT,
            [f"{path} holds none for {machine.gpu} with Triton {machine.triton} and these kernels, but {known}"],
            "Run: sparse-dlm-attn tune (its options name your shape), or leave tuned out.",
        )
    _tuned[machine] = found
    _epoch[0] += 1
    nearest.cache_clear()
    return found


@contextmanager
def forced(settings: Settings) -> Iterator[None]:
    """Launch with these settings within the body; for tuners, on one thread."""
    _forced.append(settings)
    _epoch[0] += 1
    try:
        yield
    finally:
        _forced.pop()
        _epoch[0] += 1


@contextmanager
def watched() -> Iterator[list[Settings]]:
    """Yield a list that gets the defaults of the launches within the body; for tuners."""
    _watching.append([])
    _epoch[0] += 1
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def epoch() -> int:
    """Return a number that changes whenever settings may have changed."""
    return _epoch[0]


def chosen(default: Settings, device: Any, dtype: Any, *sizes: int) -> Settings:
    """Return the settings of a launch: ``default``, unless tuned ones were asked for.

    Parameters
    ----------
    default : Settings
        What was measured for shapes of its sort.
    device, dtype
        Of q, K and V.
    *sizes
        The other fields of `Kind`, in order.

    Raises
    ------
    UnavailableError
        If tuned settings were asked for and there are none for these sizes.
    """
    if _watching:
        _watching[-1].append(default)
    if _forced:
        return _forced[-1]
    if not _tuned:
        return default
    return nearest(device, Kind(str(dtype).removeprefix("torch."), *sizes))


@functools.lru_cache(maxsize=256)
def nearest(device: Any, kind: Kind) -> Settings:
    """Return the tuned settings of the nearest kind whose exact part is the same."""
    entries = _tuned.get(Machine.here(device), ())
    fitting = [entry for entry in entries if entry.kind.exact == kind.exact]
    if not fitting:
        names = [field.name for field in fields(Kind)][: len(kind.exact)]
        wanted = ", ".join(f"{name}={value}" for name, value in zip(names, kind.exact, strict=True))
        raise UnavailableError(WHAT, [f"none for {wanted}"], f"Run: {kind.command}")
    return min(fitting, key=lambda entry: entry.kind.distance(kind)).settings
