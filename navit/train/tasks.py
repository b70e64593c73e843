"""What a run learns: a model, its loss on a batch, and what is measured of it.

The loop knows nothing of captions or classes; it asks a task.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from navit.evaluate.classify import evaluate_classifier, labelled_pass
from navit.evaluate.encode import read_metadata
from navit.evaluate.prompts import class_label
from navit.evaluate.run import Evaluation, evaluate_clip
from navit.label_loss import label_loss
from navit.loss import contrastive_loss
from navit.model import CLIP
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.config import NaViTConfig
from navit.train.config import TrainConfig
from navit.train.data import FolderData, StreamData, TrainData
from navit.train.setup import is_folder_run, resolve_tokenizer
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.folder import ImageFolder

CLASSES_FILE = "classes.txt"
SHAPE_SHARDS = 32
"""Training shards read for the shape-only baseline: thousands of samples are enough for it."""


@runtime_checkable
class Task(Protocol):
    """What the loop asks."""

    @property
    def config(self) -> TrainConfig:
        """The configuration with everything filled in that follows from data and weights."""

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Turns captions into tokens; None where there are none."""

    @property
    def model(self) -> nn.Module:
        """The model, made on the CPU."""

    @property
    def source(self) -> str:
        """What is trained on, in a few words."""

    def make_data(
        self, shards: Sequence[str], device: torch.device, stored: Mapping[str, Any] | None
    ) -> TrainData:
        """Return the training batches, continued from a stored position."""

    def loss(self, batch: PackedBatch) -> Tensor:
        """Return the loss of a batch on the model's device; under autocast as the caller set it."""

    def after_step(self) -> None:
        """Keep the model within its bounds after an optimizer step."""

    def evaluate(
        self, shards: Sequence[str], device: torch.device, autocast_dtype: torch.dtype | None
    ) -> Evaluation:
        """Measure the model on validation shards."""

    def readings(self) -> Mapping[str, float]:
        """Return what metrics.jsonl should say of the model after a step."""

    def files(self) -> dict[str, str]:
        """Return the text files a checkpoint must hold beside the weights."""


class ContrastiveTask:
    """Image-text pairs: a CLIP, trained so that an image and its caption meet."""

    def __init__(self, config: TrainConfig, run: Path, train_shards: Sequence[str]) -> None:
        self.run, self.train_shards = run, train_shards
        self.tokenizer = resolve_tokenizer(config, run, train_shards)
        text = replace(
            config.model.text,
            vocab_size=self.tokenizer.vocab_size,
            max_tokens=config.packer.max_text_tokens,
        )
        vision, weights = start_of_tower(config)
        self.config = replace(config, model=replace(config.model, vision=vision, text=text))
        torch.manual_seed(config.seed)
        self.model = CLIP(self.config.model)
        if weights is not None:
            self.model.vision.load_state_dict(weights)

    @property
    def source(self) -> str:
        """The number of shards."""
        return f"{len(self.train_shards)} shards"

    def make_data(
        self, shards: Sequence[str], device: torch.device, stored: Mapping[str, Any] | None
    ) -> TrainData:
        """Stream the pairs of the shards."""
        return StreamData(
            self.config, shards, device, need="caption", tokenizer=self.tokenizer, stored=stored
        )

    def loss(self, batch: PackedBatch) -> Tensor:
        """Return the contrastive loss; equal captions are not negatives of each other."""
        output = self.model(batch)
        device = output.image.device
        with torch.autocast(device.type, enabled=False):
            return contrastive_loss(
                output.image,
                output.text,
                output.logit_scale,
                chunk_size=self.config.loss_chunk,
                text_ids=_text_ids(batch).to(device, non_blocking=True),
            )

    def after_step(self) -> None:
        """Bound the multiplier of the similarities."""
        self.model.limit_logit_scale_()

    def evaluate(
        self, shards: Sequence[str], device: torch.device, autocast_dtype: torch.dtype | None
    ) -> Evaluation:
        """Measure retrieval and caption-prompt accuracy."""
        return evaluate_clip(
            self.model,
            self.tokenizer,
            shards,
            self.config.packer,
            sequences_per_batch=self.config.sequences_per_batch,
            device=device,
            autocast_dtype=autocast_dtype,
            train_metadata=self._shape_metadata(tuple(shards)),
            progress=False,
        )

    def readings(self) -> Mapping[str, float]:
        """Return the multiplier of the similarities."""
        return {"logit_scale": float(self.model.logit_scale.detach())}

    def files(self) -> dict[str, str]:
        """Return the tokenizer."""
        return {"tokenizer.json": (self.run / "tokenizer.json").read_text()}

    def _shape_metadata(self, shards: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
        """Json of training samples for the shape-only baseline; None where there are no classes."""
        if not any(class_label(fields) for fields in read_metadata(shards).values()):
            return None
        return self._train_metadata

    @cached_property
    def _train_metadata(self) -> dict[str, dict[str, Any]]:
        return read_metadata(self.train_shards[:SHAPE_SHARDS])


class ClassifyTask:
    """Labelled images: an image tower with a linear head, softmax or the paper's sigmoid loss."""

    tokenizer = None

    def __init__(self, config: TrainConfig, train_shards: Sequence[str]) -> None:
        self.folder = ImageFolder.read(train_shards[0]) if is_folder_run(config) else None
        self.source = f"{len(train_shards)} shards"
        if self.folder is not None:
            classes = len(self.folder.classes)
            self.source = f"{len(self.folder):,} images of {classes} classes"
            if config.num_classes not in (0, classes):
                raise ValueError(
                    f"num_classes must be the number of subfolders of {self.folder.root} "
                    f"({classes}), or 0; got {config.num_classes}."
                )
            config = replace(config, num_classes=classes)
        if config.num_classes < 1:
            raise ValueError(
                "task 'classify' needs num_classes of at least 1; got "
                f"{config.num_classes}. Give --num-classes."
            )
        vision, weights = start_of_tower(config)
        self.config = replace(config, model=replace(config.model, vision=vision))
        torch.manual_seed(config.seed)
        # A sigmoid that starts at 1 / C need not first unlearn C / 2 positives an image.
        sigmoid = config.label_loss == "sigmoid" and config.num_classes > 1
        bias = -math.log(config.num_classes - 1) if sigmoid else 0.0
        self.model = Classifier(ClassifierConfig(vision, config.num_classes, bias))
        if weights is not None:
            self.model.vision.load_state_dict(weights)

    def make_data(
        self, shards: Sequence[str], device: torch.device, stored: Mapping[str, Any] | None
    ) -> TrainData:
        """Stream the labelled images of the shards, or plan the folder's epochs."""
        if self.folder is not None:
            return FolderData(self.config, self.folder, device, stored=stored)
        return StreamData(self.config, shards, device, need="label", tokenizer=None, stored=stored)

    def loss(self, batch: PackedBatch) -> Tensor:
        """Return the mean loss over the images of the batch."""
        assert batch.labels is not None, "a stream that needs labels gives no image without one"
        return label_loss(self.model(batch), batch.labels, kind=self.config.label_loss)

    def after_step(self) -> None:
        """Nothing is bounded."""

    def evaluate(
        self, shards: Sequence[str], device: torch.device, autocast_dtype: torch.dtype | None
    ) -> Evaluation:
        """Measure accuracy."""
        classes = None if self.folder is None else self.folder.classes
        return evaluate_classifier(
            self.model,
            labelled_pass(
                shards, self.config.packer, self.config.sequences_per_batch, classes=classes
            ),
            device=device,
            autocast_dtype=autocast_dtype,
            progress=False,
        )

    def readings(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def files(self) -> dict[str, str]:
        """Return the names of a folder's classes, in the order of their labels."""
        return {CLASSES_FILE: "\n".join(self.folder.classes) + "\n"} if self.folder else {}


def make_task(config: TrainConfig, run: Path, train_shards: Sequence[str]) -> Task:
    """Return the task a configuration names."""
    if config.task == "classify":
        return ClassifyTask(config, train_shards)
    return ContrastiveTask(config, run, train_shards)


def start_of_tower(config: TrainConfig) -> tuple[NaViTConfig, dict[str, Tensor] | None]:
    """Return the image tower's configuration and, with ``init``, the weights it starts from.

    Raises:
        ValueError: If the weights are for another patch size.
    """
    patch_size = config.packer.patch_size
    if config.init is None:
        return replace(config.model.vision, patch_size=patch_size), None
    from navit.pretrained import load

    model = load(config.init)
    tower = model.vision if isinstance(model, CLIP) else model
    if tower.config.patch_size != patch_size:
        raise ValueError(
            f"packer.patch_size must be that of the weights in {config.init} "
            f"({tower.config.patch_size}); got {patch_size}. Set --packer.patch-size "
            f"{tower.config.patch_size}."
        )
    # What follows from the run and not from the weights stays the run's.
    ours = config.model.vision
    kept = replace(
        tower.config,
        attention=ours.attention,
        checkpointing=ours.checkpointing,
        drop_path=ours.drop_path,
    )
    return kept, tower.state_dict()


def _text_ids(batch: PackedBatch) -> Tensor:
    """Number the captions of a batch so that equal captions share a number: int64 (N,)."""
    numbers: dict[str, int] = {}
    texts = batch.texts or ()
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])
