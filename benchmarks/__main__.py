"""`python -m benchmarks [names...] [--quick]`: run benchmarks, print tables, store the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import tyro

from benchmarks import (
    bench_attention_share,
    bench_cascade,
    bench_flexi,
    bench_gpu,
    bench_image_path,
    bench_loader,
    bench_loss,
    bench_mix,
    bench_place,
    bench_scale,
    bench_step,
    bench_towers,
    bench_vectors,
)
from benchmarks.harness import Paired, environment, store

Name = Literal[
    "place",
    "scale",
    "image_path",
    "loader",
    "loss",
    "towers",
    "mix",
    "flexi",
    "cascade",
    "attention_share",
    "step",
    "vectors",
    "gpu",
    "gpu_programs",
    "gpu_mix",
    "gpu_loss",
]
Rows = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Benchmark:
    """One entry of the suite."""

    run: Callable[..., Rows]
    """Called with ``quick``; returns one mapping a row."""
    what: str
    """What is measured, for the progress line."""
    prints: bool = False
    """Whether `run` prints its own table while it measures."""
    reads_photos: bool = False
    """Whether `run` takes ``photos``."""
    picture: str | None = None
    """Name of the picture that `run` writes to its ``picture``, beside the stored rows."""


BENCHMARKS: dict[Name, Benchmark] = {
    "place": Benchmark(bench_place.run, "padding and speed of placement", prints=True),
    "scale": Benchmark(bench_scale.run, "many ranks and shards, by planning only", prints=True),
    "image_path": Benchmark(
        bench_image_path.run, "encoded images to patches", prints=True, reads_photos=True
    ),
    "loader": Benchmark(bench_loader.run, "tar shards to batches", prints=True, reads_photos=True),
    "loss": Benchmark(bench_loss.run, "tiled contrastive loss against dense", prints=True),
    "towers": Benchmark(
        bench_towers.run, "a packed tower against dense and other programs' ones", prints=True
    ),
    "mix": Benchmark(
        bench_mix.run, "the paper's mix of resolutions against a fixed square", prints=True
    ),
    "flexi": Benchmark(
        bench_flexi.run, "patch sizes mixed in one batch against one size", prints=True
    ),
    "cascade": Benchmark(
        bench_cascade.run,
        "a cascade over token budgets against single passes and random routing",
        prints=True,
        picture=bench_cascade.PICTURE,
    ),
    "attention_share": Benchmark(
        bench_attention_share.run,
        "attention's share of a block's time",
        prints=True,
        picture=bench_attention_share.PICTURE,
    ),
    "step": Benchmark(
        bench_step.run,
        "a training step with its loader against preloaded batches",
        prints=True,
        reads_photos=True,
    ),
    "vectors": Benchmark(
        bench_vectors.run, "encoded images to vectors", prints=True, reads_photos=True
    ),
    "gpu": Benchmark(bench_gpu.run, "a training step on a GPU, by backend", prints=True),
    "gpu_programs": Benchmark(
        bench_gpu.run_programs, "a training step on a GPU against other programs'", prints=True
    ),
    "gpu_mix": Benchmark(
        bench_gpu.run_mix, "on a GPU, the paper's mix against a fixed square", prints=True
    ),
    "gpu_loss": Benchmark(bench_gpu.run_loss, "on a GPU, tiled against dense loss", prints=True),
}


@dataclass(frozen=True)
class Options:
    """Time our code against the best simple alternative, in pairs, beside an A/A control."""

    names: Annotated[tuple[Name, ...], tyro.conf.Positional] = ()
    """Benchmarks to run; none: all of them."""
    quick: bool = False
    """Tiny inputs, to see that everything runs; the numbers mean nothing and are not stored."""
    store: bool = True
    """Write rows and environment to benchmarks/results/<date>_<device>_<name>.json."""
    photos: tuple[Path, ...] = ()
    """Tars or folders of JPEGs for image_path, loader, step and vectors; none: photo-like images
    are drawn."""


def main(args: Sequence[str] | None = None, *, results: Path = RESULTS) -> dict[Name, Rows]:
    """Run the benchmarks named on the command line.

    Args:
        args: Command line without the program's name; None takes the process's own.
        results: Folder the JSON files go to.

    Returns:
        The rows of each benchmark.
    """
    options = tyro.cli(Options, args=args, prog="python -m benchmarks")
    described = environment()
    versions = described["versions"] | described["peers"]
    print(f"{described['device']}, {described['threads']} threads, {versions}")
    measured: dict[Name, Rows] = {}
    # dict.fromkeys: a name given twice is run once.
    names = tuple(dict.fromkeys(options.names)) or tuple(BENCHMARKS)
    for number, name in enumerate(names, 1):
        benchmark = BENCHMARKS[name]
        print(f"\n[{number}/{len(names)}] {name}: {benchmark.what}", flush=True)
        keep = options.store and not options.quick
        inputs: dict[str, Any] = {"photos": options.photos} if benchmark.reads_photos else {}
        if keep and benchmark.picture is not None:
            inputs["picture"] = results / benchmark.picture
        start = perf_counter()
        rows = measured[name] = benchmark.run(quick=options.quick, **inputs)
        seconds = perf_counter() - start
        if not benchmark.prints:
            print(format_rows(rows))
        stored = ""
        if keep and rows:
            stored = f", stored in {store(results, name, rows)}"
        print(f"{name}: {seconds:.1f} s{stored}", flush=True)
    return measured


def format_rows(rows: Rows) -> str:
    """Lay out rows as a table; what is the same in all of them is said once, above it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = {name: [_format(row.get(name, "")) for row in rows] for name in names}
    shared = [name for name in names if len(rows) > 1 and len(set(cells[name])) == 1]
    columns = [name for name in names if name not in shared]
    widths = [max(map(len, [name, *cells[name]])) for name in columns]
    lines = [", ".join(f"{name} {cells[name][0]}" for name in shared)] if shared else []
    lines.append("  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    for row in zip(*(cells[name] for name in columns), strict=True):
        lines.append("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, Paired):
        control = f"A/A {value.aa_low:.2f}..{value.aa_high:.2f}"
        return f"{value.ratio:.3f} ({value.low:.2f}..{value.high:.2f}; {control})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
