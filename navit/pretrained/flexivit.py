"""FlexiViT in the layout of its authors' code, big_vision, and back: a .npz of named arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from navit.model.config import NaViTConfig
from navit.model.vision import NaViT
from navit.pretrained import hf
from navit.pretrained.rules import Rule, Tensors, build, load_by_rules, reshaped, save_by_rules

Array = npt.NDArray[Any] | Tensor

_PREFIXES = ("params/", "opt/target/", "")
"""Where the parameters stand: of a checkpoint with its optimizer, of an older one, of a model."""
_CLASSIFIER = "head/"
_TRAINED = {
    "biases": True,
    "qk_norm": False,
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "pixel_mean": (0.5, 0.5, 0.5),
    "pixel_std": (0.5, 0.5, 0.5),
    "patch_bias": None,
    "pos_embed": "grid",
    "pos_interpolation": "antialias",
    "num_registers": 0,
    "pre_norm": False,
    "norm_after_pool": False,
}
"""What the code says and the arrays do not."""


def load_flexivit(source: str | Path | Mapping[str, Array], *, patch_size: int = 16) -> NaViT:
    """Read a FlexiViT as big_vision writes it (``flexivit_b_i1k.npz``), without its classifier.

    The settings are those of big_vision's ``models/proj/flexi/vit.py`` and of the two it stands on,
    ``models/vit.py`` and flax: pixels in [-1, 1] (``value_range`` in ``configs/proj/flexivit``),
    layer norms with 1e-6, GELU in its tanh form, biases everywhere, positions without a row for
    the class token and resized by ``jax.image.resize(..., "linear")``, which is bilinear with
    antialias, and weights PI-resized from one buffer by a bilinear resize without it.

    Args:
        source: A .npz file; or the arrays by their names in it, of numpy or torch. Parameters may
            stand under ``params/`` or ``opt/target/``, beside an optimizer's, which is passed over.
        patch_size: The size in pixels that is meant where none is named: the released models were
            trained on images of 240 x 240 pixels with patches of 8 to 48, so 16 is a grid of 15.

    Returns:
        A flexible model, in the types the arrays have, whose `patch_buffer` is the side of the
        arrays' kernel (32 in FlexiViT) and whose positions are the file's grid (7 x 7). Its
        vectors are big_vision's ``pre_logits``: the class token, the mean of the tokens or the
        attention pool, whichever the arrays are of. A plain ViT of big_vision with learned
        positions loads too; its buffer then has its patch size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If arrays are missing, unknown, or of wrong shapes.

    Source: FlexiViT (arXiv:2212.08013), section 3.4; google-research/big_vision as named above.
    """
    weights, where = _read(source)
    config = _config(weights, where, patch_size)
    state = load_by_rules(_rules(config), weights, where)
    return build(NaViT, config, state, where)


def save_flexivit(model: NaViT, path: str | Path) -> None:
    """Write an image tower as big_vision's FlexiViT, for it and for timm, both without classifier.

    Args:
        model: A model as `load_flexivit` gives, trained further or not; one of a fixed patch size
            is written with a kernel of that size.
        path: The .npz file; its folder is created. Arrays have the weights' types, and float32 for
            bfloat16, which numpy lacks.

    Raises:
        ValueError: If big_vision's model cannot be this one; the message lists why. Or if the name
            does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"big_vision reads files whose name ends in .npz; got {path.name!r}.")
    config = model.config
    must = {name: {value} for name, value in _TRAINED.items()}
    must |= {"pool_mlp": {True}, "patch_bias": {None, True}, "pool": {"cls", "mean", "map"}}
    must |= {"stem": {None}}
    hf.check_saveable(config, "a FlexiViT of big_vision", must)
    weights = save_by_rules(_rules(config), model.state_dict())
    arrays = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
        for name, value in weights.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **arrays)


def _read(source: str | Path | Mapping[str, Array]) -> tuple[dict[str, Tensor], str]:
    """Return the tower's arrays as tensors, under their names in the model, and what to call it."""
    if isinstance(source, Mapping):
        arrays, where = dict(source), "The mapping"
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"a FlexiViT of big_vision must be a .npz file; {source} is none. Check the path."
            )
        with np.load(source, allow_pickle=False) as file:
            arrays, where = dict(file), str(source)
    prefix = next(p for p in _PREFIXES if not p or any(name.startswith(p) for name in arrays))
    found = {
        name.removeprefix(prefix): _tensor(value)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    return {k: v for k, v in found.items() if not k.startswith(_CLASSIFIER)}, where


def _tensor(value: Array) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # how numpy keeps jax's bfloat16
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value)


def _config(weights: Mapping[str, Tensor], where: str, patch_size: int) -> NaViTConfig:
    """Read the configuration off the shapes."""
    block = "Transformer/encoderblock_0"
    needed = {
        "embedding/kernel": 4,
        "pos_embedding": 3,
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": 3,
        f"{block}/MlpBlock_0/Dense_0/kernel": 2,
    }
    wrong = {k: tuple(weights[k].shape) for k, n in needed.items() if k in weights}
    wrong = {name: shape for name, shape in wrong.items() if len(shape) != needed[name]}
    missing = sorted(needed.keys() - weights.keys())
    if missing or wrong:
        raise ValueError(
            f"{where} must hold a ViT of big_vision with learned positions and blocks named "
            f"encoderblock_0, encoderblock_1, ...; missing {missing or 'none'}, of other shapes "
            f"{wrong or 'none'}."
        )
    rows, cols, _, width = weights["embedding/kernel"].shape
    _, num_heads, _ = weights[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].shape
    names = {name.split("/")[1] for name in weights if name.startswith("Transformer/encoderblock_")}
    has_map = any(name.startswith("MAPHead_0/") for name in weights)
    return NaViTConfig.from_dict(
        {
            **_TRAINED,
            "width": width,
            "depth": len(names),
            "num_heads": num_heads,
            "mlp_dim": weights[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[1],
            "patch_size": patch_size,
            "patch_buffer": hf.one_side((rows, cols), f"The patch of {where}"),
            "pos_table_size": hf.square_side(weights["pos_embedding"].shape[1], where),
            "pool": "map" if has_map else "cls" if "cls" in weights else "mean",
        }
    )


def _rules(config: NaViTConfig) -> list[Rule]:
    side = config.patch_buffer or config.patch_size
    rules = [
        _kernel("patch_embed.proj", "embedding", side, side, 3),
        _bias("patch_embed.proj", "embedding"),
        _rows("pos_embed.table", "pos_embedding"),
        *([_rows("prefix.tokens", "cls")] if config.pool == "cls" else []),
        *_norm("norm", "Transformer/encoder_norm"),
    ]
    for i in range(config.depth):
        rules += _block_rules(f"blocks.{i}", f"Transformer/encoderblock_{i}", config.num_heads)
    if config.pool == "map":
        rules += _pool_rules(config.num_heads)
    return rules


def _block_rules(ours: str, theirs: str, num_heads: int) -> list[Rule]:
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    names = [f"{attention}/{name}" for name in ("query", "key", "value")]
    return [
        *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
        *_into_heads(f"{ours}.attn.qkv", names, num_heads),
        *_out_of_heads(f"{ours}.attn.proj", f"{attention}/out", num_heads),
        *_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1"),
        *_mlp(f"{ours}.mlp", f"{theirs}/MlpBlock_0"),
    ]


def _pool_rules(num_heads: int) -> list[Rule]:
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    rules = [reshaped("pool.probe", "MAPHead_0/probe", 1, 1, -1)]
    for name in ("query", "key", "value"):
        rules += _into_heads(f"pool.{name[0]}", [f"{attention}/{name}"], num_heads)
    return [
        *rules,
        *_out_of_heads("pool.proj", f"{attention}/out", num_heads),
        *_norm("pool.norm", "MAPHead_0/LayerNorm_0"),
        *_mlp("pool.mlp", "MAPHead_0/MlpBlock_0"),
    ]


def _mlp(ours: str, theirs: str) -> list[Rule]:
    return [
        rule
        for name, number in (("fc1", 0), ("fc2", 1))
        for rule in (
            _kernel(f"{ours}.{name}", f"{theirs}/Dense_{number}", -1),
            _bias(f"{ours}.{name}", f"{theirs}/Dense_{number}"),
        )
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule((f"{ours}.weight",), (f"{theirs}/scale",)), _bias(ours, theirs)]


def _bias(ours: str, theirs: str) -> Rule:
    return Rule((f"{ours}.bias",), (f"{theirs}/bias",))


def _rows(ours: str, theirs: str) -> Rule:
    """Vectors in rows, with an axis of length 1 before them in flax."""
    return Rule((ours,), (theirs,), lambda t: [t[0][0]], lambda t: [t[0][None]])


def _kernel(ours: str, theirs: str, *inputs: int) -> Rule:
    """A product's weights: (out, in) of ours, inputs first in flax and of any number of axes."""
    return Rule(
        (f"{ours}.weight",),
        (f"{theirs}/kernel",),
        lambda t: [t[0].flatten(0, -2).T],
        lambda t: [t[0].T.reshape(*inputs, len(t[0]))],
    )


def _out_of_heads(ours: str, theirs: str, num_heads: int) -> list[Rule]:
    """The product behind attention: (heads, head size, D) in flax."""

    def save(tensors: Tensors) -> list[Tensor]:
        width = len(tensors[0])
        return [tensors[0].T.reshape(num_heads, -1, width)]

    def load(tensors: Tensors) -> list[Tensor]:
        return [tensors[0].flatten(0, 1).T]

    return [Rule((f"{ours}.weight",), (f"{theirs}/kernel",), load, save), _bias(ours, theirs)]


def _into_heads(ours: str, theirs: Sequence[str], num_heads: int) -> list[Rule]:
    """Products before attention, stacked in one of ours: (D, heads, head size) each in flax."""

    def load(tensors: Tensors) -> list[Tensor]:
        return [torch.cat([kernel.flatten(1).T for kernel in tensors])]

    def save(tensors: Tensors) -> list[Tensor]:
        parts = tensors[0].chunk(len(theirs))
        return [part.T.reshape(part.shape[1], num_heads, -1) for part in parts]

    def load_bias(tensors: Tensors) -> list[Tensor]:
        return [torch.cat([bias.flatten() for bias in tensors])]

    def save_bias(tensors: Tensors) -> list[Tensor]:
        return [part.reshape(num_heads, -1) for part in tensors[0].chunk(len(theirs))]

    kernels, biases = (tuple(f"{name}/{part}" for name in theirs) for part in ("kernel", "bias"))
    return [
        Rule((f"{ours}.weight",), kernels, load, save),
        Rule((f"{ours}.bias",), biases, load_bias, save_bias),
    ]
