"""Tiny models of transformers with random weights, and what they make of one image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from navit import CLIP, NaViT, pretrained
from tests.helpers.batches import RandomImage

PATCH, SIDE, VOCABULARY, MAX_TOKENS = 4, 3, 60, 64
END_ID = VOCABULARY - 1
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Family:
    """A family's classes, in transformers and here."""

    model: Any
    vision_model: Any
    config: Any
    load: Callable[..., NaViT]
    load_clip: Callable[..., CLIP]
    save: Callable[..., None]
    save_clip: Callable[..., None]
    places: dict[str, int]
    """How config.json tells the size of the table of positions."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


FAMILIES = {
    "siglip2": Family(
        Siglip2Model,
        Siglip2VisionModel,
        Siglip2Config,
        pretrained.load_siglip2,
        pretrained.load_siglip2_clip,
        pretrained.save_siglip2,
        pretrained.save_siglip2_clip,
        {"num_patches": SIDE**2},
    ),
    "siglip": Family(
        SiglipModel,
        SiglipVisionModel,
        SiglipConfig,
        pretrained.load_siglip,
        pretrained.load_siglip_clip,
        pretrained.save_siglip,
        pretrained.save_siglip_clip,
        {"image_size": SIDE * PATCH},
    ),
    "clip": Family(
        CLIPModel,
        CLIPVisionModel,
        CLIPConfig,
        pretrained.load_clip,
        pretrained.load_clip_clip,
        pretrained.save_clip,
        pretrained.save_clip_clip,
        {"image_size": SIDE * PATCH},
        OPENAI_MEAN,
        OPENAI_STD,
    ),
}


def make_config(name: str, **vision: Any) -> Any:
    """Return the configuration of both towers; ``vision`` changes the image tower's."""
    family = FAMILIES[name]
    text = {
        **_SIZES,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": END_ID,
        "pad_token_id": 1,
    }
    more = {"projection_dim": 24} if name == "clip" else {}
    return family.config(
        vision_config={**_SIZES, "patch_size": PATCH, **family.places, **vision},
        text_config=text,
        **more,
    )


def make_model(name: str, seed: int = 0, **vision: Any) -> Any:
    """Make a model all of whose parameters are random: fresh norms and biases hide mistakes."""
    model = FAMILIES[name].model(make_config(name, **vision)).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter, of about the size it has in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("logit_scale", "logit_bias")):
            parameter.fill_(4.2 if name.endswith("scale") else -7.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim < 2 or "embed" in name or "token" in name or "probe" in name:
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def pixels_of(image: RandomImage, family: Family, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise an image's patches: (n, P)."""
    mean, std = (torch.tensor(x, dtype=dtype) for x in (family.mean, family.std))
    return ((image.patches.to(dtype).unflatten(1, (-1, 3)) / 255 - mean) / std).flatten(1)


def as_image(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put patches (rows * cols, P) together: (1, 3, H, W)."""
    rows, cols = grid
    image = pixels.view(rows, cols, PATCH, PATCH, 3).permute(4, 0, 2, 1, 3)
    return image.reshape(1, 3, rows * PATCH, cols * PATCH)


def image_arguments(image: RandomImage, name: str) -> dict[str, Any]:
    """Return what transformers' model takes for one image by itself."""
    pixels = pixels_of(image, FAMILIES[name])
    if name == "siglip2":
        return {
            "pixel_values": pixels[None],
            "pixel_attention_mask": torch.ones(1, len(pixels), dtype=torch.int32),
            "spatial_shapes": torch.tensor([image.grid]),
        }
    return {"pixel_values": as_image(pixels, image.grid), "interpolate_pos_encoding": True}


def encode_alone(tower: Any, image: RandomImage, name: str) -> tuple[Tensor, Tensor]:
    """Run transformers' image tower on one image: its vector (D,) and its patches' tokens."""
    output = tower(**image_arguments(image, name))
    tokens = output.last_hidden_state[0]
    return output.pooler_output[0], tokens[1:] if name == "clip" else tokens
