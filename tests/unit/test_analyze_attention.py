"""Attention weights of one image, and what is computed from them, against plain references."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from navit.analyze import attention_distance, attention_rollout
from navit.analyze.distance import uniform_distance
from navit.model import NaViT, NaViTConfig
from navit.model.inspect import (
    ImageStates,
    attention_rows,
    pool_input,
    pool_weights,
    read_states,
    split_heads,
)
from navit.model.pool import AttentionPool
from tests.helpers.batches import RandomImage, pack_images, random_image, random_images

P = 4
VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"biases": True},
    {"num_registers": 3},
    {"pool": "cls"},
    {"pool": "cls", "num_registers": 2, "biases": True, "qk_norm": False},
    {"pool": "mean", "num_registers": 1},
    {"pre_norm": True, "norm_after_pool": True, "biases": True},
    {"layer_scale": 0.3, "pool_mlp": False},
    {"patch_buffer": 6, "pos_embed": "grid", "pos_table_size": 3},
]


def make_tower(**changes: Any) -> NaViT:
    torch.manual_seed(3)
    tower = NaViT(NaViTConfig.named("tiny", patch_size=P, width=32, mlp_dim=48, **changes))
    with torch.no_grad():
        for name, value in tower.named_parameters():
            if "blocks" in name and value.ndim == 2:
                value.mul_(8)  # else attention is all but uniform
            elif name.endswith("bias"):
                value.normal_()
    return tower.double().eval()


def alone(tower: NaViT, image: RandomImage) -> ImageStates:
    (states,) = read_states(tower, pack_images([image]))
    return states


def whole(tower: NaViT, image: ImageStates, layer: int, **options: Any) -> Tensor:
    """Return all of a layer's weights, (H, n, n)."""
    rows = [w for _, w in attention_rows(tower.blocks[layer], image.states[layer], **options)]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_times_values_are_the_output_of_the_blocks_own_attention(
    changes: dict[str, Any],
) -> None:
    tower = make_tower(**changes)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, Any], out: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(out)

    for block in tower.blocks:
        block.attn.register_forward_hook(keep)
    image = alone(tower, random_image(3, 5, patch_size=P, generator=torch.Generator()))
    for layer, (block, x, out) in enumerate(zip(tower.blocks, inputs, outputs, strict=True)):
        weights = whole(tower, image, layer, chunk_values=40)
        values = split_heads(block.attn, x)[2]
        again = block.attn.proj((weights @ values).transpose(0, 1).flatten(1))
        torch.testing.assert_close(again, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[..., 0]))
    assert image.num_prefix == tower.config.num_prefix


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_states_are_those_of_the_forward_pass_and_pooling_weights_give_its_vector(
    changes: dict[str, Any],
) -> None:
    tower = make_tower(**changes)
    images = random_images(4, seed=1, patch_size=P)
    batch = pack_images(images, seq_len=40)
    output = tower(batch)
    for index, image in enumerate(read_states(tower, batch)):
        torch.testing.assert_close(image.pooled, output.pooled[index])
        tokens = pool_input(tower, image)
        expected = output.per_image()[index].tokens.flatten(0, -2)
        torch.testing.assert_close(tokens, expected)
        pool = tower.pool
        if isinstance(pool, AttentionPool):
            values = pool.v(tokens).view(len(tokens), pool.num_heads, -1)
            out = pool.proj(
                torch.einsum("hm,mhe->he", pool_weights(pool, tokens), values).flatten()
            )
            if pool.has_mlp:
                out = out + pool.mlp(pool.norm(out))
            out = tower.norm(out) if tower.config.norm_after_pool else out
            torch.testing.assert_close(out, image.pooled, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10_000), changes=st.sampled_from(VARIANTS), seq_len=st.integers(25, 80))
def test_an_image_packed_with_others_gives_the_distances_and_rollout_it_gives_alone(
    seed: int, changes: dict[str, Any], seq_len: int
) -> None:
    tower, images = make_tower(**changes), random_images(5, seed=seed, patch_size=P)
    packed = read_states(tower, pack_images(images, seq_len=seq_len))
    for image, states in zip(images, packed, strict=True):
        by_itself = alone(tower, image)
        assert states.grid == by_itself.grid == image.grid
        for a, b in zip(
            attention_distance(tower, states), attention_distance(tower, by_itself), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        a, b = attention_rollout(tower, states), attention_rollout(tower, by_itself)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def plain_distance(weights: Tensor, positions: Tensor, added: int) -> list[float]:
    """Average over queries of sum(w d) / sum(w) over patches, by head, in plain Python."""
    places = positions.tolist()
    found = []
    for head in weights[:, added:, added:].tolist():
        rows = []
        for (row, col), line in zip(places, head, strict=True):
            far = [math.hypot(row - r, col - c) for r, c in places]
            rows.append(sum(w * d for w, d in zip(line, far, strict=True)) / sum(line))
        found.append(sum(rows) / len(rows))
    return found


@pytest.mark.parametrize("changes", VARIANTS[:6], ids=str)
def test_attention_distance_is_its_definition_whatever_the_chunk(changes: dict[str, Any]) -> None:
    tower = make_tower(**changes)
    for image in random_images(3, seed=8, patch_size=P):
        states = alone(tower, image)
        for chunk in (1, 37, 2**20):
            found = attention_distance(tower, states, chunk_values=chunk)
            for layer, heads in enumerate(found.patches.tolist()):
                weights = whole(tower, states, layer)
                expected = plain_distance(weights, states.positions, states.num_prefix)
                assert heads == pytest.approx(expected, abs=1e-9)
                on_added = weights[:, states.num_prefix :, : states.num_prefix].sum(2).mean(1)
                assert found.on_added[layer].tolist() == pytest.approx(on_added.tolist())


def with_logits(tower: NaViT, scale: float) -> NaViT:
    """Make queries and keys the normalised tokens themselves, times a scale."""
    with torch.no_grad():
        for block in tower.blocks:
            block.attn.qkv.weight[:64].copy_(
                scale * torch.eye(32, dtype=torch.float64).repeat(2, 1)
            )
    return tower


def test_distance_is_0_for_identity_and_has_its_closed_form_for_uniform_attention() -> None:
    image = random_image(3, 4, patch_size=P, generator=torch.Generator().manual_seed(0))
    uniform = with_logits(make_tower(qk_norm=False), 0.0)
    found = attention_distance(uniform, alone(uniform, image)).patches
    pairs = [(a, b, c, d) for a in range(3) for b in range(4) for c in range(3) for d in range(4)]
    expected = sum(math.hypot(a - c, b - d) for a, b, c, d in pairs) / len(pairs)
    assert found.flatten().tolist() == pytest.approx([expected] * found.numel())
    assert uniform_distance(alone(uniform, image).positions) == pytest.approx(expected)
    # Layer-normalised tokens have one length, so each is nearest to itself: a large scale makes
    # attention the identity.
    identity = with_logits(make_tower(qk_norm=False, num_heads=1), 1e3)
    assert attention_distance(identity, alone(identity, image)).patches.abs().max() < 1e-9


def test_an_image_of_one_patch_looks_nowhere_else() -> None:
    tower = make_tower()
    image = random_image(1, 1, patch_size=P, generator=torch.Generator())
    assert attention_distance(tower, alone(tower, image)).patches.abs().max() == 0
    assert attention_rollout(tower, alone(tower, image)).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_rollout_is_the_product_of_mixed_layers_and_sums_to_1(changes: dict[str, Any]) -> None:
    tower = make_tower(**changes)
    states = alone(tower, random_image(4, 3, patch_size=P, generator=torch.Generator()))
    product = torch.eye(len(states.states[0]), dtype=torch.float64)
    for layer in range(len(tower.blocks)):
        mixed = 0.5 * whole(tower, states, layer).mean(0) + 0.5 * torch.eye(len(product))
        product = mixed @ product
    torch.testing.assert_close(product.sum(1), torch.ones(len(product), dtype=torch.float64))
    first = states.num_prefix
    if tower.config.pool == "cls":
        expected = product[0]
    elif tower.config.pool == "mean":
        expected = product[first:].mean(0)
    else:
        assert isinstance(tower.pool, AttentionPool)
        expected = pool_weights(tower.pool, pool_input(tower, states)).mean(0) @ product[first:]
    for chunk in (1, 50, 2**20):
        found = attention_rollout(tower, states, chunk_values=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_of_10_000_tokens_no_tensor_is_larger_than_the_chunk_asked_for() -> None:
    torch.manual_seed(0)
    tower = NaViT(NaViTConfig(width=8, depth=1, num_heads=1, mlp_dim=8, patch_size=2)).eval()
    image = random_image(100, 100, patch_size=2, generator=torch.Generator())
    states, chunk = alone(tower, image), 2**18

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.values = max(self.values, tensor.numel())
            return out

    with Largest() as largest:
        shares = attention_rollout(tower, states, chunk_values=chunk)
    assert shares.shape == (10_000,)
    assert 10_000 <= largest.values <= max(chunk, 3 * 8 * 10_000)
    with Largest() as largest:
        for _ in zip(range(3), attention_rows(tower.blocks[0], states.states[0]), strict=False):
            pass
    assert largest.values <= 2**22


def test_a_tower_in_training_or_compiled_is_refused() -> None:
    tower, batch = make_tower(), pack_images(random_images(2, seed=0, patch_size=P))
    with pytest.raises(ValueError, match="evaluation mode"):
        read_states(tower.train(), batch)
    tower.eval().compile()
    with pytest.raises(ValueError, match="uncompiled"):
        read_states(tower, batch)
