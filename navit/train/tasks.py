"""What a run learns: a model, its loss on a batch, and what is measured of it.

The loop knows nothing of captions or classes; it asks a task.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from navit.evaluate.run import Evaluation
from navit.model.clip import CLIPOutput
from navit.model.vision import PretrainedModel
from navit.train.classify import ClassifyTask
from navit.train.config import TrainConfig
from navit.train.contrastive import ContrastiveTask
from navit.train.data import TrainData
from navit.train.masked import MaskedTask
from navit.train.ranks import World, alone
from packer.batch import PackedBatch
from packer.captions import CaptionTokenizer

Output = CLIPOutput | Tensor
"""What a task's model returns for a batch."""


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
