"""How much arithmetic a batch is, and how much the device could do: the two sides of MFU.

Counted are the matrix products of the towers and their heads, from segment lengths alone. A step
is three forward passes' worth: the backward pass has two products for each of the forward's. What
is computed a second time to save memory (activation checkpointing, gradient caching) is not
counted, nor are the products of the loss: model FLOPs utilization as in PaLM (arXiv:2204.02311),
appendix B.
"""

from time import perf_counter

import torch

from navit.model.flops import batch_flops, image_flops, text_flops

__all__ = ["STEP_OVER_FORWARD", "batch_flops", "image_flops", "matmul_rate", "text_flops"]

STEP_OVER_FORWARD = 3
"""Arithmetic of a training step in forward passes."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product.

    The fastest of a few counts, at least three and for a tenth of a second. The random state of the
    process stays as it was. The factors are random: a GPU multiplies constants faster than it does
    anything that a model has, since they draw less power.

    Args:
        device: Where the product runs.
        dtype: Type of its factors: that of the model's products.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    left, right = torch.randn(2, size, size, generator=generator, device=device, dtype=dtype)
    seconds: list[float] = []  # the first product warms up, and may be the slowest
    while len(seconds) < 4 or sum(seconds) < 0.1:
        _wait(device)
        start = perf_counter()
        left @ right
        _wait(device)
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
