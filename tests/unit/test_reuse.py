"""Reuse modules: resizes against torch's own, zero starts, and their operations."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from navit.dvt import DVT, DVTConfig, dvt_flops, reuse_flops
from navit.dvt.resample import plan_resize, resize_relations
from navit.dvt.reuse import Reuse
from navit.model import NaViTConfig
from tests.helpers.batches import pack_images
from tests.helpers.stages import stage_images

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=25, deadline=None)
@given(
    grids=st.lists(st.tuples(GRIDS, GRIDS), min_size=1, max_size=4),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_packed_features_are_resized_as_each_image_by_interpolate(
    grids: list[tuple[tuple[int, int], tuple[int, int]]], prefix: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = zip(*grids, strict=True)
    features = [torch.randn(r * c, 3, generator=generator, dtype=torch.float64) for r, c in old]
    # The old tokens stand in any order of the images.
    order = torch.randperm(len(old), generator=generator).tolist()
    lengths = np.array([len(features[i]) for i in order])
    starts = np.empty(len(old), dtype=np.int64)
    starts[order] = np.cumsum(lengths) - lengths

    resize = plan_resize(old, new, starts, prefix=prefix, device=torch.device("cpu"))
    found = resize(torch.cat([features[i] for i in order]))

    expected = []
    for x, before, after in zip(features, old, new, strict=True):
        picture = x.T.view(1, 3, *before)
        larger = F.interpolate(picture, size=after, mode="bilinear", align_corners=False)
        expected += [torch.zeros(prefix, 3, dtype=torch.float64), larger.flatten(2)[0].T]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(old=GRIDS, new=GRIDS, prefix=st.integers(0, 2), seed=st.integers(0, 999))
def test_relations_are_resized_by_interpolating_keys_and_then_queries(
    old: tuple[int, int], new: tuple[int, int], prefix: int, seed: int
) -> None:
    size = prefix + old[0] * old[1]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)

    found = resize_relations(logits, old, new, prefix=prefix)

    larger = interpolate_last(logits, old, new, prefix)
    expected = interpolate_last(larger.transpose(2, 3), old, new, prefix).transpose(2, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(old=GRIDS, new=GRIDS, prefix=st.integers(0, 2))
def test_the_resize_of_relations_is_the_products_with_the_block_diagonal_matrix(
    old: tuple[int, int], new: tuple[int, int], prefix: int
) -> None:
    """U = blockdiag(1, u_rows (x) u_cols), made in full, on both sides."""
    one_axis = [
        F.interpolate(torch.eye(a, dtype=torch.float64)[None], size=b, mode="linear")[0].T.numpy()
        for a, b in zip(old, new, strict=True)
    ]
    u = torch.block_diag(torch.eye(prefix), torch.from_numpy(np.kron(*one_axis)))
    logits = torch.randn(1, 2, u.shape[1], u.shape[1], dtype=torch.float64)
    found = resize_relations(logits, old, new, prefix=prefix)
    torch.testing.assert_close(found, u @ logits @ u.T, rtol=0, atol=1e-12)


def interpolate_last(
    x: torch.Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int
) -> torch.Tensor:
    """Resize the last axis of (n, C, rows, prefix + grid) picture by picture."""
    added, grid = x[..., :prefix], x[..., prefix:]
    pictures = grid.reshape(-1, 1, *old)
    larger = F.interpolate(pictures, size=new, mode="bilinear", align_corners=False)
    return torch.cat([added, larger.reshape(*grid.shape[:-1], -1)], dim=-1)


def tiny(**changes: object) -> DVTConfig:
    vision = NaViTConfig.named("tiny", patch_size=4, width=32, mlp_dim=48, pool="cls")
    return replace(DVTConfig(vision, 5, context_dim=6, context_hidden=10), **changes)


@pytest.mark.parametrize("kind", ["feature_reuse", "relation_reuse"])
def test_a_module_is_there_only_where_it_is_asked_for(kind: str) -> None:
    reuse = Reuse(tiny(**{"feature_reuse": False, "relation_reuse": False, kind: True}))
    assert bool(len(reuse.blocks)) == (kind == "feature_reuse")
    assert (reuse.relation is not None) == (kind == "relation_reuse")
    assert any(parameter.abs().sum() > 0 for parameter in reuse.parameters())


def test_operations_of_the_reuse_modules_equal_a_hand_sum() -> None:
    """2 layers, 2 heads, width 32, MLP 48; from 2 x 3 to 3 x 4 patches, one class token."""
    config = tiny()
    mlp = 6 * 2 * (32 * 10 + 10 * 6)  # on the 6 old patches
    taps = 13 * 2 * 4 * 6  # 12 new patches and the class token, 4 old tokens each
    join = 13 * 2 * 6 * 48
    relations = 7 * 7 * 2 * (4 * 12 + 12 * 4)  # the MLP over 4 channels on 7 x 7 pairs
    rows_then_cols = 2 * 3 * 4 + 4 * 2 * 3  # (2 x 3) -> (2 x 4) -> (3 x 4)
    resized = 2 * 4 * (7 + 13) * rows_then_cols
    features = 2 * (mlp + taps + join)
    assert reuse_flops(config, (2, 3), (3, 4)) == features + relations + resized
    assert reuse_flops(tiny(relation_reuse=False), (2, 3), (3, 4)) == features
    assert reuse_flops(tiny(feature_reuse=False), (2, 3), (3, 4)) == relations + resized


@pytest.mark.parametrize("feature", [False, True])
def test_operations_equal_those_torch_counts(feature: bool) -> None:
    """With dense attention every product is one that torch's counter sees."""
    config = tiny(feature_reuse=feature, num_stages=3)
    model = DVT(config).double()
    grids = [[(1, 2), (2, 2)], [(2, 3), (3, 3)], [(3, 4), (4, 4)]]
    batches = [pack_images(images) for images in stage_images(grids, seed=0)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batches)
    assert counter.get_total_flops() == dvt_flops(config, grids).sum()


def test_stages_of_different_images_have_no_common_cost() -> None:
    with pytest.raises(ValueError, match=r"grid for each image; got \[1, 2\]"):
        dvt_flops(tiny(), [[(1, 1)], [(1, 1), (2, 2)]])


def test_an_image_costs_more_at_every_stage() -> None:
    costs = dvt_flops(tiny(), [[(1, 2)], [(2, 4)], [(4, 8)]])[:, 0].tolist()
    assert all(a < b for a, b in pairwise(costs))
