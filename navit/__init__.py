"""The vision side of NaViT: models that read a `packer.PackedBatch`.

The names are imported when first used: `navit --help` need not wait for torch, and the command line
can still set what torch reads when it is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from navit.embed import EmbedConfig, Embedder, embed_images
    from navit.model import (
        CLIP,
        CLIPConfig,
        CLIPOutput,
        NaViT,
        NaViTConfig,
        NaViTOutput,
        TextConfig,
        TextTower,
    )

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPOutput",
    "EmbedConfig",
    "Embedder",
    "NaViT",
    "NaViTConfig",
    "NaViTOutput",
    "TextConfig",
    "TextTower",
    "embed_images",
]


def __getattr__(name: str) -> Any:
    if name == "pretrained":
        return import_module("navit.pretrained")
    if name not in __all__:
        raise AttributeError(f"module 'navit' has no attribute {name!r}")
    return getattr(import_module("navit.embed" if "mbed" in name else "navit.model"), name)
