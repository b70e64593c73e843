"""`navit.loss`: tiled = dense, in value and gradient, on one process and on several."""

import socket
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.loss import contrastive_loss, sigmoid_loss
from navit.loss_tiles import tile_side
from tests.reference import contrastive as reference

few = settings(max_examples=25, deadline=None)


def vectors(
    seed: int, count: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Draw normalised image and text vectors whose pairs resemble one another."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    normalise = partial(torch.nn.functional.normalize, dim=-1)
    return normalise(image).to(dtype), normalise(image + noise).to(dtype)


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the loss and its gradient for every input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=atol, atol=atol)


@few
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 17),
    dim=st.integers(1, 9),
    chunk_size=st.integers(1, 20),
    scale=st.floats(0.1, 100),
    captions=st.none() | st.integers(1, 17),
)
def test_tiled_softmax_loss_is_the_dense_loss_in_value_and_gradient(
    seed: int, count: int, dim: int, chunk_size: int, scale: float, captions: int | None
) -> None:
    """NaViT section 2.3 asks for chunks; they must not change the loss. Ids mask duplicates."""
    image, text = vectors(seed, count, dim)
    logit_scale = torch.tensor(scale, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    ids = None if captions is None else torch.randint(captions, (count,), generator=generator)

    tiled = partial(contrastive_loss, chunk_size=chunk_size, text_ids=ids)
    dense = partial(reference.softmax_loss, text_ids=ids)

    found = with_gradients(tiled, image, text, logit_scale)
    assert_all_close(found, with_gradients(dense, image, text, logit_scale), 1e-10)


@few
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 17),
    chunk_size=st.integers(1, 20),
    scale=st.floats(0.1, 100),
    bias=st.floats(-60, 60),
)
def test_tiled_sigmoid_loss_is_the_dense_loss_in_value_and_gradient(
    seed: int, count: int, chunk_size: int, scale: float, bias: float
) -> None:
    inputs = *vectors(seed, count, 5), *torch.tensor([scale, bias], dtype=torch.float64)

    found = with_gradients(partial(sigmoid_loss, chunk_size=chunk_size), *inputs)
    assert_all_close(found, with_gradients(reference.sigmoid_loss, *inputs), 1e-10)


def test_softmax_gradients_pass_gradcheck() -> None:
    image, text = (value.requires_grad_() for value in vectors(0, 5, 3))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3])

    assert torch.autograd.gradcheck(
        partial(contrastive_loss, chunk_size=2, text_ids=ids), (image, text, scale)
    )


def test_sigmoid_gradients_pass_gradcheck() -> None:
    image, text = (value.requires_grad_() for value in vectors(0, 5, 3))
    scale, bias = torch.tensor([7.0, -3.0], dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(partial(sigmoid_loss, chunk_size=2), (image, text, scale, bias))


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_float32_features_lose_at_most_2e_6_times_the_scale(loss: str, scale: float) -> None:
    """Value and every gradient, absolutely; texts that fit no image, so that every score counts."""
    image, text = vectors(1, 300, 64, torch.float32)[0], vectors(2, 300, 64, torch.float32)[1]
    inputs = image, text, torch.tensor(scale)
    if loss == "sigmoid":
        inputs = *inputs, torch.tensor(-10.0)
        found = with_gradients(partial(sigmoid_loss, chunk_size=128), *inputs)
        exact = with_gradients(reference.sigmoid_loss, *(value.double() for value in inputs))
    else:
        found = with_gradients(partial(contrastive_loss, chunk_size=128), *inputs)
        exact = with_gradients(dense_softmax, *(value.double() for value in inputs))

    assert exact[0] > 1
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-6 * scale)
    assert all(value.dtype == torch.float32 for value in found)


def dense_softmax(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The two-matmul loss of open_clip: too quick to be a reference, quick enough for 300 rows."""
    target = torch.arange(len(image))
    per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(per_image, target) + cross_entropy(per_text, target)) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_half_precision_features_get_float32_scores_also_inside_autocast(
    loss: str, dtype: torch.dtype
) -> None:
    """Only the returned gradients are rounded to the features' dtype; the value is float32."""
    inputs = [*vectors(2, 40, 16, dtype), torch.tensor(100.0)]
    tiled, dense = partial(contrastive_loss, chunk_size=16), dense_softmax
    if loss == "sigmoid":
        inputs.append(torch.tensor(-10.0))
        tiled, dense = partial(sigmoid_loss, chunk_size=16), reference.sigmoid_loss
    exact = with_gradients(dense, *(value.double() for value in inputs))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(tiled, *inputs)

    kept = [torch.float32] * (len(inputs) - 2)
    assert [value.dtype for value in found] == [torch.float32, dtype, dtype, *kept]
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0, atol=2e-6 * 100)
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=torch.finfo(dtype).eps, atol=2e-6 * 100 / 40
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_pairs_give_zero_connected_to_the_graph(dtype: torch.dtype) -> None:
    """A rank whose batch is empty must still hand gradients to DDP."""
    image, text = vectors(0, 0, 4, dtype)
    scale, bias = torch.tensor([10.0, -10.0], dtype=dtype)

    for loss, inputs in (
        (contrastive_loss, (image, text, scale)),
        (sigmoid_loss, (image, text, scale, bias)),
    ):
        value, *grads = with_gradients(loss, *inputs)
        assert value == 0
        assert all((grad == 0).all() for grad in grads)
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in inputs]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_feature_makes_the_loss_nan(bad: float) -> None:
    """The trainer skips such a step; a finite number would hide it."""
    image, text = vectors(3, 9, 4, torch.float32)
    image[7, 1] = bad
    scale = torch.tensor(10.0)
    loss, d_image, d_text, d_scale = with_gradients(
        partial(contrastive_loss, chunk_size=4), image, text, scale
    )

    assert loss.isnan()
    assert d_image[7].isnan().any()
    assert d_text.isnan().any()
    assert d_scale.isnan()


def test_scores_beyond_the_range_of_exp_stay_exact() -> None:
    """log(exp(x).sum()) overflows above 88.7 in float32, and its parts vanish below -87."""
    image, text = vectors(4, 50, 8, torch.float32)
    image[::3] *= -1
    inputs = image, text, torch.tensor(400.0)

    found = with_gradients(partial(contrastive_loss, chunk_size=16), *inputs)
    exact = with_gradients(dense_softmax, *(value.double() for value in inputs))
    assert_all_close(found, exact, 2e-6 * 400)


def test_identical_captions_everywhere_leave_nothing_to_tell_apart() -> None:
    image, text = vectors(5, 7, 4)
    text_ids = torch.zeros(7, dtype=torch.int64)
    scale = torch.tensor(20.0, dtype=torch.float64)

    for value in with_gradients(
        partial(contrastive_loss, chunk_size=2, text_ids=text_ids), image, text, scale
    ):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)


def test_distinct_ids_change_nothing() -> None:
    image, text = vectors(6, 7, 4)
    scale = torch.tensor(20.0, dtype=torch.float64)

    with_ids = contrastive_loss(image, text, scale, chunk_size=3, text_ids=torch.arange(7))
    torch.testing.assert_close(with_ids, contrastive_loss(image, text, scale), rtol=0, atol=1e-13)


@pytest.mark.parametrize("trained", ["image", "text", "scale"])
def test_a_frozen_side_gets_no_gradient_and_changes_no_other(trained: str) -> None:
    """Locked-image tuning trains one tower; the other side's product is not computed."""
    names = ("image", "text", "scale")
    inputs = dict(
        zip(names, (*vectors(7, 6, 3), torch.tensor(9.0, dtype=torch.float64)), strict=True)
    )
    every = dict(zip(names, with_gradients(contrastive_loss, *inputs.values())[1:], strict=True))
    inputs[trained].requires_grad_()

    contrastive_loss(*inputs.values(), chunk_size=4).backward()

    torch.testing.assert_close(inputs[trained].grad, every[trained], rtol=0, atol=1e-13)
    assert all(inputs[name].grad is None for name in names if name != trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a positive"),
        ({"text_ids": torch.zeros(3, dtype=torch.int64)}, "one id per pair"),
        ({"text": torch.zeros(3, 2)}, "same shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"image": torch.zeros(4, 2), "text": torch.zeros(4, 2), **change}
    # The undecorated function: in tests the shape checker would refuse the shapes first.
    function = getattr(contrastive_loss, "__wrapped__", contrastive_loss)
    with pytest.raises(ValueError, match=message):
        function(logit_scale=torch.tensor(1.0), **arguments)


def test_a_gpus_tiles_are_larger_than_a_cpus() -> None:
    assert tile_side(None, torch.device("cpu")) == 512
    assert tile_side(None, torch.device("cuda")) == 4096
    assert tile_side(7, torch.device("cuda")) == 7


WORLDS = [(3, 5), (4, 0), (1, 6, 2), (0, 0, 3), (0, 0), (5, 0, 2, 1), (1, 4, 3, 6)]


def _rank(rank: int, port: int, results: Any) -> None:
    """Compute every world's loss on this rank; smaller worlds use a sub-group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    found = {}
    for counts in WORLDS:
        if rank >= len(counts):
            continue
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        image, text = (value[own] for value in vectors(8, sum(counts), 4))
        scale, bias = torch.tensor([9.0, -4.0], dtype=torch.float64)
        shared: dict[str, Any] = {"chunk_size": 3, "group": groups[len(counts)]}
        softmax = partial(contrastive_loss, text_ids=repeated_ids(counts)[own], **shared)
        sigmoid = partial(sigmoid_loss, **shared)
        found[counts, "softmax"] = as_lists(with_gradients(softmax, image, text, scale))
        found[counts, "sigmoid"] = as_lists(with_gradients(sigmoid, image, text, scale, bias))
    dist.destroy_process_group()
    results.put((rank, found))


def repeated_ids(counts: tuple[int, ...]) -> Tensor:
    return torch.arange(sum(counts)) % 5


def as_lists(values: tuple[Tensor, ...]) -> list[Any]:
    """Make values that travel by pickle alone; tensors would be shared by file descriptor."""
    return [value.tolist() for value in values]


def test_ranks_with_uneven_counts_share_one_exact_loss() -> None:
    """Equal values; the mean of the ranks' gradients (what DDP takes) is the global gradient."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    # Joins all ranks, and raises the first error of any.
    multiprocessing.spawn(_rank, (port, results), nprocs=4)
    collected = [found for _, found in sorted((results.get() for _ in range(4)), key=itemgetter(0))]

    for counts in WORLDS:
        image, text = vectors(8, sum(counts), 4)
        scale, bias = torch.tensor([9.0, -4.0], dtype=torch.float64)
        softmax = partial(reference.softmax_loss, text_ids=repeated_ids(counts))
        for loss, exact in (
            ("softmax", with_gradients(softmax, image, text, scale)),
            ("sigmoid", with_gradients(reference.sigmoid_loss, image, text, scale, bias)),
        ):
            ranks = [found[counts, loss] for found in collected if (counts, loss) in found]
            assert len(ranks) == len(counts)
            _assert_ranks_share(
                [[torch.tensor(v, dtype=torch.float64) for v in rank] for rank in ranks], exact
            )


def _assert_ranks_share(ranks: list[list[Tensor]], exact: tuple[Tensor, ...]) -> None:
    value, d_image, d_text, *d_scalars = exact
    for found in ranks:
        torch.testing.assert_close(found[0], value, rtol=0, atol=1e-10)
    for position, expected in ((1, d_image), (2, d_text)):
        rows = torch.cat([found[position].reshape(-1, 4) for found in ranks])
        torch.testing.assert_close(rows / len(ranks), expected, rtol=0, atol=1e-10)
    for position, expected in enumerate(d_scalars, start=3):
        mean = torch.stack([found[position] for found in ranks]).mean()
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-10)
