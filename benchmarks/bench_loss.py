"""Contrastive loss, forward + backward: tiled with recomputation against dense, one thread.

Held equal: the vectors, the scale and the result. Two dense baselines: the two-matmul loss
of open_clip, and the best simple alternative, one matmul whose transpose serves the texts.
Extra memory is the peak of resident memory above the inputs, each variant in a process of its
own, gradients included.
"""

import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import paired_ratio
from navit.loss import contrastive_loss

DIM = 512


def two_matmuls(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the loss as open_clip does: scores per image and per text, each by a product."""
    target = torch.arange(len(image))
    per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def one_matmul(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the loss from one dense matrix of scores and its transpose."""
    target = torch.arange(len(image))
    scores = logit_scale * image @ text.T
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "tiled": contrastive_loss,
    "two matmuls": two_matmuls,
    "one matmul": one_matmul,
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure every size against both baselines; ``quick`` is for the tests."""
    print("Contrastive loss, forward + backward, one thread: tiled / baseline")
    print(f"{'N':>6} {'D':>5}  {'baseline':<12} {'MiB tiled':>10} {'dense':>7} {'ratio':>6}  time")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for count, pairs in ((256, 2),) if quick else ((4096, 10), (8192, 4)):
            rows += _measure(count, pairs, own_process=not quick)
    finally:
        torch.set_num_threads(threads)
    return rows


def extra_memory(variant: str, count: int) -> float:
    """Return MiB of resident memory one forward + backward adds at its peak."""
    torch.set_num_threads(1)
    _step(variant, 64)()  # Libraries and their workspaces are loaded before the measurement.
    step = _step(variant, count)
    before = _peak_memory(reset=True)
    step()
    return _peak_memory() - before


def _measure(count: int, pairs: int, *, own_process: bool) -> list[dict[str, Any]]:
    memory = {variant: _memory(variant, count, own_process) for variant in VARIANTS}
    rows = []
    for baseline in ("two matmuls", "one matmul"):
        time = paired_ratio(_step("tiled", count), _step(baseline, count), pairs=pairs)
        ratio = memory["tiled"] / max(memory[baseline], 1e-9)
        print(
            f"{count:>6} {DIM:>5}  {baseline:<12} {memory['tiled']:>10.1f} "
            f"{memory[baseline]:>7.1f} {ratio:>6.3f}  {time}",
            flush=True,
        )
        rows.append(
            {
                "num_pairs": count,
                "dim": DIM,
                "baseline": baseline,
                "time_ratio": time,
                "tiled_mib": round(memory["tiled"], 1),
                "baseline_mib": round(memory[baseline], 1),
                "memory_ratio": round(ratio, 4),
            }
        )
    return rows


def _step(variant: str, count: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, count, DIM, generator=generator)
    text = F.normalize(image + noise, dim=-1).requires_grad_()
    image = F.normalize(image, dim=-1).requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    loss = VARIANTS[variant]
    return lambda: torch.autograd.grad(loss(image, text, scale), (image, text, scale))


def _memory(variant: str, count: int, own_process: bool) -> float:
    if not own_process:
        return extra_memory(variant, count)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(extra_memory, variant, count).result()


def _peak_memory(*, reset: bool = False) -> float:
    """Return this process's peak resident memory in MiB; since the last reset on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found, "every Linux reports VmHWM"
        return int(found[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    run(quick="--quick" in sys.argv)
