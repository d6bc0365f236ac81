"""The commands `break-even` and `tune`. Imports nothing heavy before there is something to measure."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_dlm_attn import Backend, InvalidArgumentError, UnavailableError, UnsupportedError
from sparse_dlm_attn import get_backend as find_backend
from sparse_dlm_attn.capabilities import Problem
from sparse_dlm_attn.cli.console import note, print_json, progress, result_console, table
from sparse_dlm_attn.cli.options import named_as_options
from sparse_dlm_attn.files import check_target, write_atomically
from sparse_dlm_attn_benchmarks.shape import Shape, with_budget

if TYPE_CHECKING:
    from sparse_dlm_attn_benchmarks.break_even import Point
    from sparse_dlm_attn_triton.settings import Entry

__all__ = ["break_even", "counts", "shares", "tune"]

MOST_REPEATS, MOST_FORMS = 10_000, 500

Batch = Annotated[int, typer.Option(help="Sequences.")]
QueryHeads = Annotated[int, typer.Option("--q-heads", help="Query heads.")]
KvHeads = Annotated[int, typer.Option("--kv-heads", help="Key and value heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", help="Channels of a head.")]
Tokens = Annotated[int, typer.Option(help="Rows of a block.")]
PageSize = Annotated[int, typer.Option("--page-size", help="Tokens a page.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Contexts = Annotated[str, typer.Option(help="Context lengths in tokens, K for 1024 of them.", metavar="N,N,...")]
Repeats = Annotated[int, typer.Option(help="Replays of each graph; times are medians.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write results as JSON.", metavar="FILE")]


def break_even(
    policy: Annotated[
        str,
        typer.Option(
            help="Policy that has a budget, without it: it follows from --densities.", metavar="NAME[:key=value,...]"
        ),
    ] = "losa",
    batch: Batch = 1,
    q_heads: QueryHeads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    tokens: Tokens = 16,
    page_size: PageSize = 64,
    dtype: Dtype = "bfloat16",
    contexts: Contexts = "8K,16K,32K,64K,128K",
    densities: Annotated[
        str, typer.Option(help="Shares of the context to read.", metavar="SHARE,SHARE,...")
    ] = "0.05,0.1,0.2,0.4",
    backend: Annotated[
        str, typer.Option(help="Backend of the sparse passes.", metavar="NAME[:key=value,...]")
    ] = "triton",
    repeats: Repeats = 20,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture (PNG).", metavar="FILE")] = None,
) -> None:
    """Measure from which context length and density on sparse beats dense, on your GPU and shape."""
    lengths, wanted = counts("--contexts", contexts), shares("--densities", densities)
    _check_targets(json_file, plot)
    _check_count("--repeats", repeats, MOST_REPEATS)
    shapes = _shapes(lengths, batch, tokens, q_heads, kv_heads, head_dim, page_size, dtype)
    with named_as_options():
        with_budget(policy, page_size)
    _need_gpu("break-even")
    from sparse_dlm_attn_benchmarks import break_even as work

    computing = find_backend(backend)
    _check_backend(computing, shapes[0])
    points: list[Point] = []
    with progress() as bars:
        task = bars.add_task("context lengths", total=len(shapes))
        for shape in shapes:
            points += work.measure_context(shape, policy, wanted, computing, repeats, note)
            bars.advance(task)
    sentence = work.answer(points, policy)
    if json_file is not None:
        kept = work.record(points, shapes[0], policy, sentence)
        write_atomically(json_file, (json.dumps(kept, indent=1) + "\n").encode(), "--json")
    _print_points(points, sentence)
    if plot is not None:
        _plot(points, policy, plot)


def tune(
    batch: Batch = 1,
    q_heads: QueryHeads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    tokens: Tokens = 16,
    page_size: PageSize = 64,
    dtype: Dtype = "bfloat16",
    contexts: Contexts = "64K",
    policy: Annotated[
        str,
        typer.Option(
            help="Policy whose passes are timed, reading about a tenth of the context.", metavar="NAME[:key=value,...]"
        ),
    ] = "losa",
    limit: Annotated[int, typer.Option(help="Most settings to try a context length; each compiles a kernel.")] = 40,
    repeats: Repeats = 20,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Where settings are kept.",
            metavar="FILE",
            show_default="SDA_TRITON_SETTINGS, else in the user's cache directory",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what is kept, as JSON, and stop.")] = False,
) -> None:
    """Tune the Triton backend's launches for your GPU and shape; use it by --backend triton:tuned=true."""
    if show:
        _need_torch("tune")
        from sparse_dlm_attn_triton import settings

        kept = settings.load(settings.cache_file() if file is None else file)
        print_json([entry.as_dict() for entry in kept])
        return
    lengths = counts("--contexts", contexts)
    _check_count("--limit", limit, MOST_FORMS)
    _check_count("--repeats", repeats, MOST_REPEATS)
    shapes = _shapes(lengths, batch, tokens, q_heads, kv_heads, head_dim, page_size, dtype)
    with named_as_options():
        with_budget(policy, page_size)
    _need_gpu("tune")
    from sparse_dlm_attn_benchmarks.tuning import tune_shape
    from sparse_dlm_attn_triton import settings

    target = settings.cache_file() if file is None else file
    computing = find_backend("triton")
    _check_backend(computing, shapes[0])
    settings.make_room(target)
    found: list[Entry] = []
    with progress() as bars:
        for shape in shapes:
            task = bars.add_task(str(shape), total=limit)
            found.append(tune_shape(shape, policy, computing, limit, repeats, partial(bars.advance, task)))
            settings.store(target, found[-1:])
    _print_entries(found, target)


def counts(option: str, text: str) -> list[int]:
    """Return numbers of tokens written ``16K,65536``, ascending."""
    found = []
    for part in text.split(","):
        number, factor = part.strip().upper(), 1
        if number.endswith("K"):
            number, factor = number[:-1], 1024
        if not number.isdecimal() or not 1 <= int(number) * factor < 2**31:
            raise InvalidArgumentError(option, "must be numbers of tokens as in 16K,32768", repr(text))
        found.append(int(number) * factor)
    return sorted(set(found))


def shares(option: str, text: str) -> list[float]:
    """Return shares written ``0.05,0.1``, ascending."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise InvalidArgumentError(option, "must be shares over 0 and at most 1, as in 0.05,0.1", repr(text))
    return found


def _check_count(option: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise InvalidArgumentError(option, f"must lie in 1..{most}", number)


def _check_targets(json_file: Path | None, plot: Path | None) -> None:
    if json_file is not None:
        check_target(json_file, "--json")
    if plot is not None:
        check_target(plot, "--plot")
        try:
            importlib.import_module("matplotlib")
        except ImportError as error:
            raise UnavailableError(
                "--plot", [str(error)], "Install it: pip install 'sparse_dlm_attn[plot]', or leave it out."
            ) from error


def _shapes(lengths: list[int], batch: int, *sizes: Any) -> list[Shape]:
    """Return the shapes; what is wrong with one is said of the option that gave it."""
    with named_as_options(context="--contexts"):
        return [Shape(batch, length, *sizes) for length in lengths]


def _need_torch(command: str) -> Any:
    """Return PyTorch, or raise if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UnavailableError(
            f"command {command!r}", [str(error)], "Install it: pip install 'sparse_dlm_attn[triton]'."
        ) from error


def _need_gpu(command: str) -> None:
    """Raise unless PyTorch sees a GPU: everything that these commands do is measured on one."""
    torch = _need_torch(command)
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"command {command!r}",
            ["PyTorch finds no usable GPU, and it measures on one"],
            "Run it on the machine whose GPU you ask about; check the driver there with nvidia-smi.",
        )


def _check_backend(backend: Backend, shape: Shape) -> None:
    reasons = backend.why_not(
        Problem(shape.dtype, shape.head_dim, shape.page_size, shape.q_heads, shape.kv_heads, shape.tokens, "cuda")
    )
    if reasons:
        raise UnsupportedError(backend.name, reasons)


def _print_points(points: list[Point], sentence: str) -> None:
    from sparse_dlm_attn_benchmarks.break_even import tokens

    asked = sorted({point.asked for point in points})
    rows = []
    for context in sorted({point.context for point in points}):
        row = {point.asked: point for point in points if point.context == context}
        first = next(iter(row.values()))
        gains = (f"{row[share].speedup:.2f}x ({row[share].sparse_us:.1f} us)" for share in asked)
        rows.append((tokens(context), first.peer, f"{first.dense_us:.1f}", *gains))
    console = result_console()
    figures = ("dense, us", *(f"{share:.0%} read" for share in asked))
    console.print(table(("context", "fastest dense"), figures, rows))
    console.print(sentence, markup=False, highlight=False)


def _plot(points: list[Point], policy: str, path: Path) -> None:
    import io

    from matplotlib.figure import Figure

    from sparse_dlm_attn_benchmarks.break_even import tokens

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for asked in sorted({point.asked for point in points}):
        column = sorted((p for p in points if p.asked == asked), key=lambda p: p.context)
        axes.plot([p.context for p in column], [p.speedup for p in column], marker="o", label=f"{asked:.0%}")
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    lengths = sorted({point.context for point in points})
    axes.set(xscale="log", xlabel="context, tokens", ylabel=f"times faster than dense, {policy}")
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.legend(title="of it read", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_atomically(path, picture.getvalue(), "--plot")


def _print_entries(entries: list[Entry], target: Path) -> None:
    rows = []
    for entry in entries:
        chosen = ", ".join(f"{name}={value}" for name, value in entry.settings.as_dict().items())
        rows.append((str(entry.kind.context), chosen, f"{entry.default_us:.1f}", f"{entry.tuned_us:.1f}"))
    console = result_console()
    console.print(table(("context", "settings"), ("default, us", "tuned, us"), rows))
    console.print(f"Kept in {target}. Use: --backend triton:tuned=true", markup=False, highlight=False)
