"""One call for any folder: whose model it is, config.json says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from navit.model.classifier import Classifier
from navit.model.clip import CLIP
from navit.model.masked import MaskedPredictor
from navit.model.vision import CONFIG_FILE, NaViT
from navit.pretrained.clip import load_clip, load_clip_clip
from navit.pretrained.flexivit import load_flexivit
from navit.pretrained.siglip import (
    load_siglip,
    load_siglip2,
    load_siglip2_clip,
    load_siglip_clip,
)
from navit.pretrained.source import find_folder, read_json
from navit.pretrained.timm import load_timm_vit

_OURS: dict[str, Callable[[Path], NaViT | CLIP]] = {
    "NaViT": NaViT.from_pretrained,
    "CLIP": CLIP.from_pretrained,
    "Classifier": lambda folder: Classifier.from_pretrained(folder).vision,
    "MaskedPredictor": lambda folder: MaskedPredictor.from_pretrained(folder).vision,
}
_THEIRS: dict[str, Callable[[str | Path | nn.Module], NaViT | CLIP]] = {
    "siglip2": load_siglip2_clip,
    "siglip2_vision_model": load_siglip2,
    "siglip": load_siglip_clip,
    "siglip_vision_model": load_siglip,
    "clip": load_clip_clip,
    "clip_vision_model": load_clip,
    "timm": load_timm_vit,
}


def load(source: str | Path | nn.Module) -> NaViT | CLIP:
    """Read a model of ours, of Hugging Face (siglip, siglip2, clip), of timm or of big_vision.

    Args:
        source: A folder as ``save_pretrained`` of ours or theirs writes it, recognised by its
            config.json; a hub id; a .npz file of big_vision; or a model of transformers or timm.

    Returns:
        `CLIP` where there are two towers, `NaViT` where there is one; of a `Classifier` or a
        `MaskedPredictor` its tower.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ValueError: If it is another kind of model, or tensors are missing or unknown.
    """
    if isinstance(source, str | Path) and Path(source).suffix == ".npz":
        return load_flexivit(source)
    if isinstance(source, nn.Module):
        kind = getattr(getattr(source, "config", None), "model_type", None)
        is_timm = hasattr(source, "pretrained_cfg")
        name, where = "timm" if is_timm else str(kind), str(type(source).__name__)
        found: Path | nn.Module = source
    else:
        folder = find_folder(source)
        config = read_json(folder / CONFIG_FILE)
        if config is None:
            raise FileNotFoundError(
                f"{folder} must hold {CONFIG_FILE}, as save_pretrained writes it; it is missing."
            )
        if isinstance(config.get("model"), Mapping):  # a run's settings
            raise FileNotFoundError(
                f"{folder} is a training run without a checkpoint. Train it on (navit train "
                "--resume), or give a folder of weights."
            )
        if config.get("model") in _OURS:
            return _OURS[config["model"]](folder)
        name, where, found = _kind_of(config), str(folder), folder
    if name not in _THEIRS:
        raise ValueError(f"{where} must hold one of {[*_OURS, *_THEIRS]}; got {name!r}.")
    return _THEIRS[name](found)


def _kind_of(config: Mapping[str, Any]) -> str:
    if "architecture" in config and "model_type" not in config:
        return "timm"
    return str(config.get("model_type", config.get("model")))
