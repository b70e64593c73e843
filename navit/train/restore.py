"""A trained model from a checkpoint folder, without the state that only training needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from navit.evaluate.classify import evaluate_classifier, image_pass
from navit.evaluate.run import Evaluation, evaluate_clip
from navit.model import CLIP, NaViT
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.masked import MaskedConfig, MaskedPredictor
from navit.model.vision import CONFIG_FILE
from navit.serialize import from_plain
from navit.train.checkpoint import find_checkpoint, load_tensors, read_state, stored_tensors
from navit.train.classify import CLASSES_FILE
from navit.train.config import TrainConfig
from navit.train.ema import Ema
from packer.captions import CaptionTokenizer


@dataclass(frozen=True)
class Trained:
    """What evaluation and embedding need of a run."""

    model: CLIP | Classifier | NaViT
    """On the CPU, with the weights asked for; of a masked run the image tower alone."""
    tokenizer: CaptionTokenizer | None
    """The run's tokenizer; None without texts."""
    config: TrainConfig
    """The run's configuration."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, where the run trained on a folder."""

    def evaluate(
        self,
        shards: Sequence[str],
        *,
        sequences_per_batch: int,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        train_metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Evaluation:
        """Evaluate the model on shards of the run's kind.

        The arguments are those of `evaluate_clip` and `evaluate_classifier`.

        Raises:
            ValueError: For a masked run, whose tower has no answers of its own.
        """
        how: dict[str, Any] = {
            "sequences_per_batch": sequences_per_batch,
            "device": device,
            "autocast_dtype": autocast_dtype,
        }
        model, packing = self.model.to(device), self.config.packer
        if isinstance(model, Classifier):
            per_batch = how.pop("sequences_per_batch")
            batches = image_pass(shards, packing, per_batch, classes=self.classes)
            return evaluate_classifier(model, batches, **how)
        if isinstance(model, NaViT):
            raise ValueError(
                "a run of task 'masked' leaves an image tower, without classes or texts; probe it "
                "with labelled images: navit evaluate RUN --shards ... --train-shards ..."
            )
        assert self.tokenizer is not None, "a CLIP is stored with its tokenizer"
        how["train_metadata"] = train_metadata
        return evaluate_clip(model, self.tokenizer, shards, packing, **how)


def load_model(path: Path) -> CLIP | Classifier | NaViT:
    """Load a model whatever wrote it: a run, ``save_pretrained``, or another library.

    Args:
        path: A run folder, one of its checkpoints, or what `navit.pretrained.load` reads.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of an unknown kind.
    """
    try:
        return load_trained(path).model
    except FileNotFoundError:
        pass
    described = path / CONFIG_FILE
    if described.is_file() and json.loads(described.read_text()).get("model") == "Classifier":
        return Classifier.from_pretrained(path)
    from navit.pretrained import load

    return load(path)


def load_trained(path: Path, *, averaged: bool = True) -> Trained:
    """Load the model of a checkpoint.

    Args:
        path: A run folder or one of its checkpoints.
        averaged: Whether to take the running average of the weights, where the run kept one.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    folder = find_checkpoint(path)
    config = from_plain(TrainConfig, read_state(folder)["config"])
    model: CLIP | Classifier | MaskedPredictor
    tokenizer = classes = None
    if config.task == "classify":
        hidden = config.representation_size
        shape = ClassifierConfig(
            config.model.vision, config.num_classes, representation_size=hidden
        )
        model = Classifier(shape)
        if (folder / CLASSES_FILE).exists():
            classes = tuple((folder / CLASSES_FILE).read_text().splitlines())
    elif config.task == "masked":
        model = MaskedPredictor(MaskedConfig(config.model.vision, config.corruption, config.seed))
    else:
        model = CLIP(config.model)
        tokenizer = CaptionTokenizer.from_file(folder / "tokenizer.json")
    load_tensors(folder, {"model": model.state_dict()})  # into the model's own memory
    if averaged and "ema" in stored_tensors(folder):
        average = Ema(model)
        load_tensors(folder, {"ema": average.tensors()})
        average.copy_to(model)
    whole = model.vision.requires_grad_() if isinstance(model, MaskedPredictor) else model
    return Trained(whole, tokenizer, config, classes)
