"""A checkpoint of any kind -> the model, and what it says of the images it was trained on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from packer.config import PackerConfig


@dataclass(frozen=True)
class Loaded:
    """A model with what is known of its images."""

    model: nn.Module
    """On the CPU."""
    packing: PackerConfig | None = None
    """Packing of the run that trained it; None for weights alone."""
    max_tokens: int | None = None
    """Token budget its processor states; None where it states none."""


def load_source(source: str | Path, *, averaged: bool = True) -> Loaded:
    """Load a checkpoint.

    Args:
        source: A run folder or one of its checkpoints; a folder of weights as ``save_pretrained``
            of ours or of Hugging Face (SigLIP 2, SigLIP, CLIP) writes it; a FlexiViT's .npz; or a
            hub id.
        averaged: Of a run, whether to take the running average of the weights.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ValueError: If the model is of a kind that is not known.
    """
    # Imported here, as a model that is given needs neither.
    from navit.pretrained.load import load
    from navit.pretrained.source import find_folder, stated_tokens
    from navit.train.checkpoint import find_checkpoint
    from navit.train.restore import load_trained

    path = Path(source)
    try:
        find_checkpoint(path)
    except FileNotFoundError:
        if path.suffix == ".npz":
            return Loaded(load(path))
        if path.is_dir() and not (path / "config.json").is_file():
            raise FileNotFoundError(
                "a checkpoint must be a run folder, or a folder of weights with a config.json; "
                f"{path} is neither. Check the path."
            ) from None
        folder = find_folder(source)
        return Loaded(load(folder), max_tokens=stated_tokens(folder))
    trained = load_trained(path, averaged=averaged)
    return Loaded(trained.model, trained.config.packer)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
