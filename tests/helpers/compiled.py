"""Compiled towers against eager ones.

A program of its own, since the type-checking hook of the tests and `torch.compile` do not go
together. `python -m tests.helpers.compiled DEVICE BACKEND CASE...`

prints for each case how far values and gradients are from the eager model's, and how many graphs
were compiled for batches of six shapes.
"""

import copy
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig
from navit.model.config import TextConfig
from packer.batch import PackedBatch
from packer.captions import pack_text
from tests.helpers.batches import pack_images, random_images

PATCH = 4
SHAPE = {"width": 32, "num_heads": 2, "depth": 1, "mlp_dim": 48}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "class token": {
        "pool": "cls",
        "num_registers": 2,
        "pos_embed": "grid",
        "pos_table_size": 3,
        "biases": True,
        "activation": "gelu_tanh",
    },
    "checkpointing": {
        "pool": "mean",
        "checkpointing": True,
        "pos_embed": "learned",
        "layer_scale": 0.5,
        "activation": "quick_gelu",
    },
    "stem": {"stem": "resnet", "stem_width": 9, "stem_stages": (1,), "pool": "cls"},
    "patch sizes": {"patch_buffer": 6, "pos_embed": "grid", "pos_table_size": 3},
    "half precision": {"width": 64},  # heads of 32 channels: on a GPU the variable-length kernel
}


def batches(patch_sizes: Sequence[int] = (PATCH,), *, drop: bool = True) -> list[PackedBatch]:
    """Six batches, no two of one shape; one holds one image, one none."""
    made = []
    for count, seed in ((5, 1), (3, 2), (9, 3), (1, 4), (0, 5), (2, 6)):
        images = random_images(count, seed=seed, patch_size=patch_sizes, drop=drop)
        made.append(pack_images(images, patch_size=max(patch_sizes), seq_len=60))
    return made


def compare(
    eager: torch.nn.Module,
    compiled: torch.nn.Module,
    inputs: Sequence[Any],
    half: torch.device | None = None,
) -> Any:
    """Return how far vectors and gradients are from the eager model's, at most, over the inputs.

    The largest difference; with ``half`` the passes run under that device's bfloat16 autocast, and
    a difference is relative to the norm.
    """
    far = _relative if half else _largest
    value = gradient = inference = 0.0
    for given in inputs:
        with torch.inference_mode():
            again = vectors(compiled, given, half)
        found, expected = vectors(compiled, given, half), vectors(eager, given, half)
        weights = torch.linspace(-1, 1, expected.numel(), device=expected.device)
        weights = weights.view(expected.shape)
        grads = (
            torch.autograd.grad((x * weights).sum(), list(m.parameters()))
            for x, m in ((found, compiled), (expected, eager))
        )
        gradient = max(gradient, far(*grads))
        if len(expected):
            value = max(value, far([found.detach()], [expected.detach()]))
            inference = max(inference, far([again], [expected.detach()]))
    return {"value": value, "gradient": gradient, "inference": inference}


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Take all tensors as one: a single small one may be rounding alone."""
    a, b = (torch.cat([x.double().flatten() for x in xs]) for xs in (found, expected))
    return float((a - b).norm() / b.norm()) if b.norm() else float((a - b).norm())


def vectors(model: torch.nn.Module, given: Any, half: torch.device | None = None) -> Tensor:
    """Run a tower."""
    with torch.autocast(half.type, torch.bfloat16) if half else nullcontext():
        output = model(given)
    return output if isinstance(output, Tensor) else output.pooled


def run_case(name: str, backend: str, device: str) -> dict[str, Any]:
    """Compare one configuration's compiled tower with its eager one."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    if name == "text":
        text = TextConfig.from_dict({**SHAPE, "vocab_size": 50, "causal": True, "pool": "last"})
        vision = NaViTConfig.from_dict({**SHAPE, "patch_size": PATCH})
        clip = CLIP(CLIPConfig(vision=vision, text=text, embed_dim=16)).to(device)
        eager, compiled = clip.text, copy.deepcopy(clip)
        compiled.compile(backend=backend)
        captions = [[[1, 2, 3], [4, 5]], [[6] * 7, [7], [8, 9, 1]], [[3]]]
        given = [pack_text(ids).to(device) for ids in captions]
        found = compare(eager, compiled.text, given)
    else:
        config = NaViTConfig.from_dict({**SHAPE, "patch_size": PATCH, **CASES[name]})
        model = NaViT(config).to(device)
        compiled_tower = copy.deepcopy(model)
        compiled_tower.compile(backend=backend)
        sizes = (PATCH,) if config.patch_buffer is None else (3, PATCH, 7)
        made = [batch.to(device) for batch in batches(sizes, drop=config.stem is None)]
        half = torch.device(device) if name == "half precision" else None
        found = compare(model, compiled_tower, made, half)
        assert not copy.deepcopy(compiled_tower).is_compiled
    graphs = counters["stats"]["unique_graphs"]
    return {**found, "graphs": graphs, "breaks": sum(counters["graph_break"].values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, backend_name, *names = sys.argv[1:]
    print(json.dumps({name: run_case(name, backend_name, where) for name in names}))
