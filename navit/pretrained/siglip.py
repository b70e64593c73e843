"""SigLIP and SigLIP 2 of Hugging Face, and back.

The two differ in how a patch is embedded (convolution; linear layer) and in how positions are
interpolated (bicubic; bilinear with antialias). Source: SigLIP (arXiv:2303.15343), SigLIP 2
(arXiv:2502.14786), whose NaFlex variants are `load_siglip2`'s; its checkpoints of one fixed
resolution have SigLIP's architecture and are `load_siglip`'s.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from navit.model.clip import CLIP
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.model.vision import NaViT
from navit.pretrained import hf
from navit.pretrained.rules import (
    Rule,
    Tensors,
    build,
    convolved,
    copied,
    layer,
    load_by_rules,
    reshaped,
    save_by_rules,
    scalar,
)
from navit.pretrained.source import Found, Json, Source, read_source, write_folder

Family = Literal["siglip", "siglip2"]

_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_VISION = {
    **_SIZES,
    "patch_size": 16,
    "image_size": 224,
    "num_patches": 256,
    "vision_use_head": True,
}
_TEXT = {**_SIZES, "vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1}
_HALVES = (0.5, 0.5, 0.5)
_INSTEAD = {
    "siglip": "load_siglip, also for the SigLIP 2 checkpoints of one fixed resolution",
    "siglip2": "load_siglip2",
    "clip": "load_clip",
}
_OTHERS = ("text_model.", "logit_scale", "logit_bias")
_GEMMA_VOCABULARY = 256_000
_CLASS = {"siglip": "Siglip", "siglip2": "Siglip2"}
_INTERPOLATION = {"siglip": "bicubic", "siglip2": "antialias"}


def load_siglip2(source: Source, *, config: Json | None = None) -> NaViT:
    """Read the image tower of SigLIP 2 NaFlex, with its attention pooling.

    Args:
        source: A folder of transformers, a hub id such as "google/siglip2-base-patch16-naflex", a
            transformers model, or a state dict. It is left unchanged; a text tower is passed over.
        config: The content of config.json, for a state dict.

    Returns:
        The model, in the types the weights have; its vectors are ``pooler_output`` of transformers,
        its tokens ``last_hidden_state``. Without a pooling head it pools by the mean. Images one
        patch wide differ from transformers on the CPU, where torch (2.13) resizes the positions of
        a single column wrongly.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ValueError: If it is another kind of model, or tensors are missing or unknown.
    """
    return _load_vision(source, config, "siglip2")


def load_siglip(source: Source, *, config: Json | None = None) -> NaViT:
    """Read the image tower of SigLIP, or of a SigLIP 2 checkpoint of one fixed resolution.

    Arguments, result and errors are those of `load_siglip2`; images of any other size are what
    ``interpolate_pos_encoding=True`` of transformers makes of them.
    """
    return _load_vision(source, config, "siglip")


def load_siglip2_clip(source: Source, *, config: Json | None = None) -> CLIP:
    """Read both towers of SigLIP 2 NaFlex.

    Captions are filled up to `TextConfig.max_tokens` with the padding token, as in training, and
    read at the last place. The token is that of the tokenizer's files where the folder has them;
    else 0 for SigLIP 2, whose config.json is wrong about it, and ``pad_token_id`` for SigLIP.

    Arguments and errors are those of `load_siglip2`.
    """
    return _load_clip(source, config, "siglip2")


def load_siglip_clip(source: Source, *, config: Json | None = None) -> CLIP:
    """Read both towers of SigLIP; see `load_siglip2_clip`."""
    return _load_clip(source, config, "siglip")


def save_siglip2(model: NaViT, folder: str | Path) -> None:
    """Write an image tower as transformers' ``Siglip2VisionModel``.

    Args:
        model: A model as `load_siglip2` gives, trained further or not.
        folder: Where config.json, model.safetensors and the image processor's file go.

    Raises:
        ValueError: If transformers' class cannot express the model; the message lists why.
    """
    _save_vision(model, folder, "siglip2")


def save_siglip(model: NaViT, folder: str | Path) -> None:
    """Write an image tower as transformers' ``SiglipVisionModel``; see `save_siglip2`."""
    _save_vision(model, folder, "siglip")


def save_siglip2_clip(model: CLIP, folder: str | Path) -> None:
    """Write both towers as transformers' ``Siglip2Model``; see `save_siglip2`."""
    _save_clip(model, folder, "siglip2")


def save_siglip_clip(model: CLIP, folder: str | Path) -> None:
    """Write both towers as transformers' ``SiglipModel``; see `save_siglip2`."""
    _save_clip(model, folder, "siglip")


def _load_vision(source: Source, config: Json | None, family: Family) -> NaViT:
    found = read_source(source, config)
    hf.check_kind(found, family, _INSTEAD)
    made = _vision_config(found, family)
    weights = hf.without_buffers(found, "vision_model.", *_OTHERS)
    state = load_by_rules(_vision_rules(made, family), weights, found.name)
    return build(NaViT, made, state, found.name)


def _load_clip(source: Source, config: Json | None, family: Family) -> CLIP:
    found = read_source(source, config)
    hf.check_kind(found, family, _INSTEAD)
    vision = _vision_config(found, family)
    made = CLIPConfig(
        vision=vision,
        text=_text_config(found, family),
        embed_dim=vision.width,
        image_projection=False,
        text_projection_bias=True,
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
        max_logit_scale=None,
    )
    state = load_by_rules(_clip_rules(made, family), hf.without_buffers(found), found.name)
    return build(CLIP, made, state, found.name)


def _vision_config(found: Found, family: Family) -> NaViTConfig:
    theirs = hf.part(found.config, "vision", _VISION)
    pixels = hf.pixel_fields(found, theirs, _HALVES, _HALVES)
    if family == "siglip2":
        side = hf.square_side(int(theirs["num_patches"]), found.name)
    else:
        side = hf.one_side(theirs["image_size"], "image_size") // pixels["patch_size"]
    return NaViTConfig.from_dict(
        {
            **hf.tower_fields(theirs, found.name),
            **pixels,
            "pos_embed": "grid",
            "pos_interpolation": _INTERPOLATION[family],
            "pos_table_size": side,
            "pool": "map" if theirs["vision_use_head"] else "mean",
        }
    )


def _text_config(found: Found, family: Family) -> TextConfig:
    theirs = hf.part(found.config, "text", _TEXT)
    pad_id = found.pad_id
    if pad_id is None:
        pad_id = int(theirs["pad_token_id"])
        gemma = family == "siglip2" or theirs["vocab_size"] >= _GEMMA_VOCABULARY
        if gemma and pad_id == _TEXT["pad_token_id"]:  # the class's default, not the tokenizer's
            pad_id = 0
    return TextConfig.from_dict(
        {
            **hf.tower_fields(theirs, found.name),
            "vocab_size": int(theirs["vocab_size"]),
            "max_tokens": int(theirs["max_position_embeddings"]),
            "pool": "last",
            "pad_id": pad_id,
        }
    )


def _vision_rules(config: NaViTConfig, family: Family) -> list[Rule]:
    embedding = "embeddings.patch_embedding"
    if family == "siglip2":
        rules = layer("patch_embed.proj", embedding)
    else:
        rules = [
            convolved("patch_embed.proj.weight", f"{embedding}.weight", config.patch_size),
            copied("patch_embed.proj.bias", f"{embedding}.bias"),
        ]
    rules += [
        copied("pos_embed.table", "embeddings.position_embedding.weight"),
        *hf.block_rules(config.depth),
        *layer("norm", "post_layernorm"),
    ]
    return rules + _head_rules() if config.pool == "map" else rules


def _head_rules() -> list[Rule]:
    return [
        reshaped("pool.probe", "head.probe", 1, 1, -1),
        *(
            Rule(
                tuple(f"pool.{name}.{part}" for name in "qkv"),
                (f"head.attention.in_proj_{part}",),
                _chunk,
                _cat,
            )
            for part in ("weight", "bias")
        ),
        *layer("pool.proj", "head.attention.out_proj"),
        *layer("pool.norm", "head.layernorm"),
        *layer("pool.mlp.fc1", "head.mlp.fc1"),
        *layer("pool.mlp.fc2", "head.mlp.fc2"),
    ]


def _chunk(tensors: Tensors) -> Tensors:
    return tensors[0].chunk(3)


def _cat(tensors: Tensors) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _clip_rules(config: CLIPConfig, family: Family) -> list[Rule]:
    return [
        *hf.under(_vision_rules(config.vision, family), "vision.", "vision_model."),
        *hf.under(hf.text_rules(config.text), "text.", "text_model."),
        *layer("text_proj", "text_model.head"),
        scalar("log_logit_scale", "logit_scale"),
        scalar("logit_bias", "logit_bias"),
    ]


def _save_vision(model: NaViT, folder: str | Path, family: Family) -> None:
    config = model.config
    described = {
        "architectures": [f"{_CLASS[family]}VisionModel"],
        "dtype": hf.dtype_of(model),
        **_vision_json(config, family),
    }
    rules = hf.under(_vision_rules(config, family), "", "vision_model.")
    weights = save_by_rules(rules, model.state_dict())
    write_folder(folder, described, weights, _processor(config, family))


def _save_clip(model: CLIP, folder: str | Path, family: Family) -> None:
    config = model.config
    name = f"{_CLASS[family]}Model"
    vision = _vision_json(config.vision, family)
    hf.check_saveable(config, name, {"image_projection": {False}, "text_projection_bias": {True}})
    if model.logit_bias is None:
        raise ValueError(
            f"To be saved as {name} the model must have a logit_bias; got none. Set "
            "CLIPConfig(init_logit_bias=...), or keep it in our own format with save_pretrained."
        )
    described = {
        "architectures": [name],
        "dtype": hf.dtype_of(model),
        "model_type": family,
        "vision_config": vision,
        "text_config": _text_json(config.text, family, config.embed_dim),
    }
    weights = save_by_rules(_clip_rules(config, family), hf.state_of(model))
    write_folder(folder, described, weights, _processor(config.vision, family))


def _vision_json(config: NaViTConfig, family: Family) -> dict[str, Any]:
    must = {
        **hf.PLAIN_TOWER,
        "patch_buffer": {None},
        "stem": {None},
        "pos_embed": {"grid"},
        "pos_interpolation": {_INTERPOLATION[family]},
        "pool": {"map", "mean"},
        "pool_mlp": {True},
        "patch_bias": {None, True},
        "num_registers": {0},
        "pre_norm": {False},
        "norm_after_pool": {False},
    }
    hf.check_saveable(config, f"{_CLASS[family]}VisionModel", must)
    side = config.pos_table_size
    places = {
        "siglip2": {"num_patches": side**2},
        "siglip": {"image_size": side * config.patch_size},
    }
    return {
        "model_type": f"{family}_vision_model",
        **hf.sizes_of(config),
        "num_channels": 3,
        "patch_size": config.patch_size,
        **places[family],
        "vision_use_head": config.pool == "map",
    }


def _text_json(config: TextConfig, family: Family, projection_size: int) -> dict[str, Any]:
    must = {**hf.PLAIN_TOWER, "pool": {"last"}, "causal": {False}}
    hf.check_saveable(config, f"{_CLASS[family]}TextModel", must)
    return {
        "model_type": f"{family}_text_model",
        **hf.sizes_of(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_tokens,
        "projection_size": projection_size,
        "pad_token_id": config.pad_id,
    }


def _processor(config: NaViTConfig, family: Family) -> dict[str, Any]:
    if family == "siglip2":
        more: dict[str, Any] = {
            "patch_size": config.patch_size,
            "max_num_patches": config.pos_table_size**2,
            "resample": 2,
        }
    else:
        side = config.pos_table_size * config.patch_size
        more = {"size": {"height": side, "width": side}, "resample": 3}
    return hf.processor_of(config, f"{_CLASS[family]}ImageProcessor", **more)
