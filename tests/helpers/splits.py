"""One global batch of a step, split in different ways over ranks and batches."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.clip import CLIP
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.train.classify import ClassifyTask
from navit.train.config import TaskName, Tower, TrainConfig
from navit.train.contrastive import ContrastiveTask
from navit.train.masked import MaskedTask
from navit.train.parallel import ParallelConfig, parallelize, whole
from navit.train.ranks import World, alone
from navit.train.step import gradients
from packer.batch import PackedBatch, PackedText
from packer.captions import CaptionTokenizer
from packer.config import PackerConfig
from tests.helpers.batches import pack_images, random_images
from tests.helpers.distributed import CPU
from tests.reference import contrastive as reference

Split = tuple[tuple[tuple[int, ...], ...], ...]
"""Samples of each rank's batches: split[rank][batch] -> samples."""
AnyTask = ContrastiveTask | ClassifyTask | MaskedTask
PATCH_SIZE, NUM_SAMPLES, NUM_CLASSES, NUM_CAPTIONS = 4, 9, 5, 6


TASKS: dict[str, TaskName] = {
    **dict.fromkeys(("softmax", "sigmoid"), "contrastive"),
    **dict.fromkeys(("labels", "targets"), "classify"),
    "masked": "masked",
}


@dataclass(frozen=True)
class Case:
    """One step."""

    kind: str
    """"softmax" or "sigmoid" of pairs; "labels" or "targets" of a classifier; "masked" patches."""
    split: Split
    strategy: str = "ddp"
    cache: bool = False
    checkpointing: bool = False
    drop_path: float = 0.0
    frozen: tuple[Tower, ...] = ()
    taught: bool = False
    """Whether half of the loss is the distance to a wider teacher."""
    half: bool = False
    """Whether the weights are float32, and the passes in bfloat16."""


def deal(ranks: int, accumulate: int, *, empty_rank: int | None = None) -> Split:
    """Deal all samples unevenly: later batches get more, ``empty_rank`` none."""
    places = [(r, a) for r in range(ranks) for a in range(accumulate) if r != empty_rank]
    bounds = [
        NUM_SAMPLES * i * (i + 1) // (len(places) * (len(places) + 1))
        for i in range(len(places) + 1)
    ]
    dealt = {place: tuple(range(bounds[i], bounds[i + 1])) for i, place in enumerate(places)}
    return tuple(tuple(dealt.get((r, a), ()) for a in range(accumulate)) for r in range(ranks))


def make_batch(samples: Sequence[int], *, with_targets: bool = False) -> PackedBatch:
    """Pack samples with their captions and labels; a sample is the same in any batch."""
    images = random_images(NUM_SAMPLES, seed=3, patch_size=PATCH_SIZE, max_side=3)
    tokens = [torch.arange(1 + i % 3) + i % NUM_CAPTIONS for i in range(NUM_SAMPLES)]
    lengths = [len(tokens[i]) for i in samples]
    captions = PackedText(
        ids=torch.cat([tokens[i] for i in samples]) if samples else torch.zeros(0).long(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        segment_lengths=tuple(lengths),
        image_index=torch.arange(len(lengths)),
    )
    chosen = [images[i] for i in samples]
    packed = pack_images(chosen, patch_size=PATCH_SIZE, seq_len=12, captions=captions)
    labels = torch.tensor([i % NUM_CLASSES for i in samples], dtype=torch.int64)
    if with_targets:
        labels = torch.nn.functional.one_hot(labels, NUM_CLASSES) * 0.8
    return replace(
        packed,
        keys=tuple(f"sample {i}" for i in samples),
        # Samples with an equal caption are on several ranks.
        texts=tuple(f"caption {i % NUM_CAPTIONS}" for i in samples),
        labels=labels,
    )


def make_task(case: Case) -> AnyTask:
    """Build a small task in float64, with the same weights for the same case."""
    shape: dict[str, Any] = {
        "width": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 16,
        "checkpointing": case.checkpointing,
        "drop_path": case.drop_path,
    }
    is_sigmoid = case.kind in ("sigmoid", "targets")
    config = TrainConfig(
        task=TASKS[case.kind],
        contrastive_loss="sigmoid" if is_sigmoid else "softmax",
        label_loss="sigmoid" if is_sigmoid else "softmax",
        num_classes=NUM_CLASSES,
        shards=("none.tar",),
        packer=PackerConfig(patch_size=PATCH_SIZE, seq_len=12),
        model=CLIPConfig(
            vision=NaViTConfig(**shape), text=TextConfig(**shape, pool="mean"), embed_dim=6
        ),
        loss_chunk=2,
        precision="fp32",
        distill_weight=0.5,
        seed=5,
    )
    with TemporaryDirectory() as run:
        tokenizer = CaptionTokenizer.train(["a caption", "another"], 300)
        tokenizer.save(f"{run}/given.json")
        config = replace(config, tokenizer=Path(run, "given.json"))
        if case.taught:
            config = replace(config, teacher=save_model(config, Path(run, "teacher"), width=12))
        if case.frozen:
            init = save_model(config, Path(run, "init"), width=8)
            config = replace(config, init=init, freeze=case.frozen)
        task: AnyTask
        if config.task == "classify":
            task = ClassifyTask(config, ["none.tar"], alone(CPU))
        elif config.task == "masked":
            task = MaskedTask(config, ["none.tar"], alone(CPU))
        else:
            task = ContrastiveTask(config, Path(run), [], alone(CPU))
    with torch.no_grad():
        if not isinstance(
            task, ContrastiveTask
        ):  # it starts at 0, where the tower gets no gradient
            task.model.head.weight.normal_()
        else:
            task.model.log_logit_scale.fill_(1.5)
    task.model.double()
    if not isinstance(task, MaskedTask) and task.teacher is not None:
        task.teacher.model.double()
    return task


def save_model(config: TrainConfig, folder: Path, *, width: int) -> Path:
    """Write a model of the task with other weights."""
    torch.manual_seed(6)
    vision = replace(config.model.vision, width=width, patch_size=PATCH_SIZE)
    if config.task == "classify":
        model: Any = Classifier(ClassifierConfig(vision, NUM_CLASSES))
        torch.nn.init.normal_(model.head.weight)
    else:
        assert config.tokenizer is not None, "pairs have one"
        vocab_size = CaptionTokenizer.from_file(config.tokenizer).vocab_size
        text = replace(config.model.text, width=width, vocab_size=vocab_size)
        model = CLIP(replace(config.model, vision=vision, text=text))
    model.save_pretrained(folder)
    return folder


def run_case(world: World, case: Case) -> dict[str, np.ndarray]:
    """Run one step on this rank; return its loss, number of images and gradients."""
    task = make_task(case)
    task.model.to(world.device)
    if case.half:
        task.model.float()
    if not isinstance(task, MaskedTask) and task.teacher is not None:
        task.teacher.model.to(world.device)
        task.teacher.device = world.device
    model = parallelize(task.model, world, ParallelConfig(case.strategy))
    torch.manual_seed(1)
    targets = case.kind == "targets"
    batches = [make_batch(samples, with_targets=targets) for samples in case.split[world.rank]]
    dtype = torch.bfloat16 if case.half else None
    found = gradients(task, model, batches, world, autocast_dtype=dtype, cache=case.cache)
    grads = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    return {
        "loss": np.asarray(found.loss),
        "images": np.asarray(found.images),
        **{name: grad.cpu().numpy() for name, grad in whole(grads).items()},
    }


def expected(case: Case) -> dict[str, np.ndarray]:
    """Compute the same from the definition: one process, plain losses, autograd."""
    task = make_task(case)
    batches = [sum(parts, ()) for parts in zip(*case.split, strict=True)]
    problems = [sum(batches, ())] if case.cache else [batch for batch in batches if batch]
    total = sum(len(batch) for batch in problems)
    loss = sum(len(batch) / total * _plain_loss(task, case, batch) for batch in problems)
    assert isinstance(loss, Tensor)
    named = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return {
        "loss": loss.detach().numpy(),
        "images": np.asarray(total),
        **{name: grad.numpy() for name, grad in zip(named, grads, strict=True)},
    }


def _plain_loss(task: AnyTask, case: Case, samples: Sequence[int]) -> Tensor:
    if isinstance(task, MaskedTask):  # image by image, see tests/unit/test_masked.py
        return torch.cat([task.model(make_batch([i])) for i in samples]).mean()
    batch = make_batch(samples, with_targets=case.kind == "targets")
    output = task.model(batch)
    if task.teacher is not None:
        alone = replace(case, taught=False)
        own = _plain_loss(_without_teacher(task), alone, samples)
        return 0.5 * own + 0.5 * _divergence(output, task.teacher.model(batch), case.kind)
    if case.kind == "sigmoid":
        return reference.sigmoid_loss(
            output.image, output.text, output.logit_scale, output.logit_bias
        )
    if case.kind == "softmax":
        numbers = torch.tensor([i % NUM_CAPTIONS for i in samples])
        return reference.softmax_loss(output.image, output.text, output.logit_scale, numbers)
    if case.kind == "labels":
        return -output.log_softmax(1)[torch.arange(len(samples)), batch.labels].mean()
    chance = output.sigmoid()
    targets = batch.labels
    return -(targets * chance.log() + (1 - targets) * (1 - chance).log()).sum(1).mean()


def _without_teacher(task: ContrastiveTask | ClassifyTask) -> ContrastiveTask | ClassifyTask:
    alone = copy(task)
    alone.teacher = None
    return alone


def _divergence(student: Any, teacher: Any, kind: str) -> Tensor:
    """KL(teacher || student) of classes, or of each image's texts and each text's images."""
    if kind == "targets":  # each class is a yes or no
        yes_or_no = (torch.stack([x, torch.zeros_like(x)], dim=2) for x in (student, teacher))
        return _kl(*(x.flatten(0, 1) for x in yes_or_no)) * NUM_CLASSES
    if isinstance(student, Tensor):
        return _kl(student, teacher)
    own, taught = (out.logit_scale * out.image @ out.text.T for out in (student, teacher))
    return (_kl(own, taught) + _kl(own.T, taught.T)) / 2


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
