"""Runs of both experiments: what is trained, what it starts from, what is measured of it.

Images show one drawn object on a textured background, its colour and fill as the class.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from benchmarks.experiments.dvt.data import NUM_CLASSES, draw_objects
from navit.evaluate.budgets import BudgetEvaluator
from navit.evaluate.data import read_image_set
from navit.evaluate.labels import LABEL_SET
from navit.evaluate.probes import ProbeConfig
from navit.evaluate.results import Metric, Settings
from navit.evaluate.source import Subject
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
from navit.train.setup import resolve_autocast, resolve_device
from packer.config import PackerConfig
from packer.demo import encode_jpeg
from packer.shards import write_shards

Name = Literal["masked", "resolution"]
PATCH_SIZE = 8
SMALL, LARGE = 36, 144
"""Tokens of an image before and after its sides are doubled: 6 x 6 and 12 x 12 of a square."""
PROBED, CLASSIFIED = f"{LABEL_SET}/10_shot_accuracy@1", "accuracy@1"
TEST_SEED = 1 << 22
"""Of the test images; training images have seed 0."""


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
    accuracy: float
    """10-shot probe or the classifier's own, on test images."""
    steps: int
    """Steps trained in this arm."""


@dataclass(frozen=True)
class Data:
    """Shards."""

    train: tuple[str, ...]
    """To train on, and to take the probes' examples from."""
    test: tuple[str, ...]
    """To measure on."""


def ensure_data(folder: Path, scale: Scale) -> Data:
    """Return the images, drawn at the first call."""
    found = {}
    for part, count, seed in (
        ("train", scale.train_images, 0),
        ("test", scale.test_images, TEST_SEED),
    ):
        target = folder / f"{part}-{count}"
        marker = target / "done"
        if not marker.exists():
            samples = draw_objects(count, seed=seed)
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
        num_classes=NUM_CLASSES if task == "classify" else 0,
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
        flip=0.5,
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


def measure(
    model: NaViT | Classifier, config: TrainConfig, data: Data, metric: str, budget: int
) -> float:
    """Return an accuracy on the test images at a token budget."""
    device = resolve_device(config)
    subject = Subject(
        model.to(device).eval(), config.packer, device, resolve_autocast(config, device)
    )
    wanted: tuple[Metric, ...] = ("few_shot",) if metric == PROBED else ("classifier",)
    settings = Settings(metrics=wanted, probes=ProbeConfig(shots=(10,)), progress=False)
    test, examples = (read_image_set(part, kind="classes") for part in (data.test, data.train))
    evaluator = BudgetEvaluator(subject, test, examples, settings)
    return evaluator.evaluate(budget).metrics[metric]


def run_masked(data: Data, scale: Scale, folder: Path, seed: int) -> list[Result]:
    """Probe a tower as it starts, and after masked prediction of the images without labels."""
    steps = scale.masked_steps
    config = training("masked", data, scale, LARGE, steps, seed)
    task = MaskedTask(config, data.train, alone(resolve_device(config)))
    before = measure(task.model.vision, config, data, PROBED, LARGE)
    after = measure(train(config, folder / f"masked-{seed}"), config, data, PROBED, LARGE)
    return [
        Result("masked", "random weights", seed, before, 0),
        Result("masked", "masked prediction", seed, after, steps),
    ]


def run_resolution(data: Data, scale: Scale, folder: Path, seed: int) -> list[Result]:
    """Train a classifier at one resolution; go on at twice its sides with different positions."""
    config = training("classify", data, scale, SMALL, scale.small_steps, seed)
    first = folder / f"small-{seed}"
    model = train(config, first)
    assert isinstance(model, Classifier), "it classifies"
    side = round(LARGE**0.5)
    fresh = model.vision.at_grid(side)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table: Any = fresh.pos_embed.table
        table.normal_(std=scale.width**-0.5, generator=generator)
    fresh.save_pretrained(folder / f"fresh-{seed}-start")
    results = [
        Result("resolution", f"not fine-tuned, {budget} tokens", seed, found, scale.small_steps)
        for budget in (SMALL, LARGE)
        for found in (measure(model, config, data, CLASSIFIED, budget),)
    ]
    larger = training("classify", data, scale, LARGE, scale.large_steps, seed)
    for arm, start in (
        ("interpolated", {"init": first, "init_grid": side}),
        ("not interpolated", {"init": folder / f"fresh-{seed}-start"}),
        ("table left as it is", {"init": first}),
    ):
        changed: Any = start
        tuned = train(replace(larger, **changed), folder / f"{arm.replace(' ', '-')}-{seed}")
        found = measure(tuned, larger, data, CLASSIFIED, LARGE)
        results.append(Result("resolution", arm, seed, found, scale.large_steps))
    return results


RUNS: dict[Name, Callable[[Data, Scale, Path, int], list[Result]]] = {
    "masked": run_masked,
    "resolution": run_resolution,
}


def stored(name: Name, data: Data, scale: Scale, folder: Path, seed: int) -> list[Result]:
    """Return the results of an experiment with a seed: those stored, or new ones."""
    path = folder / f"{name}-{seed}.json"
    if not path.exists():
        rows = [asdict(result) for result in RUNS[name](data, scale, folder / "runs", seed)]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=2) + "\n")
        os.replace(part, path)
    return [Result(**row) for row in json.loads(path.read_text())]
