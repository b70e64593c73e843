"""Where public weights come from: a folder, the hub, a model object or a state dict."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from navit.model.vision import CONFIG_FILE, WEIGHTS_FILE

Source = str | Path | nn.Module | Mapping[str, Tensor]
"""A folder, a hub id, a model of transformers or timm, or a state dict."""
Json = Mapping[str, Any]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Found:
    """Weights with all that is known about them."""

    name: str
    """What to call it in messages."""
    config: Json
    """config.json, or the mapping given."""
    weights: Mapping[str, Tensor]
    """The state dict; tensors may be the source's own and are only read."""
    processor: Json = field(default_factory=dict)
    """How images are prepared; empty where it is not known."""
    pad_id: int | None = None
    """Id of the tokenizer's padding token; None where it is not known."""


def read_source(source: Source, config: Json | None = None) -> Found:
    """Read weights and configuration, without changing the source.

    Args:
        source: A folder as ``save_pretrained`` writes it; an id on the Hugging Face hub, which is
            downloaded; a model; or a state dict.
        config: The content of config.json, for a state dict; for other sources it replaces theirs.

    Raises:
        FileNotFoundError: If the folder, or a file it must hold, is missing.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ValueError: If a state dict comes without its configuration.
    """
    if isinstance(source, str | Path):
        return _read_folder(find_folder(source), config)
    if isinstance(source, nn.Module):
        own = getattr(source, "config", None)
        if config is None and own is not None and hasattr(own, "to_dict"):
            config = own.to_dict()
        name, weights = type(source).__name__, dict(source.state_dict())
    else:
        name, weights = "The state dict", dict(source)
    if config is None:
        raise ValueError(
            f"{name} must come with its configuration; got none. Pass config=, the content of the "
            "model's config.json."
        )
    return Found(name, config, weights, processor=config)


def find_folder(source: str | Path) -> Path:
    """Return the folder of a model, downloading it where ``source`` is a hub id.

    Raises:
        FileNotFoundError: If there is no such folder and the name cannot be a hub id.
        ConnectionError: If the hub cannot be reached, or has no such model.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"A model must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or a hub id such as "
            f"'google/siglip2-base-patch16-naflex'; got {str(source)!r}, which is no folder."
        )
    # Imported here: only this needs it, and its import takes a while.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "pytorch_model*"]))
    except Exception as error:  # the hub's, httpx's and the system's have no common class
        raise ConnectionError(
            f"{source!r} is no folder here and could not be downloaded from the Hugging Face hub: "
            f"{error} Check the name; without a network, download the model elsewhere and pass its "
            "folder."
        ) from error
    return folder


def _read_folder(folder: Path, config: Json | None) -> Found:
    if config is None:
        config = read_json(folder / CONFIG_FILE)
        if config is None:
            raise FileNotFoundError(
                f"{folder} must hold {CONFIG_FILE}, as save_pretrained writes it; it is missing."
            )
    processor: Json = {}
    for name in _PROCESSOR_FILES:
        if found := read_json(folder / name):
            processor = found.get("image_processor", found)
            break
    weights = _read_weights(folder)
    return Found(str(folder), config, weights, {**config, **processor}, _read_pad_id(folder))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def stated_tokens(folder: Path) -> int | None:
    """Return the token budget a NaFlex processor's file beside the weights states, if any."""
    for name in _PROCESSOR_FILES:
        stated = read_json(folder / name)
        if stated is not None:
            tokens = {**stated, **stated.get("image_processor", {})}.get("max_num_patches")
            if isinstance(tokens, int):
                return tokens
    return None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read one file or the shards an index lists; safetensors first."""
    for name in (WEIGHTS_FILE, "pytorch_model.bin"):
        index = read_json(folder / f"{name}.index.json")
        files = sorted(set(index["weight_map"].values())) if index else [name]
        if not all((folder / file).is_file() for file in files):
            continue
        weights: dict[str, Tensor] = {}
        for file in files:
            if file.endswith(".safetensors"):
                weights.update(load_file(folder / file))
            else:
                weights.update(torch.load(folder / file, map_location="cpu", weights_only=True))
        return weights
    raise FileNotFoundError(
        f"{folder} must hold {WEIGHTS_FILE}, its shards with their index, or pytorch_model.bin; "
        "there is none."
    )


def _read_pad_id(folder: Path) -> int | None:
    """Find the id of the tokenizer's padding token in its files."""
    described = read_json(folder / "tokenizer_config.json") or {}
    pad = described.get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    if pad is None:
        return None
    for number, token in described.get("added_tokens_decoder", {}).items():
        if token["content"] == pad:
            return int(number)
    tokenizer = read_json(folder / "tokenizer.json") or {}
    for token in tokenizer.get("added_tokens", []):
        if token["content"] == pad:
            return int(token["id"])
    return None


def write_folder(
    folder: str | Path, config: Json, weights: Mapping[str, Tensor], processor: Json | None = None
) -> None:
    """Write config.json and model.safetensors as transformers does, making the folder if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {CONFIG_FILE: config, _PROCESSOR_FILES[0]: processor}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    # transformers reads no file without this.
    save_file(dict(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
