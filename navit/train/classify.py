"""Labelled images as a task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from navit.distill_loss import label_distillation
from navit.evaluate.classify import evaluate_classifier, image_pass
from navit.evaluate.run import Evaluation
from navit.label_loss import label_loss
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.clip import CLIPOutput
from navit.train.config import TrainConfig
from navit.train.data import TrainData, image_data
from navit.train.ranks import World
from navit.train.setup import is_folder_run
from navit.train.start import freeze, start_of_tower
from navit.train.teacher import Teacher, mixed_loss, teacher_files
from packer.batch import PackedBatch
from packer.folder import ImageFolder

CLASSES_FILE = "classes.txt"


class ClassifyTask:
    """Labelled images: an image tower with a linear head, softmax or the paper's sigmoid loss."""

    tokenizer = None
    couples_images = False

    def __init__(self, config: TrainConfig, train_shards: Sequence[str], world: World) -> None:
        self.world = world
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
        shape = ClassifierConfig(vision, config.num_classes, bias, config.representation_size)
        self.model = Classifier(shape)
        if weights is not None:
            self.model.vision.load_state_dict(weights)
        freeze(self.model, config.freeze)
        names = None if self.folder is None else self.folder.classes
        self.teacher = None
        if config.teacher is not None:
            self.teacher = Teacher(self.config, world.device, names)

    def make_data(self, shards: Sequence[str], stored: Mapping[str, Any] | None) -> TrainData:
        """Stream the labelled images of the shards, or plan the folder's epochs."""
        return image_data(self.config, shards, self.folder, self.world, need="label", stored=stored)

    def loss(
        self,
        output: CLIPOutput | Tensor,
        batches: Sequence[PackedBatch],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Return the loss of the labels; with a teacher mixed with the distance to its answers."""
        assert isinstance(output, Tensor), "the model is a classifier"
        own = partial(self._own_loss, output, batches, group)
        if self.teacher is None:
            return own()
        taught, config = self.teacher(batches), self.config
        assert isinstance(taught, Tensor), "the teacher is a classifier"
        agreed = label_distillation(
            output,
            taught,
            kl=config.distill_kl,
            kind=config.label_loss,
            temperature=config.distill_temperature,
            group=group,
        )
        return mixed_loss(agreed, own, config.distill_weight)

    def _own_loss(
        self, output: Tensor, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
    ) -> Tensor:
        filled = [batch for batch in batches if batch.num_images]  # an empty one may have no kind
        labels = [batch.labels for batch in filled if batch.labels is not None]
        assert len(labels) == len(filled), "data that needs labels skips images without"
        together = torch.cat(labels or [torch.zeros(0, dtype=torch.int64)])
        together = together.to(output.device, non_blocking=True)
        return label_loss(output, together, kind=self.config.label_loss, group=group)

    def after_step(self) -> None:
        """Nothing is bounded."""

    def evaluate(
        self,
        model: Classifier,
        shards: Sequence[str],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Evaluation:
        """Measure accuracy."""
        classes = None if self.folder is None else self.folder.classes
        return evaluate_classifier(
            model,
            image_pass(
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
        """Return the names of a folder's classes, by label, and the digest of a teacher."""
        own = {CLASSES_FILE: "\n".join(self.folder.classes) + "\n"} if self.folder else {}
        return own | teacher_files(self.teacher)
