"""The central test: an image packed with others gives what it gives alone, value and gradient."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from navit import NaViT, NaViTConfig
from packer.batch import PackedBatch
from tests.helpers.batches import (
    RandomImage,
    pack_images,
    random_images,
    with_garbage_in_padding,
)
from tests.reference import dense_vit

PATCH = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CONFIGS = [
    {"pool": "map", "pos_embed": "fourier"},
    {"pool": "mean", "pos_embed": "learned", "pos_table_size": 3},
    {"pool": "map", "biases": True, "activation": "gelu_tanh"},
    {"pool": "mean", "qk_norm": False},
    {"pool": "cls", "pos_embed": "grid", "pos_table_size": 3},
    {"pool": "map", "pool_mlp": False, "num_registers": 2, "layer_scale": 0.5},
    {"pool": "cls", "num_registers": 1, "pos_embed": "sinusoidal", "pos_combine": "product"},
    {
        "pool": "mean",
        "pos_embed": "learned",
        "pos_coordinates": "absolute",
        "pos_combine": "stack",
        "pos_table_size": 4,
        "checkpointing": True,
        "drop_path": 0.4,
    },
    {"pos_embed": "grid", "pos_interpolation": "bicubic", "pos_table_size": 3},
    {  # CLIP
        "pool": "cls",
        "pos_embed": "grid",
        "pos_interpolation": "bicubic",
        "pos_table_size": 3,
        "qk_norm": False,
        "biases": True,
        "patch_bias": False,
        "pre_norm": True,
        "norm_after_pool": True,
        "norm_eps": 1e-3,
        "activation": "quick_gelu",
        "pixel_mean": (0.48, 0.46, 0.41),
        "pixel_std": (0.27, 0.26, 0.28),
    },
    {"pool": "mean", "norm_after_pool": True, "num_registers": 2, "patch_bias": True},
    {"pool": "map", "norm_after_pool": True, "pixel_std": (0.1, 0.2, 0.3)},
]


def make_model(dtype: torch.dtype, **changes: object) -> NaViT:
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", patch_size=PATCH, width=32, mlp_dim=48, **changes)
    model = NaViT(config).to(dtype).eval()  # stochastic depth is for training
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # away from ones and zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def vectors_and_gradients(
    model: nn.Module, vectors: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate a loss that weighs every entry of every vector differently."""
    loss = (vectors * weights).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = (name for name, _ in model.named_parameters())
    return vectors.detach(), dict(zip(names, gradients, strict=True))


def assert_same(
    packed: tuple[Tensor, dict[str, Tensor]],
    alone: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    torch.testing.assert_close(packed[0], alone[0], rtol=tolerance, atol=tolerance)
    for name, gradient in alone[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            packed[1][name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("changes", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 9999),
    extra=st.integers(0, 40),
)
def test_every_vector_and_gradient_is_that_of_the_images_alone(
    changes: dict[str, object],
    dtype: torch.dtype,
    count: int,
    seed: int,
    extra: int,
) -> None:
    """Random images, dropped patches, several sequences in any order, garbage in the padding."""
    model = make_model(dtype, **changes)
    images = random_images(count, seed=seed, patch_size=PATCH)
    weights = torch.randn(count, 32, dtype=dtype)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    seq_len = max(len(image.patches) for image in images) + extra
    batch = pack_images(images, patch_size=PATCH, seq_len=seq_len, order=order)

    packed = vectors_and_gradients(model, model(with_garbage_in_padding(batch)).pooled, weights)

    singles = [pack_images([image], patch_size=PATCH) for image in images]
    alone = torch.cat([model(single).pooled for single in singles])
    assert_same(packed, vectors_and_gradients(model, alone, weights), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4, unique=True),
    count=st.integers(1, 9),
    seed=st.integers(0, 9999),
)
def test_patch_sizes_mixed_in_a_batch_give_what_each_image_gives_alone(
    dtype: torch.dtype, sizes: list[int], count: int, seed: int
) -> None:
    """One buffer of weights for all sizes: gradients of every size come together in it."""
    model = make_model(dtype, patch_buffer=6, pos_embed="grid", pos_table_size=3, patch_bias=True)
    images = random_images(count, seed=seed, patch_size=sizes)
    weights = torch.randn(count, 32, dtype=dtype)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    batch = pack_images(images, seq_len=40, order=order)

    packed = vectors_and_gradients(model, model(with_garbage_in_padding(batch)).pooled, weights)

    singles = [pack_images([image]) for image in images]
    assert {single.patch_size for single in singles} <= set(sizes)
    alone = torch.cat([model(single).pooled for single in singles])
    assert_same(packed, vectors_and_gradients(model, alone, weights), TOLERANCE[dtype])


@pytest.mark.parametrize("changes", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 9999))
def test_every_vector_and_gradient_is_that_of_the_plain_model(
    changes: dict[str, object], count: int, seed: int
) -> None:
    """The reference encodes one image at a time, with full attention matrices."""
    model = make_model(torch.float64, **changes)
    images = random_images(count, seed=seed, patch_size=PATCH)
    weights = torch.randn(count, 32, dtype=torch.float64)
    batch = pack_images(images, patch_size=PATCH, seq_len=40)

    packed = vectors_and_gradients(model, model(batch).pooled, weights)

    state = dict(model.named_parameters())
    plain = torch.stack([plain_vector(model, image) for image in images])
    gradients = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(
            state.values(),
            torch.autograd.grad((plain * weights).sum(), list(state.values()), allow_unused=True),
            strict=True,
        )
    ]
    named = dict(zip(state, gradients, strict=True))
    assert_same(packed, (plain.detach(), named), 1e-10)


def plain_vector(model: NaViT, image: RandomImage) -> Tensor:
    return dense_vit.image_vector(
        dict(model.named_parameters()),
        image.patches,
        image.positions,
        image.grid,
        num_heads=model.config.num_heads,
        activation=model.config.activation,
        embedding=dense_vit.Positions(
            model.config.pos_coordinates,
            model.config.pos_combine,
            model.config.pos_table_size,
            model.config.pos_interpolation,
        ),
        style=style_of(model.config),
        pools_class_token=model.config.pool == "cls",
    )


def style_of(config: NaViTConfig) -> dense_vit.Style:
    return dense_vit.Style(
        norm_eps=config.norm_eps,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        norm_after_pool=config.norm_after_pool,
    )


def test_tokens_return_to_their_places_with_zeros_in_padding() -> None:
    model = make_model(torch.float64)
    images = random_images(7, seed=3, patch_size=PATCH)
    batch = pack_images(images, patch_size=PATCH, seq_len=30, order=[4, 0, 6, 2, 1, 5, 3])

    tokens = model(with_garbage_in_padding(batch)).tokens

    assert tokens.shape == (*batch.segment_ids.shape, 32)
    assert not tokens[batch.segment_ids == 0].any()
    for i, image in enumerate(images):
        expected = dense_vit.image_tokens(
            model.state_dict(), image.patches, image.positions, image.grid, num_heads=2
        )
        torch.testing.assert_close(tokens[mask_of(batch, i)], expected, rtol=0, atol=1e-10)


def mask_of(batch: PackedBatch, image: int) -> Tensor:
    """Places of an image's tokens."""
    b, slot = (batch.image_index == image).nonzero()[0].tolist()
    mask = torch.zeros_like(batch.segment_ids, dtype=torch.bool)
    mask[b] = batch.segment_ids[b] == slot + 1
    return mask


def test_bfloat16_is_as_close_to_float64_packed_as_alone() -> None:
    """Half precision rounds, so it is held to the error of the same images run alone."""
    images = random_images(12, seed=5, patch_size=PATCH)
    batch = pack_images(images, patch_size=PATCH, seq_len=60)
    model = make_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        packed = model(batch).pooled
        alone = torch.cat([model(pack_images([i], patch_size=PATCH)).pooled for i in images])
    exact = copy.deepcopy(model).double()(batch).pooled
    assert packed.dtype == alone.dtype
    error, alone_error = ((x.double() - exact).abs().max() for x in (packed, alone))
    assert error <= 2 * alone_error
