"""What the Hugging Face models of this package share: sizes, blocks, checks on the way back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from navit.model.clip import CLIP
from navit.model.config import ModelConfig, NaViTConfig, PerChannel, TextConfig, TransformerConfig
from navit.pretrained.rules import Rule, layer, merged
from navit.pretrained.source import Found, Json

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
"""Names in config.json -> ours."""
SIZES = {
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
"""Fields of ours -> names in config.json."""

PLAIN_TOWER: dict[str, set[Any]] = {
    "biases": {True},
    "qk_norm": {False},
    "layer_scale": {None},
}
"""What every tower of Hugging Face must have."""


def check_kind(found: Found, family: str, instead: Mapping[str, str]) -> None:
    """Refuse a model of another kind, naming the function that reads it.

    Args:
        found: The weights; a configuration without ``model_type`` is taken at its word.
        family: "siglip2", "siglip" or "clip".
        instead: Which function reads which other family.

    Raises:
        ValueError: If the configuration is of another kind.
    """
    kind = found.config.get("model_type")
    if kind not in (None, family, f"{family}_vision_model"):
        other = str(kind).removesuffix("_vision_model")
        hint = f"Read it with {instead[other]}." if other in instead else "It cannot be read here."
        raise ValueError(
            f"{found.name} must have model_type {family!r} or '{family}_vision_model'; got "
            f"{kind!r}. {hint}"
        )


def part(config: Json, name: str, defaults: Json) -> dict[str, Any]:
    """Return the configuration of one tower, "vision" or "text", with what it leaves out.

    Older files hold only what differs from the class's defaults, and CLIP's name a tower twice.
    """
    own = {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
    if not own and f"{name}_config" not in config:
        own = dict(config)  # the file of a tower by itself
    return {**defaults, **{key: value for key, value in own.items() if value is not None}}


def tower_fields(theirs: Json, where: str) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that both towers of all families share.

    Raises:
        ValueError: If the activation is none of ours.
    """
    activation = theirs["hidden_act"]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act of {where} must be one of {sorted(ACTIVATIONS)}; got {activation!r}."
        )
    return {
        **{ours: int(theirs[name]) for ours, name in SIZES.items()},
        "activation": ACTIVATIONS[activation],
        "norm_eps": float(theirs["layer_norm_eps"]),
        "biases": True,
        "qk_norm": False,
    }


def pixel_fields(found: Found, theirs: Json, mean: PerChannel, std: PerChannel) -> dict[str, Any]:
    """Return patch size and normalisation, the image processor's or else the family's.

    Raises:
        ValueError: If the images have other than three channels.
    """
    if theirs.get("num_channels", 3) != 3:
        raise ValueError(
            f"num_channels of {found.name} must be 3; got {theirs['num_channels']}. Other channel "
            "counts are not supported."
        )
    processor = found.processor
    if processor.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return {
        "patch_size": one_side(theirs["patch_size"], "patch_size"),
        "pixel_mean": tuple(map(float, processor.get("image_mean") or mean)),
        "pixel_std": tuple(map(float, processor.get("image_std") or std)),
    }


def one_side(value: int | Sequence[int], name: str) -> int:
    """Return the side of a square that a file names by one number or by two.

    Raises:
        ValueError: If the two differ.
    """
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name} must be that of a square; got {value}.")
    return int(sides.pop())


def square_side(count: int, where: str) -> int:
    """Return the side of a square table of positions.

    Raises:
        ValueError: If it is none.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"The positions of {where} must be a square table; got {count} of them.")
    return side


def block_rules(depth: int) -> list[Rule]:
    """Return the rules of a stack of blocks, the same in all families."""
    rules: list[Rule] = []
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        attention = f"{theirs}.self_attn"
        rules += [
            *layer(f"{ours}.norm1", f"{theirs}.layer_norm1"),
            *merged(f"{ours}.attn.qkv", [f"{attention}.{x}_proj" for x in "qkv"]),
            *layer(f"{ours}.attn.proj", f"{attention}.out_proj"),
            *layer(f"{ours}.norm2", f"{theirs}.layer_norm2"),
            *layer(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
            *layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
        ]
    return rules


def text_rules(config: TextConfig) -> list[Rule]:
    """Return the rules of a text tower, the same in all families."""
    return [
        *layer("token_embed", "embeddings.token_embedding", bias=False),
        *layer("pos_embed", "embeddings.position_embedding", bias=False),
        *block_rules(config.depth),
        *layer("norm", "final_layer_norm"),
    ]


def under(rules: Iterable[Rule], ours: str, theirs: str) -> list[Rule]:
    """Return rules for modules under these prefixes."""
    return [rule.under(ours, theirs) for rule in rules]


def without_buffers(found: Found, prefix: str = "", *others: str) -> dict[str, Any]:
    """Return the weights under a prefix, which bare towers lack, without constants of old files.

    Args:
        found: The weights.
        prefix: What the tower's names start with in a file that holds more than the tower.
        *others: Starts of the names that such a file holds beside it.
    """
    weights = {k: v for k, v in found.weights.items() if not k.endswith(".position_ids")}
    if not prefix or not any(name.startswith(prefix) for name in weights):
        return weights
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if not name.startswith(tuple(others))
    }


def check_saveable(config: ModelConfig, name: str, must: Mapping[str, set[Any]]) -> None:
    """Refuse a model that the other library cannot express.

    Args:
        config: The model's.
        name: What the other library calls such a model.
        must: Field -> the values it may have.

    Raises:
        ValueError: If a field has another value; the message lists them.
    """
    wrong = {}
    for key, allowed in must.items():
        value = getattr(config, key)
        if value not in allowed:
            wrong[key] = value
    if wrong:
        needed = {key: sorted(must[key], key=str) for key in wrong}
        hint = " (at_patch_size makes it one of a fixed size)" if "patch_buffer" in wrong else ""
        raise ValueError(
            f"To be saved as {name} the model must have {needed}; got {wrong}{hint}. Keep it in "
            "our own format with save_pretrained."
        )


def sizes_of(config: TransformerConfig) -> dict[str, Any]:
    """Return the part of a tower's config.json that all families share."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "hidden_act": names[config.activation],
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }


def processor_of(config: NaViTConfig, kind: str, **more: Any) -> dict[str, Any]:
    """Return the image processor's file, which is where mean and deviation are kept."""
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
        **more,
    }


def dtype_of(model: nn.Module) -> str:
    """Return the name of the type most of a model's weights have."""
    names = [str(p.dtype).removeprefix("torch.") for p in model.parameters()]
    return max(set(names), key=names.count)


def state_of(model: CLIP) -> dict[str, Tensor]:
    """Return a model's weights, with the multiplier of the similarities as it is applied."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if model.config.max_logit_scale is not None:
        bound = math.log(model.config.max_logit_scale)
        state["log_logit_scale"] = state["log_logit_scale"].clamp(max=bound)
    return state
