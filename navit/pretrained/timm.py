"""Vision transformers of timm, and back: class token, average and attention pooling, registers.

Its FlexiViT is one: FlexiViT's weights and positions, resized to patches of 16 pixels on images of
240, with a class token without a position.

Only a folder or hub id of timm's needs timm, for what the name of its architecture implies. What a
state dict cannot tell is a small mapping.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from navit.model.config import NaViTConfig
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
)
from navit.pretrained.source import Json, Source, write_folder
from navit.pretrained.timm_source import MEAN, STD, find, with_biases

_POOLS = {"token": "cls", "avg": "mean", "map": "map"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch32_clip_224"}
"""Layer norm epsilon, which JSON cannot pass to timm, -> an architecture that has it; everything
else about the model is passed."""
_CLASSIFIER = "head."


def load_timm_vit(source: Source, *, config: Json | None = None) -> NaViT:
    """Read a ``VisionTransformer`` of timm, without its classifier.

    Args:
        source: A model made by ``timm.create_model``; a folder or hub id as timm writes it; or a
            state dict. It is left unchanged.
        config: For a state dict, or a folder without timm installed: ``num_heads``, and where they
            differ from the defaults ``global_pool`` ("map" with an attention pool, "avg" with
            ``fc_norm``, else "token"), ``act_layer`` ("gelu"), ``norm_eps`` (1e-6),
            ``no_embed_class``, ``mean`` and ``std`` (ImageNet's). They go before what a folder or a
            model says.

    Returns:
        The model, in the types the weights have; its vectors are
        ``forward_head(..., pre_logits=True)`` of timm, its tokens ``forward_features`` without the
        class token and registers. Positions are interpolated as by ``dynamic_img_size=True``. A
        class token that is not pooled counts as a register.

    Raises:
        FileNotFoundError: If a folder or one of its files is missing.
        ConnectionError: If the hub cannot be reached, or has no such model.
        ImportError: If timm is needed to tell what an architecture is, and not installed.
        ValueError: If the model is of another kind, or tensors are missing or unknown.
    """
    found, settings = find(source, config or {})
    weights = {k: v for k, v in found.weights.items() if not k.startswith(_CLASSIFIER)}
    weights = with_biases(weights)
    made = _config(weights, settings, found.name)
    rules = _rules(made, weights, has_prefix_rows=_has_prefix_rows(weights, settings))
    return build(NaViT, made, load_by_rules(rules, weights, found.name), found.name)


def save_timm_vit(model: NaViT, folder: str | Path) -> None:
    """Write an image tower for ``timm.create_model("local-dir:<folder>", pretrained=True)``.

    Args:
        model: A model as `load_timm_vit` gives, trained further or not. Its positions are saved
            without rows for the class token and the registers, which are part of these.
        folder: Where config.json and model.safetensors go.

    Raises:
        ValueError: If timm's class cannot express the model; the message lists why.
    """
    config = model.config
    must: dict[str, set[Any]] = {
        "biases": {True},
        "patch_buffer": {None},
        "stem": {None},
        "pos_embed": {"grid"},
        "pos_interpolation": {"bicubic_antialias"},
        "pool_mlp": {True},
        "patch_bias": {False} if config.pre_norm else {None, True},
        "norm_eps": set(_ARCHITECTURES),
    }
    hf.check_saveable(config, "a timm VisionTransformer", must)
    state = model.state_dict()
    weights = save_by_rules(_rules(config, None, has_prefix_rows=False), state)
    write_folder(folder, _json(config), weights)


def _prefix_names(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in ("cls_token", "reg_token") if name in weights]


def _has_prefix_rows(weights: Mapping[str, Tensor], settings: Json) -> bool:
    """Whether the first rows of the positions are those of the class token and registers."""
    if "no_embed_class" in settings:
        return not settings["no_embed_class"]
    rows = weights["pos_embed"].shape[1] if "pos_embed" in weights else 0
    return bool(_prefix_names(weights)) and int(rows**0.5) ** 2 != rows


def _config(weights: Mapping[str, Tensor], settings: Json, where: str) -> NaViTConfig:
    """Read the configuration off the shapes and the settings."""
    lacking = [k for k in ("patch_embed.proj.weight", "pos_embed") if k not in weights]
    blocks = {int(k.split(".")[1]) for k in weights if k.startswith("blocks.")}
    first = weights.get("blocks.0.mlp.fc1.weight")
    if lacking or first is None:
        raise ValueError(
            f"{where} must hold a timm VisionTransformer with learned positions; missing "
            f"{lacking or ['blocks.0.mlp.fc1.weight']}."
        )
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    count = sum(weights[name].shape[1] for name in _prefix_names(weights))
    rows = weights["pos_embed"].shape[1] - count * _has_prefix_rows(weights, settings)
    pool = _POOLS.get(_global_pool(weights, settings, where))
    act = settings.get("act_layer", "gelu")
    if pool is None or act not in _ACTIVATIONS:
        raise ValueError(
            f"{where} must have global_pool in {sorted(_POOLS)} and act_layer in "
            f"{sorted(_ACTIVATIONS)}; got {_global_pool(weights, settings, where)!r} and {act!r}."
        )
    scaled = "blocks.0.ls1.gamma" in weights
    return NaViTConfig.from_dict(
        {
            "width": width,
            "depth": len(blocks),
            "num_heads": int(settings["num_heads"]),
            "mlp_dim": len(first),
            "biases": True,
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
            "activation": _ACTIVATIONS[act],
            "norm_eps": float(settings.get("norm_eps", 1e-6)),
            "layer_scale": float(settings.get("init_values") or 1e-5) if scaled else None,
            "patch_size": patch_size,
            "patch_bias": None if "patch_embed.proj.bias" in weights else False,
            "pixel_mean": tuple(map(float, settings.get("mean", MEAN))),
            "pixel_std": tuple(map(float, settings.get("std", STD))),
            "pos_embed": "grid",
            "pos_interpolation": "bicubic_antialias",
            "pos_table_size": hf.square_side(rows, where),
            "pool": pool,
            "num_registers": count - (pool == "cls"),
            "pre_norm": "norm_pre.weight" in weights,
            "norm_after_pool": "fc_norm.weight" in weights,
        }
    )


def _global_pool(weights: Mapping[str, Tensor], settings: Json, where: str) -> str:
    has_pool = "attn_pool.latent" in weights
    guess = "map" if has_pool else "avg" if "fc_norm.weight" in weights else "token"
    pool = str(settings.get("global_pool", guess))
    if (pool == "map") != has_pool or (pool == "token" and "cls_token" not in weights):
        raise ValueError(
            f"global_pool of {where} must fit its tensors ('map': attn_pool, 'token': cls_token); "
            f"got {pool!r}. Pass config={{'global_pool': ...}}."
        )
    return pool


def _rules(
    config: NaViTConfig, weights: Mapping[str, Tensor] | None, *, has_prefix_rows: bool
) -> list[Rule]:
    """Return the rules of a model; without ``weights`` those of one that is to be saved."""
    if weights is None:
        is_there = {"cls_token": config.pool == "cls", "reg_token": config.num_registers > 0}
        prefix = [name for name, there in is_there.items() if there]
    else:
        prefix = _prefix_names(weights)
    rules = [
        convolved("patch_embed.proj.weight", "patch_embed.proj.weight", config.patch_size),
        *([] if config.patch_bias is False else [copied(*["patch_embed.proj.bias"] * 2)]),
        _prefix_rule(prefix, has_prefix_rows),
        *(layer("pre_norm", "norm_pre") if config.pre_norm else []),
        *layer("norm", "fc_norm" if config.norm_after_pool else "norm"),
    ]
    for i in range(config.depth):
        rules += _block_rules(f"blocks.{i}", config)
    return rules + _pool_rules() if config.pool == "map" else rules


def _prefix_rule(prefix: list[str], has_prefix_rows: bool) -> Rule:
    """Class token and registers with the positions, whose first rows may be theirs."""
    if not prefix:
        return Rule(
            ("pos_embed.table",), ("pos_embed",), lambda t: [t[0][0]], lambda t: [t[0][None]]
        )

    def load(tensors: Tensors) -> list[Tensor]:
        tokens, positions = torch.cat([t[0] for t in tensors[:-1]]), tensors[-1][0]
        if not has_prefix_rows:
            return [tokens, positions]
        return [tokens + positions[: len(tokens)], positions[len(tokens) :]]

    def save(tensors: Tensors) -> list[Tensor]:
        tokens, table = tensors[0][None], tensors[1][None]
        count = 1 if prefix[0] == "cls_token" else 0
        parts = {"cls_token": tokens[:, :count], "reg_token": tokens[:, count:]}
        return [*(parts[name] for name in prefix), table]

    return Rule(("prefix.tokens", "pos_embed.table"), (*prefix, "pos_embed"), load, save)


def _block_rules(name: str, config: NaViTConfig) -> list[Rule]:
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    if config.qk_norm:
        parts += ["attn.q_norm", "attn.k_norm"]
    rules = [rule for part in parts for rule in layer(f"{name}.{part}", f"{name}.{part}")]
    if config.layer_scale is not None:
        rules += [copied(f"{name}.branch{i}.scale", f"{name}.ls{i}.gamma") for i in (1, 2)]
    return rules


def _pool_rules() -> list[Rule]:
    return [
        reshaped("pool.probe", "attn_pool.latent", 1, 1, -1),
        *layer("pool.q", "attn_pool.q"),
        *(
            Rule((f"pool.k.{part}", f"pool.v.{part}"), (f"attn_pool.kv.{part}",), _halves, _joined)
            for part in ("weight", "bias")
        ),
        *layer("pool.proj", "attn_pool.proj"),
        *layer("pool.norm", "attn_pool.norm"),
        *layer("pool.mlp.fc1", "attn_pool.mlp.fc1"),
        *layer("pool.mlp.fc2", "attn_pool.mlp.fc2"),
    ]


def _halves(tensors: Tensors) -> Tensors:
    return tensors[0].chunk(2)


def _joined(tensors: Tensors) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _json(config: NaViTConfig) -> dict[str, Any]:
    side = config.pos_table_size * config.patch_size
    pool = {ours: theirs for theirs, ours in _POOLS.items()}[config.pool]
    ratio = config.mlp_dim / config.width
    if int(config.width * ratio) != config.mlp_dim:  # timm rounds down
        ratio = (config.mlp_dim + 0.5) / config.width
    arguments = {
        "img_size": side,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,
        "class_token": config.pool == "cls",
        "reg_tokens": config.num_registers,
        "no_embed_class": True,
        "pre_norm": config.pre_norm,
        "fc_norm": config.norm_after_pool,
        "global_pool": pool,
        "act_layer": config.activation,
    }
    return {
        "architecture": _ARCHITECTURES[config.norm_eps],
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": pool,
        "norm_eps": config.norm_eps,
        "model_args": {name: value for name, value in arguments.items() if value is not None},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    }
