"""Operations counted from lengths are those torch counts while the model runs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from navit.model import CLIP
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from navit.model.corrupt import Corruption
from navit.model.masked import MaskedConfig, MaskedPredictor
from navit.train.flops import batch_flops, matmul_rate
from packer.captions import CaptionTokenizer
from packer.collate import PackingCollator
from packer.config import PackerConfig
from tests.helpers.samples import image_samples

TOKENIZER = CaptionTokenizer.train([f"picture number {i}" for i in range(30)], 300)
SHAPE = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
VISION = [
    {"pool": "map", "num_registers": 3},
    {"pool": "map", "pool_mlp": False, "pos_embed": "grid"},
    {"pool": "mean", "pos_combine": "stack"},
    {"pool": "cls", "biases": True, "pre_norm": True},
]
TEXT = [{"pool": "map"}, {"pool": "last", "causal": True}, {"pool": "mean", "pad_id": 0}]


def counted(model: Any, batch: Any) -> int:
    # What torch counts is the plain form: in float64 no layer takes oneDNN's, and attention not the
    # CPU's fused one.
    model.double().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch)
    return int(counter.get_total_flops())


@settings(max_examples=12)
@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
    vision=st.sampled_from(VISION),
    text=st.sampled_from(TEXT),
    projection=st.booleans(),
)
def test_the_operations_of_a_clip_are_those_torch_counts(
    count: int, seed: int, vision: dict[str, Any], text: dict[str, Any], projection: bool
) -> None:
    config = CLIPConfig(
        vision=NaViTConfig.from_dict({**SHAPE, "patch_size": 8, **vision}),
        text=TextConfig.from_dict({**SHAPE, "width": 8, "vocab_size": 300, **text}),
        embed_dim=16,
        image_projection=projection,
    )
    collate = PackingCollator(PackerConfig(patch_size=8, seq_len=32), tokenizer=TOKENIZER)
    batch = collate(image_samples(count, seed=seed))

    assert batch_flops(config, batch) == counted(CLIP(config), batch)


def test_the_operations_of_a_classifier_are_those_torch_counts() -> None:
    config = ClassifierConfig(NaViTConfig.from_dict({**SHAPE, "patch_size": 8}), num_classes=7)
    batch = PackingCollator(PackerConfig(patch_size=8, seq_len=32))(
        [{**sample, "label": 1} for sample in image_samples(5)]
    )

    assert batch_flops(config, batch) == counted(Classifier(config), batch)
    assert batch_flops(config, PackingCollator(PackerConfig(patch_size=8, seq_len=32))([])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matmul_rate_is_positive_and_draws_no_random_numbers(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()

    assert matmul_rate(torch.device("cpu"), dtype) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_operations_of_a_masked_predictor_are_those_torch_counts(share: float) -> None:
    """Exactly where every patch is asked for; else the head's are those expected."""
    config = MaskedConfig(
        NaViTConfig.from_dict({**SHAPE, "patch_size": 8, "pool": "mean"}), Corruption(share)
    )
    batch = PackingCollator(PackerConfig(patch_size=8, seq_len=32))(image_samples(60))
    found = counted(MaskedPredictor(config), batch)
    assert batch_flops(config, batch) == pytest.approx(found, rel=0.05 * (share < 1))
