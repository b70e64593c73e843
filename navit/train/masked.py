"""Masked patch prediction as a task: images without labels, or with any that are not read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from navit.evaluate.classify import image_pass
from navit.evaluate.masked import evaluate_masked
from navit.evaluate.run import Evaluation
from navit.label_loss import mean_over_ranks
from navit.model.clip import CLIPOutput
from navit.model.masked import MaskedConfig, MaskedPredictor
from navit.train.config import TrainConfig
from navit.train.data import TrainData, image_data
from navit.train.ranks import World
from navit.train.setup import is_folder_run
from navit.train.start import start_of_tower
from packer.batch import PackedBatch
from packer.folder import ImageFolder


class MaskedTask:
    """Images alone: a tower that learns to tell the colours of corrupted patches.

    Source: ViT (arXiv:2010.11929), appendix B.1.2.
    """

    tokenizer = None
    couples_images = False

    def __init__(self, config: TrainConfig, train_shards: Sequence[str], world: World) -> None:
        self.world = world
        self.folder = ImageFolder.unlabelled(train_shards[0]) if is_folder_run(config) else None
        self.source = f"{len(train_shards)} shards"
        if self.folder is not None:
            self.source = f"{len(self.folder):,} images"
        vision, weights = start_of_tower(config)
        if vision.pool != "mean":
            self.source += f", pooling {vision.pool!r} not trained"
        self.config = replace(config, model=replace(config.model, vision=vision))
        torch.manual_seed(config.seed)
        self.model = MaskedPredictor(MaskedConfig(vision, config.corruption, config.seed))
        if weights is not None:
            self.model.vision.load_state_dict(weights)

    def make_data(self, shards: Sequence[str], stored: Mapping[str, Any] | None) -> TrainData:
        """Stream the images of the shards, or plan the folder's epochs."""
        return image_data(self.config, shards, self.folder, self.world, need="image", stored=stored)

    def loss(
        self,
        output: CLIPOutput | Tensor,
        batches: Sequence[PackedBatch],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Return the mean of the images' losses, which are what the model returns."""
        assert isinstance(output, Tensor), "the model returns a loss for each image"
        return mean_over_ranks(output.sum(), len(output), group)

    def after_step(self) -> None:
        """Corrupt other patches from now on."""
        self.model.after_step()

    def evaluate(
        self,
        model: MaskedPredictor,
        shards: Sequence[str],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> Evaluation:
        """Measure how often the colour is told."""
        config = self.config
        batches = image_pass(shards, config.packer, config.sequences_per_batch, need="image")
        return evaluate_masked(
            model, batches, device=device, autocast_dtype=autocast_dtype, progress=False
        )

    def readings(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def files(self) -> dict[str, str]:
        """Return nothing."""
        return {}
