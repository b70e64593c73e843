"""Packed batches in, vectors out: the image and text towers and what they are made of."""

from navit.model.clip import CLIP, CLIPOutput
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.model.text import TextTower
from navit.model.vision import NaViT, NaViTOutput

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
