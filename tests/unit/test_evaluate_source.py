"""Checkpoints of any kind as subjects of an evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from navit import CLIP, CLIPConfig, NaViTConfig, TextConfig
from navit.evaluate.source import RunLoader, load_subject
from navit.model.classifier import Classifier, ClassifierConfig
from packer import PackerConfig
from packer.captions import CaptionTokenizer
from tests.helpers.batches import pack_images, random_images
from tests.helpers.public_models import make_model


def no_run(path: Path, *, averaged: bool) -> Any:
    raise FileNotFoundError(f"no checkpoint found in {path}")


NONE = RunLoader(no_run, lambda config, device: None)


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


def test_what_is_no_checkpoint_is_said_without_asking_the_hub(tmp_path: Path) -> None:
    for source in ("nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint found in {source}"):
            load_subject(source, NONE, device="cpu")
