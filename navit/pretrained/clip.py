"""CLIP of Hugging Face, and back.

Source: CLIP (arXiv:2103.00020). Its class token has a row in the table of positions; as tokens and
positions are only ever added, ours is their sum, and the row of a saved model is zero.
"""

import math
from pathlib import Path
from typing import Any

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
    save_by_rules,
)
from navit.pretrained.source import Found, Json, Source, read_source, write_folder

_SIZES = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VISION = {
    **_SIZES,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
}
_TEXT = {
    **_SIZES,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_LOG_LOGIT_SCALE = 2.6592
_INSTEAD = {"siglip": "load_siglip", "siglip2": "load_siglip2"}
_OTHERS = ("text_model.", "logit_scale", "text_projection.", "visual_projection.")


def load_clip(source: Source, *, config: Json | None = None) -> NaViT:
    """Read the image tower of CLIP, without its projection to the common space.

    Args:
        source: A folder of transformers, a hub id such as "openai/clip-vit-base-patch32", a
            transformers model, or a state dict. It is left unchanged; a text tower is passed over.
        config: The content of config.json, for a state dict.

    Returns:
        The model, in the types the weights have; its vectors are ``pooler_output`` of transformers,
        its tokens ``last_hidden_state`` without the class token, which no norm has seen. Images of
        any other size are what ``interpolate_pos_encoding=True`` makes of them.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ValueError: If it is another kind of model, or tensors are missing or unknown.
    """
    found = read_source(source, config)
    hf.check_kind(found, "clip", _INSTEAD)
    made = _vision_config(found)
    weights = hf.without_buffers(found, "vision_model.", *_OTHERS)
    state = load_by_rules(_vision_rules(made), weights, found.name)
    return build(NaViT, made, state, found.name)


def load_clip_clip(source: Source, *, config: Json | None = None) -> CLIP:
    """Read both towers of CLIP, with projections and logit scale.

    A caption's vector is read at its last token: captions must end with the end token, which in
    transformers is looked for. The multiplier's bound is CLIP's 100, or the stored multiplier if
    that is above it, so that no similarity changes.

    Arguments and errors are those of `load_clip`.
    """
    found = read_source(source, config)
    hf.check_kind(found, "clip", _INSTEAD)
    weights = hf.without_buffers(found)
    start = math.exp(found.config.get("logit_scale_init_value") or _LOG_LOGIT_SCALE)
    stored = float(weights["logit_scale"].exp()) if "logit_scale" in weights else start
    made = CLIPConfig(
        vision=_vision_config(found),
        text=_text_config(found),
        embed_dim=int(found.config.get("projection_dim") or 512),
        init_logit_scale=start,
        # Above the stored multiplier by more than it was rounded.
        max_logit_scale=max(100.0, start, stored * (1 + 1e-6)),
    )
    state = load_by_rules(_clip_rules(made), weights, found.name)
    return build(CLIP, made, state, found.name)


def save_clip(model: NaViT, folder: str | Path) -> None:
    """Write an image tower as transformers' ``CLIPVisionModel``.

    Args:
        model: A model as `load_clip` gives, trained further or not.
        folder: Where config.json, model.safetensors and the image processor's file go.

    Raises:
        ValueError: If transformers' class cannot express the model; the message lists why.
    """
    described = {
        "architectures": ["CLIPVisionModel"],
        "dtype": hf.dtype_of(model),
        **_vision_json(model.config),
    }
    weights = save_by_rules(
        hf.under(_vision_rules(model.config), "", "vision_model."), model.state_dict()
    )
    write_folder(folder, described, weights, _processor(model.config))


def save_clip_clip(model: CLIP, folder: str | Path, *, end_id: int | None = None) -> None:
    """Write both towers as transformers' ``CLIPModel``; see `save_clip`.

    Args:
        model: A model as `load_clip_clip` gives.
        folder: Where the files go.
        end_id: Id of the token that ends every caption, which transformers looks for; None: the
            last of the vocabulary, as in CLIP.

    Raises:
        ValueError: If transformers' class cannot express the model; the message lists why.
    """
    config = model.config
    vision = _vision_json(config.vision)
    hf.check_saveable(
        config, "CLIPModel", {"image_projection": {True}, "text_projection_bias": {False}}
    )
    if model.logit_bias is not None:
        raise ValueError(
            "To be saved as CLIPModel the model must have no logit_bias; got one. Keep it in our "
            "own format with save_pretrained."
        )
    described = {
        "architectures": ["CLIPModel"],
        "dtype": hf.dtype_of(model),
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(config.init_logit_scale),
        "vision_config": vision,
        "text_config": _text_json(config.text, end_id),
    }
    weights = save_by_rules(_clip_rules(config), hf.state_of(model))
    write_folder(folder, described, weights, _processor(config.vision))


def _vision_config(found: Found) -> NaViTConfig:
    theirs = hf.part(found.config, "vision", _VISION)
    pixels = hf.pixel_fields(found, theirs, _MEAN, _STD)
    side = hf.one_side(theirs["image_size"], "image_size") // pixels["patch_size"]
    return NaViTConfig.from_dict(
        {
            **hf.tower_fields(theirs, found.name),
            **pixels,
            "patch_bias": False,
            "pos_embed": "grid",
            "pos_interpolation": "bicubic",
            "pos_table_size": side,
            "pool": "cls",
            "pre_norm": True,
            "norm_after_pool": True,
        }
    )


def _text_config(found: Found) -> TextConfig:
    theirs = hf.part(found.config, "text", _TEXT)
    return TextConfig.from_dict(
        {
            **hf.tower_fields(theirs, found.name),
            "vocab_size": int(theirs["vocab_size"]),
            "max_tokens": int(theirs["max_position_embeddings"]),
            "pool": "last",
            "causal": True,
        }
    )


def _vision_rules(config: NaViTConfig) -> list[Rule]:
    return [
        Rule(
            ("prefix.tokens", "pos_embed.table"),
            ("embeddings.class_embedding", "embeddings.position_embedding.weight"),
            _join_class_token,
            _part_class_token,
        ),
        convolved(
            "patch_embed.proj.weight", "embeddings.patch_embedding.weight", config.patch_size
        ),
        *layer("pre_norm", "pre_layrnorm"),  # spelt so
        *hf.block_rules(config.depth),
        *layer("norm", "post_layernorm"),
    ]


def _join_class_token(tensors: Tensors) -> list[Tensor]:
    token, positions = tensors
    return [(token + positions[0])[None], positions[1:]]


def _part_class_token(tensors: Tensors) -> list[Tensor]:
    tokens, table = tensors
    return [tokens[0], torch.cat([torch.zeros_like(tokens), table])]


def _clip_rules(config: CLIPConfig) -> list[Rule]:
    return [
        *hf.under(_vision_rules(config.vision), "vision.", "vision_model."),
        *hf.under(hf.text_rules(config.text), "text.", "text_model."),
        *layer("image_proj", "visual_projection", bias=False),
        *layer("text_proj", "text_projection", bias=False),
        copied("log_logit_scale", "logit_scale"),
    ]


def _vision_json(config: NaViTConfig) -> dict[str, Any]:
    must = {
        **hf.PLAIN_TOWER,
        "patch_buffer": {None},
        "stem": {None},
        "pos_embed": {"grid"},
        "pos_interpolation": {"bicubic"},
        "pool": {"cls"},
        "patch_bias": {False},
        "num_registers": {0},
        "pre_norm": {True},
        "norm_after_pool": {True},
    }
    hf.check_saveable(config, "CLIPVisionModel", must)
    return {
        "model_type": "clip_vision_model",
        **hf.sizes_of(config),
        "num_channels": 3,
        "patch_size": config.patch_size,
        "image_size": config.pos_table_size * config.patch_size,
    }


def _text_json(config: TextConfig, end_id: int | None) -> dict[str, Any]:
    must = {**hf.PLAIN_TOWER, "pool": {"last"}, "causal": {True}}
    hf.check_saveable(config, "CLIPTextModel", must)
    return {
        "model_type": "clip_text_model",
        **hf.sizes_of(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_tokens,
        "bos_token_id": max(config.vocab_size - 2, 0),
        "eos_token_id": config.vocab_size - 1 if end_id is None else end_id,
    }


def _processor(config: NaViTConfig) -> dict[str, Any]:
    side = config.pos_table_size * config.patch_size
    return hf.processor_of(
        config,
        "CLIPImageProcessor",
        size={"shortest_edge": side},
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        resample=3,
        do_convert_rgb=True,
    )
