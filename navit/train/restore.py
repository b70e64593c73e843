"""A trained model from a checkpoint folder, without the state that only training needs."""

from dataclasses import dataclass
from pathlib import Path

from navit.model import CLIP
from navit.serialize import from_plain
from navit.train.checkpoint import find_checkpoint, load_checkpoint
from navit.train.config import TrainConfig
from navit.train.ema import Ema
from packer.captions import CaptionTokenizer


@dataclass(frozen=True)
class Trained:
    """What evaluation and embedding need of a run."""

    model: CLIP
    """On the CPU, with the weights asked for."""
    tokenizer: CaptionTokenizer
    """The run's tokenizer."""
    config: TrainConfig
    """The run's configuration."""


def load_trained(path: Path, *, averaged: bool = True) -> Trained:
    """Load the model of a checkpoint.

    Args:
        path: A run folder or one of its checkpoints.
        averaged: Whether to take the running average of the weights, where the run kept one.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    folder = find_checkpoint(path)
    checkpoint = load_checkpoint(folder, groups=("model", "ema"))
    config = from_plain(TrainConfig, checkpoint.state["config"])
    model = CLIP(config.model)
    model.load_state_dict(checkpoint.tensors["model"])
    if averaged and "ema" in checkpoint.tensors:
        average = Ema(model)
        average.load_tensors(checkpoint.tensors["ema"])
        average.copy_to(model)
    return Trained(model, CaptionTokenizer.from_file(folder / "tokenizer.json"), config)
