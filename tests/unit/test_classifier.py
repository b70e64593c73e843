"""The classifier, and how its accuracy is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.evaluate.classify import evaluate_classifier, hits_at, image_pass
from navit.evaluate.run import Evaluation
from navit.model import NaViTConfig
from navit.model.classifier import Classifier, ClassifierConfig
from navit.train.optim import OptimConfig, build_optimizers
from packer import PackerConfig
from tests.helpers.batches import pack_images, random_images
from tests.helpers.samples import image_samples, make_shards


def tiny(num_classes: int = 7, **changes: object) -> Classifier:
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", patch_size=8, **changes)
    return Classifier(ClassifierConfig(config, num_classes))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(1, 6), k=st.integers(1, 6))
def test_a_hit_is_a_class_among_the_k_best_and_never_a_tie(seed: int, classes: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 4, (9, classes)).astype(np.float32)  # many ties
    targets = rng.random((9, classes)) < 0.4
    labels = rng.integers(0, classes, 9)

    def by_hand(row: np.ndarray, wanted: set[int]) -> bool:
        others = [row[c] for c in range(classes) if c not in wanted]
        return any(sum(x >= row[c] for x in others) < k for c in wanted)

    found = hits_at(torch.from_numpy(logits), torch.from_numpy(targets).float(), k)
    assert found.tolist() == [
        by_hand(row, set(np.flatnonzero(t))) for row, t in zip(logits, targets, strict=True)
    ]
    found = hits_at(torch.from_numpy(logits), torch.from_numpy(labels), k)
    assert found.tolist() == [by_hand(row, {int(c)}) for row, c in zip(logits, labels, strict=True)]


def test_a_constant_classifier_hits_nothing(tmp_path: Path) -> None:
    """A head that starts at 0 gives every class the same score."""
    samples = image_samples(12, unit=8)
    for i, sample in enumerate(samples):
        sample["label"] = i % 3
    shards = make_shards(tmp_path, samples, 5)
    model = tiny(3)

    def evaluate() -> Evaluation:
        batches = image_pass(shards, PackerConfig(patch_size=8, seq_len=64), 2)
        return evaluate_classifier(model, batches, device=torch.device("cpu"), progress=False)

    assert evaluate().metrics == {
        "accuracy@1": 0.0,
        "chance/accuracy@1": 1 / 3,
    }
    with torch.no_grad():
        model.head.bias[2] = 1.0
    found = evaluate()
    assert found.metrics["accuracy@1"] == pytest.approx(4 / 12)
    assert found.stats.images == 12
    assert found.pairs is None


def test_an_image_gets_the_logits_it_gets_alone() -> None:
    model = tiny().double().eval()
    torch.nn.init.normal_(model.head.weight)
    images = random_images(6, seed=0, patch_size=8)
    packed = model(pack_images(images, patch_size=8, seq_len=60))
    alone = torch.cat([model(pack_images([image], patch_size=8)) for image in images])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)


def test_a_classifier_is_saved_and_read_back(tmp_path: Path) -> None:
    model = tiny(5, pool="mean").eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path).eval()
    batch = pack_images(random_images(3, seed=1, patch_size=8), patch_size=8)
    assert torch.equal(model(batch), again(batch))
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert ClassifierConfig.from_dict(stored) == model.config


def test_a_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be a positive integer; got 0"):
        ClassifierConfig(num_classes=0)
    with pytest.raises(ValueError, match="representation_size must be a positive integer, or None"):
        ClassifierConfig(representation_size=0)


def test_the_head_of_pre_training_has_a_hidden_layer_of_tanh(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = NaViTConfig.named("tiny", patch_size=8, pool="cls")
    config = ClassifierConfig(vision, 4, init_head_bias=-2.0, representation_size=11)
    model = Classifier(config).double().eval()
    batch = pack_images(random_images(5, seed=1, patch_size=8), patch_size=8)
    assert torch.equal(model(batch), torch.full((5, 4), -2.0).double()), "it starts at its bias"
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.pre_logits.bias)

    state = model.state_dict()
    pooled = model.vision(batch).pooled
    hidden = pooled @ state["head.pre_logits.weight"].T + state["head.pre_logits.bias"]
    assert hidden.shape == (5, 11)
    expected = hidden.tanh() @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-12)

    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert again.config == config
    assert torch.equal(again(batch), model(batch))


def test_the_whole_head_of_pre_training_takes_the_heads_learning_rate() -> None:
    model = Classifier(ClassifierConfig(NaViTConfig.named("tiny"), 3, representation_size=5))
    config = OptimConfig(learning_rate=1.0, head_learning_rate_factor=10.0, head_weight_decay=0.5)
    groups = build_optimizers(model, config).param_groups
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in model.head.named_parameters()}
    assert found == {
        "weight": (10.0, 0.5),
        "bias": (10.0, 0.0),
        "pre_logits.weight": (10.0, 0.5),
        "pre_logits.bias": (10.0, 0.0),
    }
