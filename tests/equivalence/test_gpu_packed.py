"""On a CUDA device: packed equals alone on every backend, and the host waits for nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from navit import CLIP, CLIPConfig, NaViT, NaViTConfig
from navit.loss import contrastive_loss, sigmoid_loss
from navit.model import operators
from navit.model.config import TextConfig
from navit.model.segments import group_segments, pool_segments
from packer.batch import PackedBatch
from tests.helpers.batches import (
    RandomImage,
    pack_images,
    random_images,
    random_text,
    with_garbage_in_padding,
)

pytestmark = pytest.mark.gpu

PATCH = 4
BACKENDS = [
    ("segments", torch.float64),
    ("segments", torch.float32),
    ("segments", torch.bfloat16),
    ("xformers", torch.float32),
    ("xformers", torch.bfloat16),
    ("varlen", torch.bfloat16),
]


def make_model(attention: str, **changes: object) -> NaViT:
    torch.manual_seed(0)
    config = NaViTConfig.named("tiny", patch_size=PATCH, attention=attention, **changes)
    return NaViT(config).cuda()


def vectors_and_gradients(
    model: NaViT, batches: list[PackedBatch], dtype: torch.dtype
) -> list[Tensor]:
    """Return each image's vector and the gradients of a loss that weighs all entries apart."""
    half = dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        vectors = torch.cat([model(batch.to("cuda")).pooled for batch in batches]).double()
    weights = torch.linspace(-1, 1, vectors.numel(), device="cuda", dtype=torch.float64)
    loss = (vectors * weights.view(vectors.shape)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [vectors.detach(), *(x.double() for x in gradients)]


def errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    pairs = zip(found, exact, strict=True)
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-6) for a, b in pairs])


def images_and_batches() -> tuple[list[RandomImage], PackedBatch, list[PackedBatch]]:
    images = random_images(23, seed=3, patch_size=PATCH, max_side=9)
    packed = with_garbage_in_padding(pack_images(images, patch_size=PATCH, seq_len=100))
    return images, packed, [pack_images([image], patch_size=PATCH) for image in images]


@pytest.mark.parametrize("pool", ["map", "mean", "cls"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_packed_images_have_the_vectors_and_gradients_of_images_alone(
    backend: str, dtype: torch.dtype, pool: str
) -> None:
    """float64 to 1e-10; else both are as far from float64's as rounding takes either."""
    _, packed, alone = images_and_batches()
    exact = vectors_and_gradients(make_model("segments", pool=pool).double(), alone, torch.float64)
    model = make_model(backend, pool=pool)
    if dtype == torch.float64:
        model = model.double()
    together, apart = (
        errors(vectors_and_gradients(model, batches, dtype), exact) for batches in ([packed], alone)
    )
    rounding = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert together[0] < rounding
    assert (together <= 2 * apart + rounding).all(), (together, apart)


@pytest.mark.parametrize("pool", ["map", "cls"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_another_images_pixels_change_no_bit(backend: str, dtype: torch.dtype, pool: str) -> None:
    images, _, _ = images_and_batches()
    other = list(images)
    other[7] = replace(images[7], patches=255 - images[7].patches)
    model = make_model(backend, pool=pool).eval()
    model = model.double() if dtype == torch.float64 else model
    batches = [pack_images(x, patch_size=PATCH, seq_len=100).to("cuda") for x in (images, other)]
    half = dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=half):
        before, after = (model(batch).pooled for batch in batches)
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [i == 7 for i in range(len(images))]


def test_queries_and_keys_are_normalised_in_the_type_attention_reads() -> None:
    attention = make_model("segments").blocks[0].attn
    q, k = torch.randn(2, 9, 2, attention.head_dim, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        found = attention.normed(q, k)
    assert {x.dtype for x in found} == {torch.bfloat16}
    exact = attention.q_norm(q.float())
    torch.testing.assert_close(found[0].float(), exact, rtol=2**-7, atol=2**-7)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pool", ["map", "mean", "cls"])
@pytest.mark.parametrize("backend", ["segments", "xformers", "varlen"])
def test_the_host_waits_for_nothing_in_a_forward_and_backward_pass(backend: str, pool: str) -> None:
    """So that it can plan and launch the next layers while the device computes."""
    _, packed, _ = images_and_batches()
    model = make_model(backend, pool=pool, drop_path=0.1).train()
    batch = packed.pin_memory()
    for guard in (nullcontext, no_waiting):  # the first pass allocates and loads kernels
        with guard():
            with torch.autocast("cuda", torch.bfloat16):
                vectors = model(batch.to("cuda", non_blocking=True)).pooled
            vectors.float().sum().backward()


def test_a_contrastive_step_equals_the_cpus() -> None:
    """Both towers, causal captions, the tiled loss: value and gradients."""
    images = random_images(9, seed=5, patch_size=PATCH)
    lengths = [1, 3, 8, 2, 5, 5, 1, 7, 4]
    captions = random_text(lengths, vocab_size=50, seed=2)
    batch = pack_images(images, patch_size=PATCH, captions=captions)
    shape = {"width": 32, "num_heads": 2, "depth": 2, "mlp_dim": 48}
    text = TextConfig.from_dict({**shape, "vocab_size": 50, "causal": True, "pool": "last"})
    vision = NaViTConfig.from_dict({**shape, "patch_size": PATCH})
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_dim=16)).double()

    def step(device: str) -> list[Tensor]:
        output = model.to(device)(batch.to(device))
        loss = contrastive_loss(output.image, output.text, output.logit_scale, chunk_size=4)
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return [x.cpu() for x in (loss.detach(), *grads)]

    for here, there in zip(step("cpu"), step("cuda"), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [None, 512])
def test_losses_in_float32_are_near_those_in_float64(chunk_size: int | None) -> None:
    """Value and gradients, of more pairs than a tile has."""
    torch.manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 4500, 64), dim=-1).unbind()
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    for loss, more in ((contrastive_loss, ()), (sigmoid_loss, (bias,))):
        found, exact = (
            value_and_gradients(
                partial(loss, chunk_size=chunk_size),
                [x.to(device, dtype) for x in (image, text, scale, *more)],
            )
            for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64))
        )
        for ours, value in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.cpu().double(), value, rtol=0, atol=2e-6 * 20)


def value_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pooling_in_buckets_equals_pooling_by_length(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = sorted([1, 1, 2, 3, 5, 9, 17, 17, 40, 100, 256])
    scores, x = (
        torch.randn(sum(lengths), width, device="cuda", dtype=dtype, requires_grad=True)
        for width in (3, 32)
    )
    found = operators.pool(scores, x, torch.tensor(lengths))
    plain = pool_segments(scores, x, group_segments(lengths))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(plain)
    grads = (torch.autograd.grad(y, (scores, x), weights) for y in (found, plain))
    for ours, autograd in zip(*grads, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=tolerance, atol=5 * tolerance)
