"""NaViT: native-resolution vision transformers trained on packed sequences."""

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
    "NaViT",
    "NaViTConfig",
    "NaViTOutput",
    "TextConfig",
    "TextTower",
]
