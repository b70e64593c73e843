"""CLIP: two towers, one space, the scale and bias of its similarities."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from navit import CLIP, CLIPConfig, NaViTConfig, TextConfig
from packer.batch import PackedBatch
from tests.helpers.batches import pack_images, random_images, random_text


def tiny(embed_dim: int = 24, **changes: object) -> CLIP:
    torch.manual_seed(0)
    vision = NaViTConfig.named("tiny", patch_size=4)
    text = TextConfig.named("tiny", vocab_size=50)
    return CLIP(CLIPConfig(vision=vision, text=text, embed_dim=embed_dim, **changes))


def pairs(count: int) -> PackedBatch:
    text = random_text([1 + i % 5 for i in range(count)], vocab_size=50, seed=0)
    images = random_images(count, seed=0)
    return pack_images(images, patch_size=4, seq_len=40, captions=text)


def test_forward_gives_unit_features_of_images_and_captions_in_order() -> None:
    model, batch = tiny(), pairs(6)
    output = model(batch)
    assert output.image.shape == output.text.shape == (6, 24)
    for features, raw in (
        (output.image, model.encode_image(batch)),
        (output.text, model.encode_text(batch.captions)),
    ):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(features * raw.norm(dim=1, keepdim=True), raw)
    assert torch.equal(model.encode_text(batch), model.encode_text(batch.captions))
    assert output.logit_bias is None


def test_features_are_float32_under_autocast_and_float64_in_a_float64_model() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny()(pairs(3))
    assert output.image.dtype == output.text.dtype == torch.float32
    torch.testing.assert_close(output.image.norm(dim=1), torch.ones(3))
    assert tiny().double()(pairs(3)).image.dtype == torch.float64


def test_the_scale_is_the_multiplier_and_never_above_its_limit() -> None:
    model = tiny(init_logit_scale=10.0, init_logit_bias=-10.0)
    assert math.isclose(model.logit_scale.item(), 10, rel_tol=1e-6)
    assert model(pairs(2)).logit_bias.item() == -10
    with torch.no_grad():
        model.log_logit_scale.fill_(9.0)
    assert model.logit_scale.item() == 100


def test_without_a_limit_the_scale_is_what_was_learned() -> None:
    """SigLIP's is above 100."""
    model = tiny(max_logit_scale=None)
    with torch.no_grad():
        model.log_logit_scale.fill_(math.log(117.0))
    model.limit_logit_scale_()
    assert math.isclose(model.logit_scale.item(), 117, rel_tol=1e-6)


def test_image_vectors_can_be_the_common_space_and_text_have_a_bias() -> None:
    model = tiny(embed_dim=64, image_projection=False, text_projection_bias=True)
    batch = pairs(4)
    assert torch.equal(model.encode_image(batch), model.vision(batch).pooled)
    raw = model.text(batch.captions) @ model.text_proj.weight.T
    with torch.no_grad():
        model.text_proj.bias.copy_(torch.randn(64))
    torch.testing.assert_close(model.encode_text(batch), raw + model.text_proj.bias)
    assert not {name for name, _ in model.named_parameters() if name.startswith("image_proj")}


def test_an_empty_batch_reaches_every_parameter() -> None:
    model = tiny()
    output = model(pairs(0))
    assert output.image.shape == output.text.shape == (0, 24)
    (output.logit_scale * (output.image.sum() + output.text.sum())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_batch_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="must carry captions"):
        tiny()(replace(pairs(2), captions=None))


def test_a_saved_model_comes_back_the_same(tmp_path: Path) -> None:
    model, batch = tiny(init_logit_scale=10.0, init_logit_bias=-10.0), pairs(4)
    model.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(batch).image, model(batch).image)
    assert torch.equal(again(batch).text, model(batch).text)
    assert torch.equal(again.logit_scale, model.logit_scale)
