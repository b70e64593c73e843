"""`python -m benchmarks.experiments.vit`: do masked prediction and interpolated positions help?

Run again, it goes on: finished runs are skipped, an interrupted one continues from its checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.experiments.command import run_command, settle, write_results
from benchmarks.experiments.vit.run import (
    QUICK,
    Name,
    Result,
    Scale,
    ensure_data,
    ensure_results,
    read_results,
)

PROG = "python -m benchmarks.experiments.vit"


@dataclass(frozen=True)
class Options:
    """Pre-train without labels and probe; fine-tune at twice the resolution."""

    only: tuple[Name, ...] = ("masked", "resolution")
    """Experiments to run."""
    seeds: int = 3
    """Seeds of every arm: 0, 1, ..."""
    folder: Path = Path("runs/experiments/vit")
    """Results, table and picture."""
    data: Path = Path("data/experiments/objects")
    """Images that are drawn."""
    threads: int = 1
    """Threads of torch. With small tensors a second one gains little."""
    quick: bool = False
    """A few steps of tiny towers, to see that everything runs; the numbers mean nothing."""

    def __post_init__(self) -> None:
        for name in ("seeds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


def main(args: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    return run_command(Options, _run_all, args, PROG)


def _run_all(options: Options) -> None:
    torch.set_num_threads(options.threads)
    scale = QUICK if options.quick else Scale()
    settle(options.folder, asdict(scale))
    for name in options.only:
        data = ensure_data(options.data, scale, name)
        for seed in range(options.seeds):
            print(f"{name}, seed {seed + 1} of {options.seeds}", file=sys.stderr, flush=True)
            ensure_results(name, data, scale, options.folder, seed)
            write_summary(options, read_results(options.folder))
    print((options.folder / "summary.md").read_text())
    print(f"table and picture: {options.folder}")


def write_summary(options: Options, results: Sequence[Result]) -> None:
    """Write summary.md, summary.json and accuracy.png of all runs of the folder."""
    from benchmarks.experiments.vit.summary import draw, format_tables  # matplotlib takes a second

    table = format_tables(results)
    write_results(options.folder, PROG, table, results, quick=options.quick)
    draw(results, options.folder / "accuracy.png")


if __name__ == "__main__":
    sys.exit(main())
