"""Checkpoints of any kind as subjects of an evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig
from navit.evaluate.run import evaluation_packing
from navit.evaluate.source import RunLoader, Subject, load_subject
from navit.model.classifier import Classifier, ClassifierConfig
from navit.pretrained import save_flexivit
from packer import PackerConfig
from packer.captions import CaptionTokenizer
from packer.plan.patch_size import RandomPatchSize
from packer.plan.resize import plan_resize
from packer.plan.types import ImageSize
from tests.helpers.batches import pack_images, random_images
from tests.helpers.public_models import make_model


def no_run(path: Path, *, averaged: bool) -> Any:
    raise FileNotFoundError(f"no checkpoint found in {path}")


NONE = RunLoader(no_run, lambda config, device: None)


FLEXIBLE = Classifier(ClassifierConfig(NaViTConfig.named("tiny", patch_buffer=8), 3))


def tiny(vocab_size: int = 300) -> CLIP:
    torch.manual_seed(0)
    text = TextConfig.named("tiny", vocab_size=vocab_size)
    return CLIP(CLIPConfig(NaViTConfig.named("tiny", patch_size=8), text))


def test_a_run_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    tokenizer = CaptionTokenizer.train(["a dog"] * 3, 300)
    packing = PackerConfig(patch_size=8, seq_len=64, max_tokens=30)
    asked: list[bool] = []

    def load(path: Path, *, averaged: bool) -> Any:
        asked.append(averaged)
        config = SimpleNamespace(packer=packing)
        return SimpleNamespace(model=tiny(), tokenizer=tokenizer, config=config, classes=None)

    runs = RunLoader(load, lambda config, device: torch.bfloat16)

    found = load_subject(str(tmp_path), runs, averaged=False, device="cpu")

    assert asked == [False]
    assert (found.packing, found.tokenizer, found.has_text) == (packing, tokenizer, True)
    assert found.autocast_dtype == torch.bfloat16
    assert found.describe()["precision"] == "bf16"
    full = load_subject(str(tmp_path), runs, device="cpu", precision="fp32")
    assert full.autocast_dtype is None


def test_the_vectors_asked_for_are_those_of_the_model() -> None:
    subject_model = tiny().eval()
    runs = RunLoader(
        lambda path, averaged: SimpleNamespace(
            model=subject_model,
            tokenizer=None,
            config=SimpleNamespace(packer=PackerConfig(patch_size=8)),
            classes=None,
        ),
        lambda config, device: None,
    )
    subject = load_subject("anywhere", runs, device="cpu")
    batch = pack_images(random_images(5, seed=0, patch_size=8), patch_size=8)
    with torch.no_grad():
        found = subject.encoder({"pooled", "embedding"})(batch)
        torch.testing.assert_close(found["pooled"], subject_model.vision(batch).pooled)
        expected = subject_model.encode_image(batch, normalize=True)
        torch.testing.assert_close(found["embedding"], expected)
    assert not subject.has_text
    assert "no tokenizer" in subject.notes[0]


@pytest.mark.parametrize("family", ["siglip2", "clip"])
def test_weights_of_hugging_face_bring_their_tokenizer_or_do_without(
    family: str, tmp_path: Path
) -> None:
    make_model(family).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_num_patches": 7}))

    bare = load_subject(str(tmp_path), NONE, device="cpu")
    assert (bare.has_text, bare.packing.image_budget) == (False, 7)
    assert bare.packing.resize == ("fill_budget" if family == "siglip2" else "allow_enlarge")

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_subject(str(tmp_path), NONE, device="cpu")


def test_a_classifiers_weights_are_an_image_tower(tmp_path: Path) -> None:
    Classifier(ClassifierConfig(NaViTConfig.named("tiny", patch_size=8), 3)).save_pretrained(
        tmp_path
    )

    found = load_subject(str(tmp_path), NONE, device="cpu")

    assert found.clip is None
    assert "no text tower" in found.notes[0]


def test_a_flexivit_file_is_evaluated_at_the_pixels_it_was_trained_on(tmp_path: Path) -> None:
    changes = {"biases": True, "qk_norm": False, "activation": "gelu_tanh", "pos_embed": "grid"}
    config = NaViTConfig.named("tiny", pool="cls", patch_buffer=12, pos_table_size=7, **changes)
    save_flexivit(NaViT(config), tmp_path / "flexi.npz")

    found = load_subject(str(tmp_path / "flexi.npz"), NONE, device="cpu")

    assert found.is_flexible
    assert (found.packing.patch_size, found.packing.image_budget) == (16, 15 * 15)
    assert found.packing.resize == "allow_enlarge"
    assert found.describe()["patch_buffer"] == 12
    with pytest.raises(FileNotFoundError):
        load_subject(str(tmp_path / "none.npz"), NONE, device="cpu")


@settings(max_examples=60)
@given(
    height=st.integers(48, 900),
    width=st.integers(48, 900),
    own=st.sampled_from([8, 16, 32]),
    size=st.integers(4, 48),
    budget=st.integers(32, 900),
)
def test_an_image_keeps_its_resolution_at_every_patch_size(
    height: int, width: int, own: int, size: int, budget: int
) -> None:
    """The budget is one of pixels: a small patch must not cost resolution."""
    packing = PackerConfig(patch_size=own, seq_len=900, max_tokens=budget)

    at = Subject(FLEXIBLE, packing, torch.device("cpu"), None).at_patch_size(size).packing

    assert at.patch_size == size
    pixels = budget * own**2
    assert at.image_budget == max(pixels // size**2, 1)
    assert at.image_budget <= at.seq_len
    sides = plan_resize(ImageSize(height, width), patch_size=size, max_tokens=at.image_budget)
    assert sides.rows * sides.cols * size**2 <= max(pixels, size**2)
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    for found, side in zip(sides, (height, width), strict=True):
        assert found * size <= max(side, size)
        # Whole patches, and the budget itself may lack up to one of them; a strip of one row, or
        # column, is as long as the budget.
        assert (
            min(sides) == 1 or (found + 1) * size > scale * side * (1 - 1 / at.image_budget) - 1e-9
        )


def test_a_run_that_drew_patch_sizes_is_evaluated_at_the_one_it_names() -> None:
    drawn = PackerConfig(patch_size=8, seq_len=64, patch_sizes=RandomPatchSize((4, 8, 16)))
    assert evaluation_packing(drawn) == PackerConfig(patch_size=8, seq_len=64)
    subject = Subject(FLEXIBLE, drawn, torch.device("cpu"), None)
    asked = evaluation_packing(subject.at_patch_size(4).packing)
    assert asked == PackerConfig(patch_size=4, seq_len=256, max_tokens=256)


def test_a_flexible_tower_is_evaluated_itself_and_a_fixed_one_by_a_resized_copy() -> None:
    packing = PackerConfig(patch_size=8, seq_len=64)
    model = tiny()
    fixed = Subject(model, packing, torch.device("cpu"), None)
    flexible = Subject(model.flexible(16), packing, torch.device("cpu"), None)
    assert fixed.at_patch_size(8).model is model
    assert flexible.at_patch_size(5).model is flexible.model
    resized = fixed.at_patch_size(5)
    expected = model.at_patch_size(5)
    assert resized.vision.config == expected.vision.config
    for name, value in expected.state_dict().items():
        assert torch.equal(resized.model.state_dict()[name], value), name


def test_what_is_no_checkpoint_is_said_without_asking_the_hub(tmp_path: Path) -> None:
    for source in ("nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint found in {source}"):
            load_subject(source, NONE, device="cpu")
