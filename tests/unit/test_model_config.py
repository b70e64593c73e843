"""Configurations of the towers: named sizes, errors that name the choices, JSON and back."""

import json

import pytest

from navit import CLIPConfig, NaViTConfig, TextConfig


@pytest.mark.parametrize("name", ["tiny", "ti", "s", "b", "l"])
def test_a_named_size_takes_changes(name: str) -> None:
    config = NaViTConfig.named(name, patch_size=8, pool="mean")
    assert (config.patch_size, config.pool, config.qk_norm, config.biases) == (
        8,
        "mean",
        True,
        False,
    )
    assert config.head_dim * config.num_heads == config.width
    assert TextConfig.named(name, vocab_size=100).width == config.width


def test_sizes_are_those_of_the_vit_papers() -> None:
    sizes = {
        name: (c.width, c.depth, c.num_heads, c.mlp_dim)
        for name in ("ti", "s", "b", "l")
        for c in [NaViTConfig.named(name)]
    }
    assert sizes == {
        "ti": (192, 12, 3, 768),
        "s": (384, 12, 6, 1536),
        "b": (768, 12, 12, 3072),
        "l": (1024, 24, 16, 4096),
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NaViTConfig.named("huge"), ["'tiny', 'ti', 's', 'b', 'l'", "'huge'"]),
        (lambda: NaViTConfig.named("s", patchsize=8), ["'patchsize'", "'patch_size'"]),
        (lambda: CLIPConfig.from_dict({"embedding": 3}), ["'embedding'", "'embed_dim'"]),
        (lambda: NaViTConfig(width=100, num_heads=3), ["multiple of num_heads", "100 and 3"]),
        (lambda: NaViTConfig(width=33, num_heads=3), ["even width", "33"]),
        (lambda: NaViTConfig(depth=0), ["depth", "positive", "0"]),
        (lambda: NaViTConfig(patch_size=-1), ["patch_size", "-1"]),
        (lambda: TextConfig(vocab_size=0), ["vocab_size"]),
        (lambda: CLIPConfig(init_logit_scale=200.0), ["max_logit_scale", "200"]),
        (lambda: NaViTConfig(width=390, pos_combine="stack"), ["multiple of 4", "390"]),
        (
            lambda: NaViTConfig(pos_embed="grid", pos_combine="product"),
            ["one table over both axes", "'product'"],
        ),
        (
            lambda: NaViTConfig(pos_embed="grid", pos_coordinates="absolute"),
            ["one table over both axes", "'absolute'"],
        ),
        (
            lambda: NaViTConfig(pos_interpolation="bicubic"),
            ["for pos_embed 'grid'", "'bicubic'", "'fourier'"],
        ),
        (lambda: NaViTConfig(pool="mean", pool_mlp=False), ["needs pool 'map'", "'mean'"]),
        (lambda: NaViTConfig(num_registers=-1), ["num_registers", "-1"]),
        (lambda: NaViTConfig(layer_scale=0.0), ["layer_scale must be positive", "0.0"]),
        (lambda: NaViTConfig(drop_path=1.0), ["drop_path must be in [0, 1)", "1.0"]),
        (lambda: TextConfig(pool="cls"), ["'map', 'mean' or 'last'", "'cls'"]),
        (lambda: NaViTConfig(pool="last"), ["'map', 'mean' or 'cls'", "'last'"]),
        (lambda: NaViTConfig(norm_eps=0.0), ["norm_eps must be between 0 and 1", "0.0"]),
        (lambda: NaViTConfig(pixel_std=(0.5, 0.0, 0.5)), ["pixel_std positive", "(0.5, 0.0, 0.5)"]),
        (lambda: TextConfig(pad_id=8192), ["below vocab_size (8192)", "8192"]),
        (lambda: TextConfig(pad_id=-1), ["pad_id must be a token id", "-1"]),
        (lambda: TextConfig(pad_id=1, causal=True), ["pad_id must be None with causal", "1"]),
        (
            lambda: CLIPConfig(image_projection=False, embed_dim=512),
            ["the image tower's width (384)", "512"],
        ),
    ],
)
def test_an_error_names_what_must_hold_and_what_was_found(make, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "setting", [{"pool": "max"}, {"attention": "flash"}, {"activation": "relu"}, {"pos_embed": "x"}]
)
def test_an_unknown_choice_lists_the_choices(setting: dict[str, str]) -> None:
    """Under the type-checking hook beartype objects first; either way the name is refused."""
    with pytest.raises(Exception, match=next(iter(setting.values()))):
        NaViTConfig(**setting)


def test_a_configuration_survives_json() -> None:
    config = CLIPConfig(
        vision=NaViTConfig.named("tiny", pos_embed="learned", pixel_mean=(0.1, 0.2, 0.3)),
        text=TextConfig.named("tiny", vocab_size=77),
        embed_dim=32,
        init_logit_bias=-10.0,
    )
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert NaViTConfig.from_dict(config.vision.to_dict()) == config.vision
