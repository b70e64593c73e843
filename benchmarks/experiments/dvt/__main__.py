"""`python -m benchmarks.experiments.dvt`: does a stage gain by what the one before has found out?

Run again, it goes on: finished runs are skipped, an interrupted one continues from its checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.experiments.command import run_command, settle, write_results
from benchmarks.experiments.dvt.data import draw_objects
from benchmarks.experiments.dvt.run import ARMS, QUICK, Result, Scale, run_arm

TEST_SEED = 1 << 21
"""Of the test images, none of which any setting was chosen on; training images have seed 0."""

PROG = "python -m benchmarks.experiments.dvt"


@dataclass(frozen=True)
class Options:
    """Train a dynamic transformer with no reuse, feature reuse, relationship reuse and both."""

    steps: int = 300
    """Training steps of each run."""
    seeds: int = 3
    """Seeds of every arm: 0, 1, ..."""
    folder: Path = Path("runs/experiments/dvt")
    """Results, table and picture."""
    threads: int = 1
    """Threads of torch. With small tensors a second one gains little, and where other programs run
    it waits for its turn so often that a step took ten times as long."""
    quick: bool = False
    """A few steps of tiny towers, to see that everything runs; the numbers mean nothing."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


def main(args: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    return run_command(Options, _run_all, args, PROG)


def _run_all(options: Options) -> None:
    torch.set_num_threads(options.threads)
    scale = QUICK if options.quick else Scale()
    settle(options.folder, {"steps": options.steps, **asdict(scale)})
    data = (
        draw_objects(scale.train_images, seed=0),
        draw_objects(scale.test_images, seed=TEST_SEED),
    )
    planned = [(seed, arm) for seed in range(options.seeds) for arm in ARMS]
    results: list[Result] = []
    for number, (seed, arm) in enumerate(planned, 1):
        title = f"[{number}/{len(planned)}] reuse: {arm.name}, seed {seed}"
        results.append(
            run_arm(arm, scale, data, options.folder, seed=seed, steps=options.steps, title=title)
        )
        write_summary(options, results)
    print((options.folder / "summary.md").read_text())
    print(f"table and picture: {options.folder}")


def write_summary(options: Options, results: Sequence[Result]) -> None:
    """Write summary.md, summary.json and accuracy.png of the runs there are."""
    from benchmarks.experiments.dvt.summary import draw, format_table  # matplotlib takes a second

    table = format_table(results)
    write_results(options.folder, PROG, table, results, quick=options.quick)
    draw(results, options.folder / "accuracy.png")


if __name__ == "__main__":
    sys.exit(main())
