"""A cascade over token budgets against single passes and random routing, on generated images.

Images show one drawn object of random size, place, colour and tilt on a textured background; the
class is one of 9 shapes with one of 5 fills, so that large objects can be told at a glance and
small ones need pixels. One classifier of 1.3 million weights is trained on sides from 4 to 12
patches (arXiv:2307.06304, section 2.2), so that one network serves all budgets. Both are made at
the first run and kept in runs/cascade; an interrupted training goes on. About 25 minutes on 2 CPU
cores, half of them training.

Of 20,500 validation images some half, by their keys, solve the thresholds and the others, more than
10,000, are reported. Held equal: the network, the images and how they are decoded.

Wanted at half the tokens of the largest budget, on paired bootstrap intervals of 95 %: accuracy not
more than 0.5 points below the largest budget's, and above that of random routing with the same
exits. Exit fractions that thresholds were solved for: within 2 points of what the others give. The
smaller budgets alone stand beside it: where one of them is nearly as good as the largest, little is
left to gain. Operations are no speed: images/s are measured, and times in pairs.
"""

import json
import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log, sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import paired_ratio
from navit.cascade import Cascade, budget_stages
from navit.evaluate.cascade import evaluate_cascade
from navit.evaluate.cascade_answers import CascadeSettings
from navit.evaluate.cascade_curve import draw_cascade
from navit.evaluate.cascade_data import LabelledImages
from navit.evaluate.cascade_report import CascadePoint, CascadeReport, format_cascade
from navit.evaluate.data import read_image_set
from navit.evaluate.labels import LABEL_SET
from navit.evaluate.source import Subject
from navit.model.config import CLIPConfig, NaViTConfig
from navit.train.checkpoint import has_checkpoint
from navit.train.config import TrainConfig
from navit.train.loop import Trainer
from navit.train.optim import OptimConfig
from navit.train.restore import load_trained
from navit.train.setup import resolve_autocast, resolve_device
from packer.config import PackerConfig
from packer.demo import draw_image, draw_scene, encode_jpeg
from packer.demo.scene import FILLS, SHAPES
from packer.plan.resize import UniformSide
from packer.plan.types import ImageSize
from packer.shards import write_shards

PICTURE = "cascade.png"
FOLDER = Path(__file__).parents[1] / "runs" / "cascade"
CLASSES = len(SHAPES) * len(FILLS)
PATCH_SIZE, LARGEST = 8, 144
CASCADES = ((36, 64, LARGEST), (64, LARGEST), (36, LARGEST))
"""Token budgets of the stages; the last is the single pass to compare with."""
HALF = 0.5
TOLERATED = 0.005
"""Accuracy that half the tokens may cost."""
_VERSION = 2  # raised whenever other images or another classifier would be made
_SHARD = 1000
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How much is drawn, trained and timed."""

    train: int = 20_000
    """Training images."""
    val: int = 20_500
    """Validation images: half solve, half report."""
    steps: int = 900
    """Training steps."""
    sequences: int = 16
    """Sequences of 576 tokens a step."""
    timed: int = 1000
    """Images that cascade and single pass are timed on in pairs."""
    pairs: int = 6
    """Pairs of times."""


QUICK = Scale(train=24, val=40, steps=3, sequences=2, timed=8, pairs=2)


def run(quick: bool = False, picture: Path | None = None, folder: Path = FOLDER) -> Rows:
    """Draw, train, solve and measure.

    Args:
        quick: A few images and steps, in a folder that is thrown away.
        picture: PNG to write accuracy over cost to; None draws none.
        folder: Where images and classifier are kept.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if quick:
            with tempfile.TemporaryDirectory() as thrown_away:
                return _run(Path(thrown_away), QUICK, None, progress=False)
        return _run(folder, Scale(), picture, progress=True)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, scale: Scale, picture: Path | None, *, progress: bool) -> Rows:
    train, val = (
        ensure_images(folder / part, count, seed, progress=progress)
        for seed, (part, count) in enumerate((("train", scale.train), ("val", scale.val)))
    )
    subject = trained(train, val, folder / "classifier", scale, progress=progress)
    images = LabelledImages(read_image_set(val, kind="classes"), LABEL_SET, CLASSES)
    rows: Rows = []
    for budgets in CASCADES[:1] if scale == QUICK else CASCADES:
        settings = CascadeSettings(budgets, shares=_shares(scale, budgets), progress=progress)
        report = evaluate_cascade(subject, images, settings)
        if picture is not None:
            path = picture.with_stem("_".join([picture.stem, *map(str, budgets)]))
            print(f"picture: {draw_cascade(report, path)}")
        row = _row(report)
        row["seconds_cascade_over_single"] = _timed(subject, images, report, scale)
        print(f"\n{format_cascade(report)}\n{_told(row)}\n")
        rows.append(row)
    return rows


def _shares(scale: Scale, budgets: tuple[int, ...]) -> tuple[float, ...]:
    """Return the shares of the largest budget that are more than the first stage's alone."""
    shares = (HALF,) if scale == QUICK else (0.35, HALF, 0.65)
    return tuple(share for share in shares if share > budgets[0] / budgets[-1])


def half_point(report: CascadeReport) -> CascadePoint:
    """Return the cascade solved for half the tokens; for fewer, where half are of no use."""
    # The halves of the data differ a little in tokens an image.
    most = 1.02 * HALF * report.of("one budget")[-1].mean_tokens
    solved = [p for p in report.of("cascade") if p.thresholds and p.thresholds.mean_cost <= most]
    return max(solved, key=lambda point: point.mean_tokens)


def _row(report: CascadeReport) -> dict[str, Any]:
    point, single = half_point(report), report.of("one budget")[-1]
    over_last, over_random = point.over_last, point.over_random
    # All that was run is measured.
    assert over_last is not None
    assert over_random is not None
    assert point.thresholds is not None
    assert point.images_per_second is not None
    assert single.images_per_second is not None
    return {
        "budgets": " -> ".join(map(str, report.budgets)),
        "images": report.images,
        "solved_on": report.solving_images,
        "accuracy": point.accuracy,
        "single_accuracy": single.accuracy,
        "over_single": f"{over_last.mean:+.4f} ({over_last.low:+.4f}..{over_last.high:+.4f})",
        "over_random": f"{over_random.mean:+.4f} ({over_random.low:+.4f}..{over_random.high:+.4f})",
        "not_worse_by_more_than_0.5_points": over_last.low > -TOLERATED,
        "better_than_random": over_random.low > 0,
        "share_of_tokens": point.mean_tokens / single.mean_tokens,
        "share_of_operations": point.mean_flops / single.mean_flops,
        "exits": " / ".join(f"{share:.3f}" for share in point.exit_fractions),
        "exit_fractions_off_by": _off_by(report),
        "thresholds": " / ".join(f"{value:.4f}" for value in point.thresholds.values),
        "images_per_s": point.images_per_second,
        "single_images_per_s": single.images_per_second,
        "network_images_per_s": point.model_images_per_second,
        "single_network_images_per_s": single.model_images_per_second,
    }


def _off_by(report: CascadeReport) -> float:
    """Return how far the exit fractions of the halves are from each other, at most."""
    return max(
        abs(wanted - found)
        for point in report.of("exit fractions")
        if point.thresholds is not None
        for wanted, found in zip(point.thresholds.exit_fractions, point.exit_fractions, strict=True)
    )


def _told(row: dict[str, Any]) -> str:
    timed = row["seconds_cascade_over_single"]
    return (
        f"at {row['share_of_tokens']:.0%} of the tokens: {row['over_single']} above the single "
        f"pass, {row['over_random']} above random routing; time over the single pass's {timed}; "
        f"exit fractions are off by at most {row['exit_fractions_off_by']:.4f}"
    )


def _timed(subject: Subject, images: LabelledImages, report: CascadeReport, scale: Scale) -> Any:
    """Time the whole way from bytes to answers in pairs, on images that thresholds saw not."""
    point = half_point(report)
    assert point.thresholds is not None
    reporting = images.half(images.samples(subject.packing), 1, 0)
    samples = [sample for sample, _ in zip(reporting, range(scale.timed), strict=False)]
    stages = budget_stages(subject.model, subject.packing, report.budgets)
    options: dict[str, Any] = {
        "device": subject.device,
        "autocast_dtype": subject.autocast_dtype,
    }
    cascade = Cascade(stages, point.thresholds, **options)
    single = Cascade(stages[-1:], **options)
    return paired_ratio(partial(cascade, samples), partial(single, samples), pairs=scale.pairs)


# The classifier


def training(train: list[str], val: list[str], scale: Scale) -> TrainConfig:
    """Return the run: one network for all budgets, sides of 4 to 12 patches."""
    quick = scale == QUICK
    shape: dict[str, Any] = {"width": 160, "num_heads": 5, "mlp_dim": 640, "depth": 4}
    if quick:
        shape = {"width": 32, "num_heads": 2, "mlp_dim": 64, "depth": 1}
    ending = scale.steps // 3
    return TrainConfig(
        task="classify",
        num_classes=CLASSES,
        shards=tuple(train),
        # Measured on all of it when it is done: a shard is enough on the way.
        val=tuple(val[:1]),
        packer=PackerConfig(
            patch_size=PATCH_SIZE,
            seq_len=4 * LARGEST,
            max_tokens=LARGEST,
            resolution=UniformSide(4 * PATCH_SIZE, 12 * PATCH_SIZE),
        ),
        model=CLIPConfig(vision=NaViTConfig.from_dict({**shape, "pool": "mean"})),
        optim=OptimConfig(
            learning_rate=3e-3,
            muon_learning_rate=8e-3,
            warmup_steps=min(20, scale.steps - ending),
            cooldown_steps=ending,
        ),
        steps=scale.steps,
        sequences_per_batch=scale.sequences,
        workers=0 if quick else 1,
        ema_decay=0.98,
        checkpoint_every=100,
        eval_every=0 if quick else 300,
        flip=0.0,
    )


def trained(
    train: list[str], val: list[str], folder: Path, scale: Scale, *, progress: bool
) -> Subject:
    """Return the classifier, trained at the first call; an interrupted training goes on."""
    config = replace(training(train, val, scale), run=folder, resume=has_checkpoint(folder))
    result = Trainer(config, folder).train(progress=progress)
    if result.step < config.steps:
        raise SystemExit(f"stopped at step {result.step} of {config.steps}; run it again.")
    found = load_trained(folder)
    device = resolve_device(config)
    model = found.model.to(device)
    return Subject(model, config.packer, device, resolve_autocast(config, device))


# The images


def draw_sample(job: tuple[int, int]) -> dict[str, Any]:
    """Draw one labelled image from a seed and an index; runs in any process."""
    seed, index = job
    rng = random.Random(f"cascade {seed} {index}")
    scene = draw_scene(rng)
    shape, fill = rng.randrange(len(SHAPES)), rng.randrange(len(FILLS))
    # At 36 tokens the fill of some sixth of them is finer than the pixels, at 144 of none.
    diameter = exp(rng.uniform(log(0.2), log(0.8)))
    lone = replace(
        scene.objects[0],
        shape=SHAPES[shape],
        fill=FILLS[fill],
        diameter=diameter,
        x=rng.uniform(diameter / 2, 1 - diameter / 2),
        y=rng.uniform(diameter / 2, 1 - diameter / 2),
    )
    # Sides of the square of equal area from 12 to 20 patches: no budget enlarges.
    side, stretch = rng.uniform(12, 20) * PATCH_SIZE, exp(rng.uniform(-0.3, 0.3))
    size = ImageSize(round(side * sqrt(stretch)), round(side / sqrt(stretch)))
    image = draw_image(replace(scene, objects=(lone,), relation="middle", third=""), size)
    return {
        "key": f"{index:06d}",
        "image": encode_jpeg(image),
        "label": shape * len(FILLS) + fill,
    }


def ensure_images(folder: Path, count: int, seed: int, *, progress: bool) -> list[str]:
    """Return the shards of a folder, drawing them unless they are complete."""
    marker = folder / "done.json"
    stamp = {"version": _VERSION, "count": count, "seed": seed}
    if not marker.is_file() or json.loads(marker.read_text()) != stamp:
        marker.unlink(missing_ok=True)
        for old in folder.glob("*.tar"):
            old.unlink()
        write_shards(
            _drawn(count, seed, progress=progress),
            folder / f"{folder.name}-%03d.tar",
            samples_per_shard=_SHARD,
        )
        marker.write_text(json.dumps(stamp))
    return sorted(map(str, folder.glob("*.tar")))


def _drawn(count: int, seed: int, *, progress: bool) -> Iterator[dict[str, Any]]:
    jobs = [(seed, index) for index in range(count)]
    bar = partial(tqdm, total=count, desc="drawing", unit="image", disable=not progress)
    if count < _SHARD:
        yield from bar(map(draw_sample, jobs))
        return
    # A fresh interpreter: torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from bar(pool.map(draw_sample, jobs, chunksize=64))
