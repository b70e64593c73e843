"""What a run learns: a model, its loss on a batch, and what is measured of it.

The loop knows nothing of captions or classes; it asks a task.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from navit.distill_loss import contrastive_distillation, label_distillation
from navit.evaluate.classify import evaluate_classifier, image_pass
from navit.evaluate.encode import read_metadata
from navit.evaluate.prompts import class_label
from navit.evaluate.run import Evaluation, evaluate_clip
from navit.label_loss import label_loss
from navit.loss import contrastive_loss, sigmoid_loss
from navit.model import CLIP
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.clip import CLIPOutput
from navit.model.vision import PretrainedModel
from navit.train.config import TrainConfig
from navit.train.data import StreamData, TrainData, image_data
from navit.train.masked import MaskedTask
from navit.train.ranks import World, alone
from navit.train.setup import is_folder_run, tokenizer_of_all
from navit.train.start import freeze, start_of_pair, start_of_scores, start_of_tower
from navit.train.teacher import TEACHER_FILE, Teacher, check_tokenizer, given_tokenizer
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer
from packer.folder import ImageFolder

Output = CLIPOutput | Tensor
"""What a task's model returns for a batch."""
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
    def model(self) -> PretrainedModel[Any]:
        """The plain model, made on the CPU: also where training calls a wrapper around it."""

    @property
    def couples_images(self) -> bool:
        """Whether an image's loss depends on the other images (contrastive)."""

    @property
    def source(self) -> str:
        """What is trained on, in a few words."""

    def make_data(self, shards: Sequence[str], stored: Mapping[str, Any] | None) -> TrainData:
        """Return this rank's training batches, continued from a stored position."""

    def loss(
        self, output: Output, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return the mean loss over all images of the batches and of all ranks of a group.

        It is equal on every rank, and each rank's gradients are world_size times its share of the
        global gradient, as in `navit.loss`.

        Args:
            output: Of the model, one row for each image of the batches, in their order.
            batches: Where captions and labels are.
            group: The ranks; None for this process alone.
        """

    def after_step(self) -> None:
        """Keep the model within its bounds after an optimizer step."""

    def evaluate(
        self,
        model: Any,
        shards: Sequence[str],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Evaluation:
        """Measure a model on validation shards: `model`, or a whole copy of a sharded one."""

    def readings(self) -> Mapping[str, float]:
        """Return what metrics.jsonl should say of the model after a step."""

    def files(self) -> dict[str, str]:
        """Return the text files a checkpoint must hold beside the weights."""


class ContrastiveTask:
    """Image-text pairs: a CLIP, trained so that an image and its caption meet."""

    couples_images = True

    def __init__(
        self, config: TrainConfig, run: Path, train_shards: Sequence[str], world: World
    ) -> None:
        self.run, self.train_shards, self.world = run, train_shards, world
        if config.tokenizer is None:
            config = replace(config, tokenizer=given_tokenizer(config))
        self.tokenizer = tokenizer_of_all(config, run, train_shards, world)
        text = replace(
            config.model.text,
            vocab_size=self.tokenizer.vocab_size,
            max_tokens=config.packer.max_text_tokens,
        )
        pair = start_of_pair(config)
        vision, weights = start_of_tower(config, pair)
        model = replace(start_of_scores(config), vision=vision, text=text)
        if pair is not None:
            check_tokenizer(pair, config.init, self.tokenizer)
            own = replace(pair.config.text, attention=text.attention, drop_path=0.0)
            bias = pair.config.init_logit_bias
            if bias is None:  # a sigmoid loss needs one, and starts it as it would alone
                bias = model.init_logit_bias
            model = replace(pair.config, vision=vision, text=own, init_logit_bias=bias)
        self.config = replace(config, model=model)
        torch.manual_seed(config.seed)
        self.model = CLIP(self.config.model)
        if pair is not None:
            self.model.load_state_dict({**self.model.state_dict(), **pair.state_dict()})
        elif weights is not None:
            self.model.vision.load_state_dict(weights)
        freeze(self.model, config.freeze)
        self.teacher = None if config.teacher is None else Teacher(self.config, world.device)
        if self.teacher is not None:
            check_tokenizer(self.teacher.model, config.teacher, self.tokenizer)

    @property
    def source(self) -> str:
        """The number of shards."""
        return f"{len(self.train_shards)} shards"

    def make_data(self, shards: Sequence[str], stored: Mapping[str, Any] | None) -> TrainData:
        """Stream the pairs of the shards."""
        kind: dict[str, Any] = {"need": "caption", "tokenizer": self.tokenizer}
        return StreamData(self.config, shards, self.world, **kind, stored=stored)

    def loss(
        self, output: Output, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
    ) -> Tensor:
        """Return the contrastive loss; equal captions are not negatives of the softmax.

        With a teacher, how far the two models' similarities are from each other, mixed with it.
        """
        assert isinstance(output, CLIPOutput), "the model is a CLIP"
        own = partial(self._own_loss, output, batches, group)
        if self.teacher is None:
            return own()
        taught, config = self.teacher(batches), self.config
        assert isinstance(taught, CLIPOutput), "the teacher is a CLIP"
        with torch.autocast(output.image.device.type, enabled=False):
            agreed = contrastive_distillation(
                *(output.image, output.text, output.logit_scale),
                *(taught.image, taught.text, taught.logit_scale),
                kl=config.distill_kl,
                chunk_size=config.loss_chunk,
                group=group,
            )
        return mixed_loss(agreed, own, config.distill_weight)

    def _own_loss(
        self, output: CLIPOutput, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
    ) -> Tensor:
        image, text, scale, bias = output.image, output.text, output.logit_scale, output.logit_bias
        chunk_size = self.config.loss_chunk
        with torch.autocast(image.device.type, enabled=False):
            if self.config.contrastive_loss == "sigmoid":
                assert bias is not None, "start_of_scores gives the sigmoid its bias"
                return sigmoid_loss(image, text, scale, bias, chunk_size=chunk_size, group=group)
            ids = text_ids([caption for batch in batches for caption in batch.texts or ()])
            ids = ids.to(image.device, non_blocking=True)
            return contrastive_loss(
                image, text, scale, chunk_size=chunk_size, text_ids=ids, group=group
            )

    def after_step(self) -> None:
        """Bound the multiplier of the similarities."""
        self.model.limit_logit_scale_()

    def evaluate(
        self,
        model: CLIP,
        shards: Sequence[str],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Evaluation:
        """Measure retrieval and caption-prompt accuracy."""
        return evaluate_clip(
            model,
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
        """Return the multiplier of the similarities, and their bias where there is one."""
        found = {"logit_scale": float(self.model.logit_scale.detach())}
        if self.model.logit_bias is not None:
            found["logit_bias"] = float(self.model.logit_bias.detach())
        return found

    def files(self) -> dict[str, str]:
        """Return the tokenizer, and the digest of a teacher."""
        own = {"tokenizer.json": (self.run / "tokenizer.json").read_text()}
        return own | _teacher_files(self.teacher)

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
        self, output: Output, batches: Sequence[PackedBatch], group: dist.ProcessGroup | None
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
        return own | _teacher_files(self.teacher)


def make_task(
    config: TrainConfig, run: Path, train_shards: Sequence[str], world: World | None = None
) -> Task:
    """Return the task a configuration names.

    Args:
        config: The run's settings.
        run: The run folder.
        train_shards: Paths of the shards, or the one folder.
        world: The ranks, all of which call this; None is a process alone, on the CPU.
    """
    world = alone(torch.device("cpu")) if world is None else world
    if config.task == "classify":
        return ClassifyTask(config, train_shards, world)
    if config.task == "masked":
        return MaskedTask(config, train_shards, world)
    return ContrastiveTask(config, run, train_shards, world)


def mixed_loss(agreed: Tensor, own: Callable[[], Tensor], weight: float) -> Tensor:
    """Mix the distance to a teacher with the task's own loss, which is left out at a weight of 1.

    Args:
        agreed: The distance to the teacher.
        own: Computes the task's loss.
        weight: The teacher's share.
    """
    return agreed if weight == 1 else weight * agreed + (1 - weight) * own()


def _teacher_files(teacher: Teacher | None) -> dict[str, str]:
    return {} if teacher is None else {TEACHER_FILE: teacher.digest + "\n"}


def text_ids(texts: Sequence[str]) -> Int64[Tensor, " N"]:
    """Number captions so that equal ones share a number, on every rank and in every batch.

    The numbers are the first 64 bits of a digest: of a million captions two different ones share
    one with a probability of 3e-8.
    """
    digests = b"".join(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))
