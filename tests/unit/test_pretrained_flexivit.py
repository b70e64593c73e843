"""FlexiViT as big_vision writes it: the same numbers here at every patch size, and back again.

The models are arrays of that layout and a plain re-implementation; `benchmarks.check_timm` lets
timm read what is written here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit import NaViT, NaViTConfig, pretrained
from tests.helpers.batches import RandomImage, pack_images, random_image
from tests.reference import flexivit

BUFFER, SIDE, WIDTH, HEADS, HIDDEN, DEPTH = 8, 3, 24, 2, 40, 2
SIZES = (3, 5, 8, 12)
POOLS = ("cls", "mean", "map")
every_pool = pytest.mark.parametrize("pool", POOLS)
Params = dict[str, Tensor]


def make_params(pool: str, seed: int = 0) -> Params:
    """Draw every parameter of a model under big_vision's names, with a classifier."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}

    def draw(name: str, *shape: int, scale: float = 0.3, start: float = 0.0) -> None:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        params[name] = start + scale * noise

    def dense(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        draw(f"{name}/kernel", *inputs, *outputs, scale=float(np.prod(inputs)) ** -0.5)
        draw(f"{name}/bias", *outputs)

    def norm(name: str) -> None:
        draw(f"{name}/scale", WIDTH, scale=0.2, start=1.0)
        draw(f"{name}/bias", WIDTH)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            dense(f"{name}/{part}", (WIDTH,), (HEADS, WIDTH // HEADS))
        dense(f"{name}/out", (HEADS, WIDTH // HEADS), (WIDTH,))

    def mlp(name: str) -> None:
        dense(f"{name}/Dense_0", (WIDTH,), (HIDDEN,))
        dense(f"{name}/Dense_1", (HIDDEN,), (WIDTH,))

    dense("embedding", (BUFFER, BUFFER, 3), (WIDTH,))
    draw("pos_embedding", 1, SIDE**2, WIDTH)
    if pool == "cls":
        draw("cls", 1, 1, WIDTH)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        attention(f"{block}/MultiHeadDotProductAttention_0")
        norm(f"{block}/LayerNorm_1")
        mlp(f"{block}/MlpBlock_0")
    norm("Transformer/encoder_norm")
    if pool == "map":
        draw("MAPHead_0/probe", 1, 1, WIDTH)
        attention("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0")
        mlp("MAPHead_0/MlpBlock_0")
    dense("head", (WIDTH,), (10,))
    return params


def as_image(image: RandomImage, dtype: torch.dtype) -> Tensor:
    """Put the patches of an image together, scaled to [-1, 1]: (H, W, 3)."""
    size, (rows, cols) = image.patch_size, image.grid
    pixels = image.patches.to(dtype).view(rows, cols, size, size, 3) / 127.5 - 1
    return pixels.transpose(1, 2).reshape(rows * size, cols * size, 3)


def write(path: Path, params: Params, prefix: str = "", **more: Any) -> Path:
    np.savez(path, **{f"{prefix}{name}": value.numpy() for name, value in params.items()}, **more)
    return path


@every_pool
@settings(max_examples=4, deadline=None)
@given(
    drawn=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from(SIZES)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_vectors_and_tokens_of_a_mixed_batch_are_those_of_each_image_alone(
    pool: str, drawn: list[tuple[int, int, int]], seed: int
) -> None:
    params = make_params(pool, seed)
    generator = torch.Generator().manual_seed(seed)
    images = [random_image(r, c, patch_size=size, generator=generator) for r, c, size in drawn]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        typed = {name: value.to(dtype) for name, value in params.items()}
        model = pretrained.load_flexivit(typed, patch_size=5)

        output = model(pack_images(images, seq_len=60))

        assert output.pooled.dtype == dtype
        for image, found, vector in zip(images, output.per_image(), output.pooled, strict=True):
            expected, tokens = flexivit.encode(typed, as_image(image, dtype), image.patch_size)
            torch.testing.assert_close(vector, expected, rtol=0, atol=tolerance)
            torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=tolerance)


@every_pool
def test_a_saved_model_is_the_file_it_came_from(pool: str, tmp_path: Path) -> None:
    params = make_params(pool)
    model = pretrained.load_flexivit(write(tmp_path / "theirs.npz", params))

    pretrained.save_flexivit(model, tmp_path / "made" / "ours.npz")

    with np.load(tmp_path / "made" / "ours.npz") as file:
        saved = dict(file)
    kept = {name for name in params if not name.startswith("head/")}
    assert saved.keys() == kept
    for name in kept:
        assert np.array_equal(saved[name], params[name].numpy()), name
    again = pretrained.load(tmp_path / "made" / "ours.npz")
    assert isinstance(again, NaViT)
    assert again.config == model.config


def test_the_configuration_is_read_off_the_arrays() -> None:
    config = pretrained.load_flexivit(make_params("cls")).config
    assert (config.width, config.depth, config.num_heads) == (WIDTH, DEPTH, HEADS)
    assert (config.mlp_dim, config.pos_table_size, config.pool) == (HIDDEN, SIDE, "cls")
    assert (config.patch_size, config.patch_buffer) == (16, BUFFER)
    assert (config.activation, config.norm_eps) == ("gelu_tanh", 1e-6)


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
def test_a_checkpoint_with_its_optimizer_loads(prefix: str, tmp_path: Path) -> None:
    params = make_params("mean")
    path = write(tmp_path / "run.npz", params, prefix, **{"opt/state/step": np.array(3)})
    found, expected = pretrained.load_flexivit(path), pretrained.load_flexivit(params)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_bfloat16_as_jax_writes_it_stays_what_it_is(tmp_path: Path) -> None:
    params = {name: value.bfloat16() for name, value in make_params("cls").items()}
    arrays = {name: value.view(torch.int16).numpy().view("V2") for name, value in params.items()}
    np.savez(tmp_path / "half.npz", **arrays)
    model = pretrained.load_flexivit(tmp_path / "half.npz")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.prefix.tokens, params["cls"][0])
    pretrained.save_flexivit(model, tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as file:
        assert np.array_equal(file["cls"], params["cls"].float().numpy())


def test_the_arrays_stay_as_they_were() -> None:
    arrays = {name: value.numpy() for name, value in make_params("cls").items()}
    before = {name: value.copy() for name, value in arrays.items()}
    model = pretrained.load_flexivit(arrays)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(np.array_equal(value, before[name]) for name, value in arrays.items())


def test_a_model_of_one_patch_size_is_saved_with_a_kernel_of_it(tmp_path: Path) -> None:
    fixed = pretrained.load_flexivit(make_params("cls")).at_patch_size(5)
    pretrained.save_flexivit(fixed, tmp_path / "fixed.npz")
    again = pretrained.load_flexivit(tmp_path / "fixed.npz", patch_size=5)
    assert again.config.patch_buffer == 5
    assert torch.equal(again.patch_embed.proj.weight, fixed.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pos_embedding": None}, r"missing \['pos_embedding'\]"),
        ({"Transformer/encoder_norm/scale": None}, r"missing \['Transformer/encoder_norm/scale'\]"),
        ({"pre_logits/bias": torch.zeros(3)}, r"unknown \['pre_logits/bias'\]"),
        ({"embedding/kernel": torch.zeros(8, WIDTH)}, r"other shapes \{'embedding/kernel': \(8, "),
        ({"embedding/kernel": torch.zeros(4, 8, 3, WIDTH)}, r"must be that of a square.*\(4, 8\)"),
        ({"pos_embedding": torch.zeros(1, 10, WIDTH)}, "must be a square table; got 10"),
        ({"cls": torch.zeros(1, 1, 5)}, r"prefix.tokens \(1, 5\), not \(1, 24\)"),
    ],
)
def test_what_is_no_flexivit_is_refused_by_name(
    change: dict[str, Tensor | None], words: str
) -> None:
    changed = {**make_params("cls"), **change}
    params = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        pretrained.load_flexivit(params)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a \.npz file; .*none\.npz is none"):
        pretrained.load(tmp_path / "none.npz")


def test_a_model_that_big_vision_cannot_express_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'activation': \['gelu_tanh'\].*'qk_norm': True"):
        pretrained.save_flexivit(NaViT(NaViTConfig.named("tiny")), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"ends in \.npz; got 'a\.npy'"):
        pretrained.save_flexivit(pretrained.load_flexivit(make_params("cls")), tmp_path / "a.npy")
    assert not list(tmp_path.iterdir())
