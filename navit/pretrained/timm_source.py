"""What a timm model is beyond its weights: read off the model, its folder, or its architecture."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from navit.model.config import PerChannel
from navit.pretrained.source import Found, Json, Source, read_source

MEAN: PerChannel = (0.485, 0.456, 0.406)
STD: PerChannel = (0.229, 0.224, 0.225)
_ACTIVATION_CLASSES = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def find(source: Source, config: Json) -> tuple[Found, dict[str, Any]]:
    """Return the weights and the settings, asking timm where nothing else tells them."""
    if isinstance(source, Mapping):
        found = read_source(source, config)
        if "num_heads" not in config:
            raise ValueError(
                "The configuration of a timm state dict must tell num_heads; got "
                f"{sorted(config) or 'none'}. Pass config={{'num_heads': ...}}."
            )
        return found, _settings(config)
    if not isinstance(source, nn.Module):
        found = read_source(source.removeprefix("hf-hub:") if isinstance(source, str) else source)
        settings = {**_settings(found.config), **config}
        # Ours is complete; timm's own leaves to the architecture's name what that implies.
        if "num_heads" in config or {"num_heads", "norm_eps"} <= settings.keys():
            return found, settings
        source = _create(found)
    described = {**describe(source), **config}
    return read_source(source, described), described


def describe(model: nn.Module) -> dict[str, Any]:
    """Read off a timm model what its weights do not tell."""
    vit: Any = model
    kinds = [type(block).__name__ for block in getattr(vit, "blocks", [])]
    if set(kinds) != {"Block"} or type(getattr(vit, "patch_embed", None)).__name__ != "PatchEmbed":
        raise ValueError(
            "The model must be a timm VisionTransformer with standard blocks and patch embedding; "
            f"got {type(model).__name__} with {sorted(set(kinds)) or 'no blocks'}."
        )
    if vit.pool_include_prefix:
        raise ValueError(
            f"{type(model).__name__} must pool patches alone, or the class token; got "
            "pool_include_prefix=True."
        )
    block = vit.blocks[0]
    act = type(block.mlp.act).__name__
    if getattr(block.mlp.act, "approximate", "none") == "tanh":
        act = "GELUTanh"
    data = getattr(vit, "pretrained_cfg", None) or {}
    return {
        "num_heads": block.attn.num_heads,
        "global_pool": vit.global_pool,
        "act_layer": _ACTIVATION_CLASSES.get(act, act),
        "norm_eps": block.norm1.eps,
        "no_embed_class": vit.no_embed_class,
        "mean": data.get("mean", MEAN),
        "std": data.get("std", STD),
    }


def _create(found: Found) -> nn.Module:
    """Let timm tell what its architecture's name stands for."""
    if "architecture" not in found.config or importlib.util.find_spec("timm") is None:
        raise ImportError(
            f"timm must be installed to tell what the architecture of {found.name} is "
            f"({found.config.get('architecture')!r}); it is not. Pass config={{'num_heads': ...}} "
            "with all that differs from the defaults, or pip install timm."
        )
    model = importlib.import_module("timm").create_model(f"local-dir:{found.name}", pretrained=True)
    assert isinstance(model, nn.Module)
    return model


def _settings(config: Json) -> dict[str, Any]:
    """Flatten config.json of timm, in which later and inner entries are the more general."""
    data, arguments = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    return {
        **{key: data[key] for key in ("mean", "std") if key in data},
        **config,
        **arguments,
    }


def with_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give queries, keys and values of a model with ``qkv_bias=False`` biases of zero."""
    weights = dict(weights)
    products = [name for name in weights if name.endswith("attn.qkv.weight")]
    names = [name.replace(".weight", ".bias") for name in products]
    if not any(name in weights for name in names):
        weights |= {
            name: weights[product].new_zeros(len(weights[product]))
            for name, product in zip(names, products, strict=True)
        }
    return weights
