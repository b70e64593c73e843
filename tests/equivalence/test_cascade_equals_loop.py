"""A cascade that packs the undecided anew answers as a plain loop over images, stage by stage."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.cascade import Cascade, Stage, budget_stages
from navit.model import CLIP
from navit.model.classifier import Classifier, ClassifierConfig
from navit.model.config import CLIPConfig, NaViTConfig, TextConfig
from packer import PackerConfig, PackingCollator
from tests.helpers.samples import noise, png

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHAPE = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "patch_size": 4}
CLASSES = 5


def classifier(dtype: torch.dtype, seed: int, **changes: Any) -> Classifier:
    torch.manual_seed(seed)
    config = ClassifierConfig(NaViTConfig.from_dict({**SHAPE, **changes}), num_classes=CLASSES)
    model = Classifier(config)
    # The head starts at 0, and would be as sure of every image.
    torch.nn.init.normal_(model.head.weight, std=0.8)
    return model.to(dtype).eval()


class Plain(NamedTuple):
    """What the loop finds for one image."""

    logits: Tensor
    stage: int
    tokens: list[int]
    margins: list[float]


def loop(stages: tuple[Stage, ...], thresholds: list[float], sample: dict[str, Any]) -> Plain:
    """One image at a time, one batch each, no cascade: ask the stages in turn."""
    tokens, margins = [0] * len(stages), []
    for k, stage in enumerate(stages):
        batch = PackingCollator(stage.packing)([sample])
        with torch.no_grad():
            if stage.classes is None:
                logits = stage.model(batch)[0]
            else:
                model: Any = stage.model
                vector = model.encode_image(batch)[0]
                logits = model.logit_scale * (stage.classes @ (vector / vector.norm()))
        tokens[k] = batch.stats.tokens
        sure = float(torch.exp(logits.max() - torch.logsumexp(logits, 0)))
        if k < len(thresholds):
            margins.append(abs(sure - thresholds[k]))
            if sure < thresholds[k]:
                continue
        return Plain(logits, k, tokens, margins)
    raise AssertionError("the last stage keeps what it gets")


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=8)
@given(
    sides=st.lists(st.tuples(st.integers(2, 50), st.integers(2, 50)), max_size=9),
    thresholds=st.lists(st.floats(0, 1.1), min_size=2, max_size=2),
    rows=st.integers(1, 3),
    held=st.sampled_from([1, 3, 8192]),
    kind=st.sampled_from(["shared", "own", "enlarged", "flexible"]),
    seed=st.integers(0, 99),
)
def test_a_cascade_equals_a_loop_over_images(
    dtype: torch.dtype,
    sides: list[tuple[int, int]],
    thresholds: list[float],
    rows: int,
    held: int,
    kind: str,
    seed: int,
) -> None:
    resize = "allow_enlarge" if kind == "enlarged" else "shrink_only"
    packing = PackerConfig(patch_size=4, seq_len=48, resize=resize, seed=seed)
    if kind == "own":
        stages = tuple(
            Stage(classifier(dtype, seed + k), PackerConfig(patch_size=4, seq_len=n, seed=seed))
            for k, n in enumerate((6, 20, 48))
        )
    elif kind == "flexible":
        model = classifier(dtype, seed, patch_buffer=16)
        stages = tuple(Stage(model, PackerConfig(patch_size=p, seq_len=144)) for p in (12, 8, 5))
    else:
        stages = budget_stages(classifier(dtype, seed), packing, [6, 20, 48])
    samples = [
        {"image": png(height, width, i), "key": f"k{i % 3}"}  # keys need not differ
        for i, (height, width) in enumerate(sides)
    ]
    plain = [loop(stages, thresholds, sample) for sample in samples]

    cascade = Cascade(stages, thresholds, sequences_per_batch=rows, max_held=held)
    found = cascade(samples)

    assert found.keys == tuple(sample["key"] for sample in samples)
    assert len(found.logits) == len(samples)
    for i, one in enumerate(plain):
        if min(one.margins) < 2e-6:  # rounding may decide either way
            continue
        assert int(found.stages[i]) == one.stage
        assert found.logits.dtype == dtype
        torch.testing.assert_close(
            found.logits[i], one.logits, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        spent = found.tokens[i].tolist()
        # The plain loop also runs what shows the same pixels again.
        assert all(ours in (0, theirs) for ours, theirs in zip(spent, one.tokens, strict=True))
        skipped = [k for k, (a, b) in enumerate(zip(spent, one.tokens, strict=True)) if b and not a]
        assert all(k > 0 and one.tokens[k] == one.tokens[k - 1] for k in skipped)
        assert not (skipped and kind == "own")
    ran = (found.tokens > 0).sum(0).tolist()
    assert [stats.images for stats in found.stats.stages] == ran
    assert sum(stats.tokens for stats in found.stats.stages) == int(found.tokens.sum())


@settings(max_examples=5)
@given(count=st.integers(1, 10), threshold=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_clip_is_as_sure_as_the_softmax_of_its_scaled_similarities(
    count: int, threshold: float, seed: int
) -> None:
    torch.manual_seed(seed)
    config = CLIPConfig(
        vision=NaViTConfig.from_dict({**SHAPE, "pool": "mean"}),
        text=TextConfig.named("tiny", vocab_size=300),
        embed_dim=8,
        init_logit_scale=4.0,
    )
    model = CLIP(config).double().eval()
    classes = torch.nn.functional.normalize(torch.randn(CLASSES, 8, dtype=torch.float64), dim=-1)
    stages = budget_stages(model, PackerConfig(patch_size=4, seq_len=40), [4, 30], classes=classes)
    rng = np.random.default_rng(seed)
    samples = [{"image": noise(*rng.integers(8, 40, 2), i), "key": str(i)} for i in range(count)]
    plain = [loop(stages, [threshold], sample) for sample in samples]

    found = Cascade(stages, [threshold], sequences_per_batch=2)(samples)

    for i, one in enumerate(plain):
        if one.margins[0] > 1e-9:
            assert int(found.stages[i]) == one.stage
            torch.testing.assert_close(found.logits[i], one.logits, rtol=0, atol=1e-10)
