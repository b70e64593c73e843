"""A rank whose batch has no image takes part: every weight is connected, with gradient zero."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from navit.model.clip import CLIP
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from packer.batch import PackedBatch
from tests.helpers.batches import pack_images, random_text

SMALL = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 8}
VISION: list[dict[str, Any]] = [
    {},
    {"pool": "mean"},
    {"pool": "cls", "num_registers": 2},
    {"pool_mlp": False, "biases": True, "num_registers": 1},
    {"pos_embed": "learned"},
    {"pos_embed": "learned", "pos_combine": "stack", "pos_coordinates": "absolute"},
    {"pos_embed": "sinusoidal"},
    {"pos_embed": "fourier", "pos_combine": "product"},
    *(
        {"pos_embed": "grid", "pos_interpolation": how}
        for how in ("antialias", "corners", "bicubic", "bicubic_antialias")
    ),
    {"pre_norm": True, "norm_after_pool": True, "pool": "cls", "qk_norm": False},
    {"layer_scale": 0.1, "drop_path": 0.5, "checkpointing": True},
]
TEXT: list[dict[str, Any]] = [
    {},
    {"pool": "mean", "drop_path": 0.5},
    {"pool": "last", "causal": True, "biases": True},
    {"pad_id": 0, "max_tokens": 5, "layer_scale": 0.1},
]


def no_sequences() -> PackedBatch:
    """A collator's batch of no sample."""
    nothing = random_text([], vocab_size=9, seed=0)
    return pack_images([], patch_size=4, seq_len=6, captions=nothing)


def only_padding() -> PackedBatch:
    """A stream's batch after its end: sequences without an image."""
    size, shape = 4, (2, 6)
    return replace(
        no_sequences(),
        patches=torch.zeros(*shape, 3 * size**2, dtype=torch.uint8),
        segment_ids=torch.zeros(shape, dtype=torch.int32),
        position_ids=torch.zeros(*shape, 2, dtype=torch.int32),
        grid_sizes=torch.zeros(2, 3, 2, dtype=torch.int32),
        image_index=torch.full((2, 3), -1),
        cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32),
        segment_lengths=(6, 6),
        segment_images=(-1, -1),
    )


@pytest.mark.parametrize("batch", [no_sequences(), only_padding()], ids=["none", "padding"])
@pytest.mark.parametrize(
    ("vision", "text"),
    [(change, {}) for change in VISION] + [({}, change) for change in TEXT[1:]],
    ids=str,
)
def test_every_weight_is_connected_to_a_batch_without_images(
    vision: dict[str, Any], text: dict[str, Any], batch: PackedBatch
) -> None:
    batch.check()
    model = CLIP(
        CLIPConfig(
            vision=NaViTConfig(**SMALL | vision, patch_size=4),
            text=TextConfig(**SMALL | text, vocab_size=9),
            embed_dim=6,
            text_projection_bias=True,
            init_logit_bias=-10.0,
        )
    )
    output = model(batch)
    assert output.image.shape == output.text.shape == (0, 6)
    total = output.image.sum() + output.text.sum() + output.logit_scale + output.logit_bias
    total.backward()

    scores = ("log_logit_scale", "logit_bias")
    grads = {name: p.grad for name, p in model.named_parameters() if name not in scores}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert all(not grad.any() for grad in grads.values())
