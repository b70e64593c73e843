"""Runs of both experiments: what is trained, what it starts from, what is measured of it.

Images show one drawn object on a textured background. For probes its colour and fill are the class;
for positions its place is, since colours can be told without knowing where a patch is.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from benchmarks.experiments.dvt.data import CELLS, draw_objects
from benchmarks.experiments.vit.measure import Data, classify, probe
from navit.model import NaViT, NaViTConfig
from navit.model.classifier import Classifier
from navit.model.config import CLIPConfig
from navit.train.checkpoint import has_checkpoint
from navit.train.config import TaskName, TrainConfig
from navit.train.loop import Trainer
from navit.train.masked import MaskedTask
from navit.train.optim import OptimConfig
from navit.train.ranks import alone
from navit.train.restore import load_trained
from navit.train.setup import resolve_device
from packer.config import PackerConfig
from packer.demo import encode_jpeg
from packer.shards import write_shards

Name = Literal["masked", "resolution"]
LABELS: dict[Name, Literal["look", "place"]] = {"masked": "look", "resolution": "place"}
PATCH_SIZE = 8
SMALL, LARGE = 36, 144
"""Tokens of an image before and after its sides are doubled: 6 x 6 and 12 x 12 of a square."""
TEST_SEEDS: dict[Name, int] = {"masked": 1 << 22, "resolution": 1 << 23}
"""Of the test images; training images have seed 0. `TUNING_RATE` was chosen after a run of both
with the first ones, hence the second's own: docs/experiments.md."""
TUNING_RATE = 0.1
"""Times the tower's learning rates in fine-tuning, whose head is new."""


@dataclass(frozen=True)
class Scale:
    """Sizes of both experiments."""

    train_images: int = 8000
    """Images that are trained on."""
    test_images: int = 4000
    """Images that are measured on."""
    width: int = 96
    """D."""
    depth: int = 4
    """Blocks."""
    tokens: int = 2880
    """Tokens of a step."""
    masked_steps: int = 300
    """Steps of masked prediction."""
    small_steps: int = 300
    """Steps of the classifier at the lower resolution."""
    large_steps: int = 80
    """Steps of fine-tuning at twice its sides."""
    workers: int = 1
    """Processes that load."""


QUICK = Scale(900, 24, width=32, depth=1, tokens=288, masked_steps=2, small_steps=2, large_steps=2)
QUICK = replace(QUICK, workers=0)
"""To see that everything runs; a probe needs ten images of every class."""


@dataclass(frozen=True)
class Result:
    """What one arm came to with one seed."""

    experiment: Name
    """The experiment."""
    arm: str
    """The arm."""
    seed: int
    """Of weights, order and draws."""
    steps: int
    """Training steps, those of what it started from included."""
    accuracy: dict[str, float]
    """On test images, by what is told: of 10-shot probes, or the classifier's own."""


def ensure_data(folder: Path, scale: Scale, name: Name) -> Data:
    """Return an experiment's images, drawn at the first call."""
    found = {}
    label = LABELS[name]
    for part, count, seed in (
        ("train", scale.train_images, 0),
        ("test", scale.test_images, TEST_SEEDS[name]),
    ):
        target = folder / f"{label}-{part}-{count}-{seed}"
        marker = target / "done"
        if not marker.exists():
            samples = draw_objects(count, seed=seed, label=label)
            for sample in samples:
                sample["image"] = encode_jpeg(Image.fromarray(sample["image"]))
            write_shards(iter(samples), target / f"{part}-%03d.tar", samples_per_shard=500)
            marker.touch()
        found[part] = tuple(sorted(map(str, target.glob("*.tar"))))
    return Data(found["train"], found["test"])


def training(
    task: TaskName, data: Data, scale: Scale, budget: int, steps: int, seed: int
) -> TrainConfig:
    """Return a run on images of at most ``budget`` tokens."""
    vision = NaViTConfig(
        width=scale.width,
        depth=scale.depth,
        num_heads=scale.width // 32,
        mlp_dim=4 * scale.width,
        patch_size=PATCH_SIZE,
        pool="mean",
        pos_embed="grid",
        pos_table_size=round(budget**0.5),
        pos_interpolation="corners",
    )
    warmup, ending = max(1, steps // 20), max(1, steps // 3)
    return TrainConfig(
        task=task,
        num_classes=CELLS**2 if task == "classify" else 0,
        shards=data.train,
        packer=PackerConfig(patch_size=PATCH_SIZE, seq_len=4 * LARGE, max_tokens=budget, seed=seed),
        model=CLIPConfig(vision=vision),
        optim=OptimConfig(
            learning_rate=2e-3,
            muon_learning_rate=4e-3,
            warmup_steps=warmup,
            cooldown_steps=ending,
        ),
        steps=steps,
        sequences_per_batch=max(scale.tokens // (4 * LARGE), 1),
        workers=scale.workers,
        shuffle_window=512,
        ema_decay=0.0,
        checkpoint_every=100,
        keep_checkpoints=1,
        flip=0.5 if task == "masked" else 0.0,  # the other side is another place
        seed=seed,
    )


def train(config: TrainConfig, folder: Path) -> NaViT | Classifier:
    """Train, or go on where it was interrupted; return the model.

    Raises:
        KeyboardInterrupt: If SIGTERM ended the run; its checkpoint is written.
    """
    config = replace(config, run=folder, resume=has_checkpoint(folder))
    result = Trainer(config, folder).train()
    if result.step < config.steps:
        raise KeyboardInterrupt
    model = load_trained(folder).model
    assert isinstance(model, NaViT | Classifier), "no run here has texts"
    return model


def run_masked(data: Data, scale: Scale, folder: Path, seed: int) -> list[Result]:
    """Probe a tower as it starts, and after masked prediction of the images without labels.

    The colour histogram, which is what the tower learns to tell of each patch, stands beside.
    """
    steps = scale.masked_steps
    config = training("masked", data, scale, LARGE, steps, seed)
    start = MaskedTask(config, data.train, alone(resolve_device(config))).model.vision
    found = [Result("masked", "random weights", seed, 0, probe(start, config, data))]
    trained = train(config, folder / f"masked-{seed}")
    assert isinstance(trained, NaViT), "masked prediction leaves a tower"
    found.append(Result("masked", "masked prediction", seed, steps, probe(trained, config, data)))
    found.append(Result("masked", "colour histogram", seed, 0, probe(None, config, data)))
    return found


def run_resolution(data: Data, scale: Scale, folder: Path, seed: int) -> list[Result]:
    """Train a classifier at one resolution; go on at twice its sides with different positions."""
    steps, more = scale.small_steps, scale.large_steps
    config = training("classify", data, scale, SMALL, steps, seed)
    first = folder / f"small-{seed}"
    model = train(config, first)
    assert isinstance(model, Classifier), "it classifies"
    found = [
        Result("resolution", "36 tokens", seed, steps, classify(model, config, data, SMALL)),
        Result("resolution", "the same at 144", seed, steps, classify(model, config, data, LARGE)),
    ]
    side = round(LARGE**0.5)
    fresh = model.vision.at_grid(side)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table: Any = fresh.pos_embed.table
        table.normal_(std=scale.width**-0.5, generator=generator)
    fresh.save_pretrained(folder / f"fresh-{seed}-start")
    for arm, budget, start in (
        ("trained on at 36", SMALL, {"init": first}),
        ("144, interpolated", LARGE, {"init": first, "init_grid": side}),
        ("144, new positions", LARGE, {"init": folder / f"fresh-{seed}-start"}),
        ("144, table as it was", LARGE, {"init": first}),
    ):
        changed: Any = start
        tuning = replace(training("classify", data, scale, budget, more, seed), **changed)
        gentle = replace(tuning.optim, tower_learning_rate_factor=TUNING_RATE)
        tuning = replace(tuning, optim=gentle)
        tuned = train(tuning, folder / f"{re.sub('[ ,]+', '-', arm)}-{seed}")
        assert isinstance(tuned, Classifier), "it classifies"
        accuracy = classify(tuned, tuning, data, budget)
        found.append(Result("resolution", arm, seed, steps + more, accuracy))
    return found


RUNS: dict[Name, Callable[[Data, Scale, Path, int], list[Result]]] = {
    "masked": run_masked,
    "resolution": run_resolution,
}


def ensure_results(name: Name, data: Data, scale: Scale, folder: Path, seed: int) -> None:
    """Run an experiment with a seed, unless its results are stored."""
    path = folder / f"{name}-{seed}.json"
    if not path.exists():
        rows = [asdict(result) for result in RUNS[name](data, scale, folder / "runs", seed)]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=2) + "\n")
        os.replace(part, path)


def read_results(folder: Path) -> list[Result]:
    """Read all results of a folder, experiment by experiment, seed by seed."""
    paths = [path for name in RUNS for path in sorted(folder.glob(f"{name}-*.json"))]
    return [Result(**row) for path in paths for row in json.loads(path.read_text())]
