"""Where public weights come from, what else a folder tells, and what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig, TextConfig, pretrained
from navit.model.classifier import Classifier, ClassifierConfig
from tests.helpers.batches import pack_images, random_images
from tests.helpers.public_models import (
    FAMILIES,
    PATCH,
    make_config,
    make_model,
    randomize,
)

every_family = pytest.mark.parametrize("name", list(FAMILIES))


# Missing and unknown


@every_family
def test_missing_and_unknown_tensors_are_listed(name: str) -> None:
    model = make_model(name)
    state, config = model.state_dict(), model.config.to_dict()
    state["vision_model.encoder.layers.0.gate.weight"] = torch.zeros(1)
    del state["vision_model.post_layernorm.bias"]
    for load in (FAMILIES[name].load, FAMILIES[name].load_clip):
        with pytest.raises(ValueError, match=r"missing .*post_layernorm\.bias.*gate\.weight"):
            load(state, config=config)
    del state["text_model.final_layer_norm.weight"]
    with pytest.raises(ValueError, match=r"missing .*text_model\.final_layer_norm\.weight"):
        FAMILIES[name].load_clip(state, config=config)


@every_family
def test_another_configuration_than_the_weights_is_refused_with_both_shapes(name: str) -> None:
    model = make_model(name)
    config = make_config(name, intermediate_size=40).to_dict()
    words = r"blocks\.0\.mlp\.fc1\.weight \(48, 32\), not \(40, 32\)"
    with pytest.raises(ValueError, match=words):
        FAMILIES[name].load(model.state_dict(), config=config)


def test_a_state_dict_needs_its_configuration() -> None:
    with pytest.raises(ValueError, match="must come with its configuration"):
        pretrained.load_siglip2(make_model("siglip2").state_dict())


@pytest.mark.parametrize(
    ("load", "name", "words"),
    [
        (
            pretrained.load_siglip2,
            "siglip",
            "load_siglip, also for the SigLIP 2 checkpoints of one",
        ),
        (pretrained.load_siglip, "siglip2", "Read it with load_siglip2"),
        (pretrained.load_siglip_clip, "clip", "Read it with load_clip"),
        (pretrained.load_clip, "siglip", "Read it with load_siglip"),
    ],
)
def test_another_kind_of_model_names_the_function_that_reads_it(
    load: Any, name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load(make_model(name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act .*'gelu_pytorch_tanh'.*got 'relu'"),
        ({"num_channels": 1}, "num_channels .* must be 3; got 1"),
        ({"num_patches": 8}, "square table; got 8"),
        ({"patch_size": [4, 2]}, r"patch_size must be that of a square; got \[4, 2\]"),
    ],
)
def test_what_we_have_not_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    config = make_config("siglip2").to_dict()
    config["vision_config"].update(changes)
    with pytest.raises(ValueError, match=words):
        pretrained.load_siglip2(make_model("siglip2").state_dict(), config=config)


# Folders and the hub


def test_what_is_missing_from_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json.*is missing"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*there is none"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"'siglip2_vision_model'.*got 'bert'"):
        pretrained.load(tmp_path)
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./a/b/c"):
        with pytest.raises(FileNotFoundError, match="which is no folder"):
            pretrained.load_siglip2(source)


def test_without_a_network_a_hub_id_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"'google/none' is no folder.*pass its folder"):
        pretrained.load("google/none")


def test_a_hub_id_is_downloaded_without_the_weights_it_does_not_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_model("siglip2").save_pretrained(tmp_path)
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append([name, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert isinstance(pretrained.load("google/siglip2"), CLIP)
    assert asked == [["google/siglip2", "*.json", "model*.safetensors"]]


def test_our_own_folders_are_read(tmp_path: Path) -> None:
    vision = NaViTConfig.named("tiny", patch_size=PATCH)
    batch = pack_images(random_images(3, seed=0), patch_size=PATCH)
    classifier = Classifier(ClassifierConfig(vision=vision, num_classes=3))
    classifier.save_pretrained(tmp_path / "classifier")
    found = pretrained.load(tmp_path / "classifier")
    assert isinstance(found, NaViT)
    assert torch.equal(found(batch).pooled, classifier.vision(batch).pooled)


def test_a_run_that_has_no_checkpoint_yet_is_named(tmp_path: Path) -> None:
    """Its config.json has settings of a model where a folder of weights has the model's name."""
    (tmp_path / "config.json").write_text('{"model": {"vision": {}}, "steps": 10}')
    with pytest.raises(FileNotFoundError, match="training run without a checkpoint"):
        pretrained.load(tmp_path)


# What the other files of a folder tell


@every_family
def test_the_image_processor_keeps_means_and_deviations(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    family = FAMILIES[name]
    assert family.load(model).config.pixel_mean == family.mean
    model.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    told = {"image_mean": mean, "image_std": std}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": told}))
    ours = family.load(tmp_path)
    assert ours.config.pixel_mean == tuple(mean)

    family.save(ours, tmp_path / "back")

    processor = AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert (list(processor.image_mean), list(processor.image_std)) == (mean, std)
    assert family.load(tmp_path / "back").config == ours.config
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert family.load(tmp_path).config.pixel_std == (1.0, 1.0, 1.0)


def test_the_padding_token_is_the_tokenizers(tmp_path: Path) -> None:
    """SigLIP 2's config.json says 1, the class's default; its tokenizer pads with 0."""
    for name, expected in (("siglip2", 0), ("siglip", 1)):
        model = make_model(name)
        assert FAMILIES[name].load_clip(model).config.text.pad_id == expected
        model.save_pretrained(tmp_path)
        pad = tmp_path / "tokenizer_config.json"
        token = {"content": "<pad>"}
        pad.write_text(json.dumps({"pad_token": token, "added_tokens_decoder": {"5": token}}))
        assert FAMILIES[name].load_clip(tmp_path).config.text.pad_id == 5
        pad.write_text('{"pad_token": "<pad>"}')
        tokens = {"added_tokens": [{"id": 6, "content": "<pad>"}]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
        assert FAMILIES[name].load_clip(tmp_path).config.text.pad_id == 6
        pad.unlink()
        (tmp_path / "tokenizer.json").unlink()


def test_a_file_that_tells_only_what_is_not_the_default_is_filled_up() -> None:
    """The first files of SigLIP hold hardly more than model_type."""
    state = make_model("siglip").state_dict()
    config = {"model_type": "siglip", "vision_config": {}, "text_config": {}}
    with pytest.raises(ValueError, match=r"missing .*encoder\.layers\.11\.layer_norm1\.bias"):
        pretrained.load_siglip(state, config=config)


def test_a_tower_named_twice_reads_the_second() -> None:
    """CLIP's old files have vision_config_dict beside vision_config."""
    model = make_model("clip")
    config = model.config.to_dict()
    config["vision_config_dict"] = config["vision_config"]
    config["vision_config"] = {"hidden_size": 7}
    ours = pretrained.load_clip(model.state_dict(), config=config)
    assert ours.config == pretrained.load_clip(model).config


def test_a_projected_image_tower_is_read_without_its_projection() -> None:
    config = make_config("clip").vision_config
    model = CLIPVisionModelWithProjection(config).eval()
    randomize(model)
    found = pretrained.load(model)
    assert isinstance(found, NaViT)
    expected = model.vision_model.encoder.layers[1].mlp.fc2.weight
    assert torch.equal(found.blocks[1].mlp.fc2.weight, expected)


@pytest.mark.parametrize("name", ["siglip2", "siglip"])
def test_without_a_pooling_head_the_tokens_are_averaged(name: str, tmp_path: Path) -> None:
    model = make_model(name, vision_use_head=False).vision_model
    family = FAMILIES[name]
    ours = family.load(model)
    assert ours.config.pool == "mean"
    family.save(ours, tmp_path)
    again = family.vision_model.from_pretrained(tmp_path)
    assert not again.use_head
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize(("log_scale", "name"), [(4.7, "siglip"), (4.7, "clip"), (4.0, "clip")])
def test_a_stored_scale_above_the_usual_bound_stays(log_scale: float, name: str) -> None:
    """SigLIP's multiplier is about 117, CLIP's 100 with some rounding."""
    model = make_model(name)
    with torch.no_grad():
        model.logit_scale.fill_(log_scale)
    ours = FAMILIES[name].load_clip(model)
    ours.limit_logit_scale_()
    assert ours.logit_scale.item() == model.logit_scale.exp().item()
    if name == "clip":
        assert ours.config.max_logit_scale == pytest.approx(max(100.0, ours.logit_scale.item()))


# What the other library cannot express


@every_family
def test_a_model_they_cannot_express_is_not_saved_and_the_fields_are_named(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    with pytest.raises(ValueError, match=r"'qk_norm': \[False\].*'pos_embed': 'fourier'"):
        family.save(NaViT(NaViTConfig.named("tiny")), tmp_path)
    whole = family.load_clip(make_model(name))
    text = replace(whole.config.text, pool="mean")
    other = CLIP(replace(whole.config, text=text))
    with pytest.raises(ValueError, match=r"TextModel .*'pool': \['last'\]"):
        family.save_clip(other, tmp_path)
    flipped = None if whole.config.init_logit_bias is not None else -10.0
    with pytest.raises(ValueError, match="logit_bias"):
        family.save_clip(CLIP(replace(whole.config, init_logit_bias=flipped)), tmp_path)
    towers = {"vision": whole.config.vision, "text": whole.config.text}
    wrong = CLIPConfig(
        **towers,
        embed_dim=32,
        image_projection=name != "clip",
        init_logit_bias=whole.config.init_logit_bias,
    )
    with pytest.raises(ValueError, match="'image_projection'"):
        family.save_clip(CLIP(wrong), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scale_beyond_its_bound_is_saved_as_it_is_applied(tmp_path: Path) -> None:
    ours = pretrained.load_clip_clip(make_model("clip"))
    with torch.no_grad():
        ours.log_logit_scale.fill_(9.0)
    pretrained.save_clip_clip(ours, tmp_path, end_id=7)
    again = FAMILIES["clip"].model.from_pretrained(tmp_path)
    assert again.logit_scale.exp().item() == pytest.approx(100, rel=1e-6)
    assert again.config.text_config.eos_token_id == 7


def test_a_tower_of_ours_with_a_text_tower_of_another_size_survives(tmp_path: Path) -> None:
    """The widths of the towers, and the space between, need not agree."""
    whole = pretrained.load_clip_clip(make_model("clip"))
    text = TextConfig.from_dict({**whole.config.text.to_dict(), "width": 16, "mlp_dim": 20})
    torch.manual_seed(0)
    ours = CLIP(replace(whole.config, text=text, embed_dim=12))
    pretrained.save_clip_clip(ours, tmp_path)
    assert isinstance(FAMILIES["clip"].model.from_pretrained(tmp_path), FAMILIES["clip"].model)
    again = pretrained.load(tmp_path)
    assert again.config == ours.config
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items()
    )


# The example of the documentation


def test_the_example_in_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("siglip2", patch_size=16)
    model.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    lines = str(pretrained.__doc__).splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    generator = np.random.default_rng(0)
    shapes = [(50, 70, 3), (64, 64, 3), (200, 90, 3)]
    names: dict[str, Any] = {"images": [generator.integers(0, 256, s, np.uint8) for s in shapes]}

    exec(code, names)

    assert names["vectors"].shape == (3, 32)
    again = FAMILIES["siglip2"].model.from_pretrained("for-transformers")
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
