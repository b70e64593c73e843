"""`python -m benchmarks.experiments`: the paper's claims at a small scale, one resumable command.

Run again, it goes on: finished runs are skipped, an interrupted one continues from its checkpoint.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import tyro

from benchmarks.experiments.arms import EXPERIMENTS, SQUARE, Arm, Experiment, Letter, arm_config
from benchmarks.experiments.command import write_results
from benchmarks.experiments.data import DataSet, data_sets
from benchmarks.experiments.run import (
    ArmResult,
    Stopped,
    finished,
    plan_arm,
    run_arm,
    run_name,
)
from benchmarks.harness import environment
from navit.train.loop import Trainer
from navit.train.metrics import read_metrics

CALIBRATION_STEPS = 12
"""Steps timed to turn minutes into operations."""
ON_PHOTOS: tuple[Letter, ...] = ("a",)
"""Experiments that photographs are used for unless --sets names them."""


@dataclass(frozen=True)
class Options:
    """Train the arms of the experiments at equal compute; write tables and pictures.

    (a) NaViT against a fixed square ViT, (b) token dropping, (c) fixed against variable
    resolution, (d) position embeddings at unseen resolutions, (e) FlexiViT: one model for several
    patch sizes.
    """

    only: tuple[Letter, ...] = ("a", "b", "c", "d", "e")
    """Experiments to run, in this order."""
    sets: tuple[str, ...] = ()
    """Data sets, of "demo" (drawn scenes of 256 px and more), "pairs" (photographs beside the
    repository) and "own" (--shards); none: scenes for all experiments, the others for a."""
    seeds: int = 3
    """Seeds of every arm: 0, 1, ..."""
    minutes_per_run: float = 0.9
    """Training time the budget is made for, at the speed of the fixed square ViT on this machine,
    measured once. The budget itself is FLOPs, the same for all arms, and is kept in the folder.
    Other arms may take longer at equal FLOPs; the tables give their minutes."""
    flops: float | None = None
    """The budget of a run in FLOPs, forward and backward, instead."""
    shards: tuple[str, ...] = ()
    """Your own training pairs: tar shards or brace ranges, in place of the photographs."""
    val: tuple[str, ...] = ()
    """Their validation shards."""
    folder: Path = Path("runs/experiments")
    """Runs, tables and pictures."""
    data: Path = Path("data/experiments")
    """Scenes that are drawn, and squashed copies."""
    part: int = 0
    """With `parts`: which of them this process runs, from 0."""
    parts: int = 1
    """Parts the runs are dealt to, for as many processes at once; without parts, the command then
    finds all runs done and writes the tables."""
    keep_weights: bool = False
    """Keep the last checkpoint of every run, some 40 MB each."""
    quick: bool = False
    """A few scenes and tiny towers, to see that everything runs; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1; got {self.seeds}.")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part must be of 0 to parts - 1; got {self.part} of {self.parts}.")
        waiting = [letter for letter in self.only if EXPERIMENTS[letter].starts]
        if self.parts > 1 and waiting:
            raise ValueError(
                f"runs of ({', '.join(waiting)}) start from the weights of others and cannot be "
                f"dealt to {self.parts} parts. Name the others with --only."
            )
        if not self.minutes_per_run > 0 or (self.flops is not None and not self.flops > 0):
            raise ValueError(
                "minutes_per_run and flops must be positive; got "
                f"{self.minutes_per_run} and {self.flops}."
            )
        if bool(self.shards) != bool(self.val):
            raise ValueError("shards and val belong together; got one of them. Give both.")


@dataclass(frozen=True)
class Job:
    """One run."""

    data: DataSet
    """What it is trained on."""
    arm: Arm
    """How."""
    seed: int
    """Its seed."""


def jobs(options: Options, sets: dict[str, DataSet]) -> Iterator[Job]:
    """Yield a part's runs in their order, each once: arms that experiments share, too."""
    for number, job in enumerate(_all_jobs(options, sets)):
        if number % options.parts == options.part:
            yield job


def _all_jobs(options: Options, sets: dict[str, DataSet]) -> Iterator[Job]:
    seen: set[tuple[str, str, int]] = set()
    for letter in options.only:
        for data in _used(options, sets, letter):
            for seed in range(options.seeds):
                for arm in EXPERIMENTS[letter].arms:
                    name = data.name, arm.name, seed
                    if name not in seen:
                        seen.add(name)
                        yield Job(data, arm, seed)


def main(args: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    try:
        options = tyro.cli(Options, args=args, prog="python -m benchmarks.experiments")
        sets = data_sets(options.data, shards=options.shards, val=options.val, quick=options.quick)
        unknown = sorted(set(options.sets) - sets.keys())
        if unknown:
            raise ValueError(f"sets must be of {sorted(sets)}; got {unknown}.")
        budget = resolve_budget(options, sets)
        _run_all(options, sets, budget)
    except Stopped as stopped:
        print(f"{stopped} Run the command again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.experiments: {error}", file=sys.stderr)
        return 2
    return 0


def resolve_budget(options: Options, sets: dict[str, DataSet]) -> float:
    """Return the operations of a run, as first settled for the folder.

    Raises:
        ValueError: If the folder's runs have another budget than the one asked for.
    """
    path = options.folder / "budget.json"
    asked = {"minutes_per_run": options.minutes_per_run, "flops": options.flops}
    if path.exists():
        found = json.loads(path.read_text())
        if found["asked"] != asked:
            raise ValueError(
                f"all runs of a folder have one budget; {path} was settled for {found['asked']}, "
                f"got {asked}. Give the same, or another --folder."
            )
        return float(found["flops"])
    flops = options.flops
    if flops is None:
        used = next(data for letter in options.only for data in _used(options, sets, letter))
        flops = 60 * options.minutes_per_run * measure_rate(used)
    options.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"flops": flops, "asked": asked, "environment": environment()}))
    return flops


def measure_rate(data: DataSet) -> float:
    """Train the fixed square ViT for a few steps; return its operations a second."""
    squares = data.squashed(int(SQUARE.side))
    config = arm_config(SQUARE, data.scale, images=1, steps=CALIBRATION_STEPS, seed=0)
    config = replace(config, shards=squares.train, tokenizer=data.tokenizer(), eval_every=0)
    with TemporaryDirectory() as folder:
        Trainer(config, Path(folder)).train(progress=False)
        rates = [
            line["flops_per_second"]
            for line in read_metrics(Path(folder) / "metrics.jsonl")
            if line["event"] == "rates"
        ]
    return float(rates[-1])  # the steps after the tenth: the first ones wait for the loader


def _used(options: Options, sets: dict[str, DataSet], letter: Letter) -> list[DataSet]:
    if options.sets:
        return [sets[name] for name in options.sets]
    return [data for name, data in sets.items() if name == "demo" or letter in ON_PHOTOS]


def _run_all(options: Options, sets: dict[str, DataSet], budget: float) -> None:
    planned = list(jobs(options, sets))
    print(
        f"{len(planned)} runs of {budget:.3g} FLOPs each, in {options.folder}; run the command "
        "again to go on",
        flush=True,
    )
    starts = frozenset().union(*(EXPERIMENTS[letter].starts for letter in options.only))
    results: list[ArmResult] = []
    spent: list[float] = []
    for number, job in enumerate(planned, 1):
        runs = options.folder / "runs"
        folder = runs / run_name(job.data, job.arm.name, job.seed)
        config, plan = plan_arm(job.arm, job.data, budget, job.seed, runs)
        result = finished(folder, config)
        if result is None:
            left = len(planned) - number + 1
            each = sum(spent) / len(spent) if spent else 60 * options.minutes_per_run
            print(
                f"[{number}/{len(planned)}] {job.data.name}, {job.arm.what}, seed {job.seed}: "
                f"{plan.steps:,} steps, {plan.images:,} images; about {left * each / 60:.0f} "
                "minutes left in all",
                flush=True,
            )
            start = monotonic()
            result = run_arm(
                job.arm,
                job.data,
                config,
                plan,
                folder,
                keep_model=job.arm.name in starts,
                keep_weights=options.keep_weights,
            )
            spent.append(monotonic() - start)
        results.append(result)
        if options.parts == 1 and (number == len(planned) or planned[number].seed != job.seed):
            write_summary(options, sets, results)
    if options.parts > 1:
        print(f"part {options.part} of {options.parts} is done")
        return
    print((options.folder / "summary.md").read_text())
    print(f"tables and pictures: {options.folder}")


def write_summary(
    options: Options, sets: dict[str, DataSet], results: Sequence[ArmResult]
) -> list[Path]:
    """Write summary.md, summary.json and a picture for every experiment that has results."""
    from benchmarks.experiments.plots import draw  # matplotlib takes a second
    from benchmarks.experiments.summary import format_table

    told, pictures = [], []
    for letter in options.only:
        experiment = EXPERIMENTS[letter]
        for data in _used(options, sets, letter):
            own = _of(experiment, data, results)
            if own:
                told.append(format_table(experiment, data.name, own))
                path = options.folder / f"{letter}-{data.name}.png"
                pictures.append(draw(experiment, data.name, own, path))
    prog = "python -m benchmarks.experiments"
    write_results(options.folder, prog, "\n\n".join(told), results, quick=options.quick)
    return pictures


def _of(experiment: Experiment, data: DataSet, results: Sequence[ArmResult]) -> list[ArmResult]:
    names = {arm.name for arm in experiment.arms}
    return [result for result in results if result.data == data.name and result.arm in names]


if __name__ == "__main__":
    sys.exit(main())
