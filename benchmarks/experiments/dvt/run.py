"""One run of the ablation: train a `DVT` with the sum of its exits' losses, measure each exit."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.experiments.dvt.data import NUM_CLASSES
from navit.dvt import DVT, DVTConfig, StagedCollator, dvt_flops, exits_loss
from navit.dvt.embedded import batch_grids
from navit.model import NaViTConfig
from navit.train.optim import OptimConfig, Optimizers, build_optimizers, learning_rate_factor
from packer.config import PackerConfig
from packer.transforms import RandomFlip

CHECKPOINT_EVERY = 50
EVAL_IMAGES = 200
"""Images evaluated together."""


@dataclass(frozen=True)
class Arm:
    """Which modules a run has."""

    name: str
    """Part of the names of files."""
    feature: bool
    """Feature reuse."""
    relation: bool
    """Relationship reuse."""


ARMS = (
    Arm("none", feature=False, relation=False),
    Arm("feature", feature=True, relation=False),
    Arm("relation", feature=False, relation=True),
    Arm("both", feature=True, relation=True),
)


@dataclass(frozen=True)
class Scale:
    """Sizes of the experiment."""

    budgets: tuple[int, ...] = (12, 30, 72)
    """Most tokens of an image at each stage."""
    patch_size: int = 8
    """Side of a patch in pixels."""
    width: int = 64
    """D."""
    depth: int = 4
    """Blocks of each tower."""
    num_heads: int = 4
    """Attention heads."""
    batch: int = 32
    """Images of a step."""
    train_images: int = 6000
    """Images that are trained on."""
    test_images: int = 2000
    """Images that are measured on."""


QUICK = Scale(budgets=(2, 6), width=32, depth=1, batch=8, train_images=16, test_images=10)
"""To see that everything runs."""


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    arm: str
    """Name of the arm."""
    seed: int
    """Its seed."""
    accuracy: tuple[float, ...]
    """Share of right answers at each exit."""
    flops: tuple[float, ...]
    """Operations of a mean image up to each exit, those of the stages before it included."""
    seconds_per_step: float
    """Time of a training step, packing included."""


def run_arm(
    arm: Arm,
    scale: Scale,
    data: tuple[Sequence[Any], Sequence[Any]],
    folder: Path,
    *,
    seed: int,
    steps: int,
    title: str,
    progress: bool = True,
) -> Result:
    """Return the result of a run: the stored one, or that of training, begun or gone on with.

    Args:
        arm: Which modules.
        scale: Sizes.
        data: Training and test samples.
        folder: Where results and checkpoints lie.
        seed: Of weights and batches.
        steps: Training steps.
        title: Shown with the progress.
        progress: Whether it is.
    """
    path = folder / f"{arm.name}-{seed}.json"
    if path.exists():
        found = json.loads(path.read_text())
        return Result(**{**found, **{k: tuple(found[k]) for k in ("accuracy", "flops")}})
    train, test = data
    collate = StagedCollator(_packing(scale), scale.budgets, transform=RandomFlip())
    torch.manual_seed(seed)
    model = DVT(_model_config(arm, scale))
    spent = _train(
        model,
        train,
        collate,
        path.with_suffix(".pt"),
        seed=seed,
        steps=steps,
        batch=scale.batch,
        bar=tqdm(total=steps, desc=title, unit="step", disable=not progress),
    )
    plain = StagedCollator(_packing(scale), scale.budgets)
    accuracy, flops = measure(model, test, plain)
    result = Result(arm.name, seed, accuracy, flops, spent / steps)
    _write(path, lambda part: part.write_text(json.dumps(asdict(result), indent=2) + "\n"))
    path.with_suffix(".pt").unlink(missing_ok=True)
    return result


def measure(
    model: DVT, samples: Sequence[Any], collate: StagedCollator
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return accuracy and mean operations at each exit; every image runs all stages."""
    model.eval()
    right, spent = [], []
    for start in range(0, len(samples), EVAL_IMAGES):
        batches = collate(samples[start : start + EVAL_IMAGES])
        labels = _labels(batches[0].labels)
        with torch.inference_mode():
            answers = torch.stack(model(batches)).argmax(-1)
        right.append((answers == labels).numpy())
        spent.append(dvt_flops(model.config, [batch_grids(batch) for batch in batches]))
    accuracy = np.concatenate(right, axis=1).mean(1)
    flops = np.concatenate(spent, axis=1).mean(1).cumsum()
    return tuple(accuracy.tolist()), tuple(flops.tolist())


def _train(
    model: DVT,
    samples: Sequence[Any],
    collate: StagedCollator,
    checkpoint: Path,
    *,
    seed: int,
    steps: int,
    batch: int,
    bar: "tqdm[Any]",
) -> float:
    """Train from the checkpoint where there is one; return the seconds of all steps."""
    config = OptimConfig(
        learning_rate=2e-3,
        muon_learning_rate=4e-3,
        warmup_steps=max(1, steps // 20),
        timescale=10 * steps,
        cooldown_steps=max(1, steps // 3),
    )
    optimizers = build_optimizers(model, config)
    step, spent = _resume(model, optimizers, checkpoint)
    bar.update(step)
    per_epoch = max(1, len(samples) // batch)
    model.train()
    while step < steps:
        start = monotonic()
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(samples))
        collate.set_epoch(seed * 10_000 + epoch)
        chosen = order[place * batch : (place + 1) * batch]
        batches = collate([samples[index] for index in chosen.tolist()])
        loss = exits_loss(model(batches), _labels(batches[0].labels))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers.set_lr(learning_rate_factor(step, config, steps))
        optimizers.step()
        optimizers.zero_grad()
        step, spent = step + 1, spent + monotonic() - start
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % CHECKPOINT_EVERY == 0:
            state = {
                "step": step,
                "spent": spent,
                "model": model.state_dict(),
                "optimizers": optimizers.tensors(),
            }
            _write(checkpoint, lambda part, state=state: torch.save(state, part))
    bar.close()
    return spent


def _resume(model: DVT, optimizers: Optimizers, checkpoint: Path) -> tuple[int, float]:
    if not checkpoint.exists():
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_tensors(state["optimizers"])
    return state["step"], state["spent"]


def _write(path: Path, write: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def _packing(scale: Scale) -> PackerConfig:
    return PackerConfig(patch_size=scale.patch_size, seq_len=4 * max(scale.budgets))


def _model_config(arm: Arm, scale: Scale) -> DVTConfig:
    vision = NaViTConfig(
        width=scale.width,
        depth=scale.depth,
        num_heads=scale.num_heads,
        mlp_dim=4 * scale.width,
        patch_size=scale.patch_size,
    )
    return DVTConfig(
        vision,
        NUM_CLASSES,
        num_stages=len(scale.budgets),
        feature_reuse=arm.feature,
        relation_reuse=arm.relation,
    )


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None, "drawn samples have labels"
    return labels
