"""Contrastive losses, forward + backward: tiled with recomputation against dense, one thread.

Held equal: the vectors, scale, bias and the result. Softmax: open_clip's `ClipLoss` where it is
installed, else a twin of it that makes two products; and the best simple alternative, one product
whose transpose serves the texts. Sigmoid: open_clip's `SigLipLoss`; and a loss in chunks of rows
under autograd, which keeps all scores for the backward pass, as that of open_clip's main branch
does (its release 3.3.0 makes the whole matrix).

Extra memory is the peak of resident memory above the inputs, each variant in a process of its own,
gradients of the vectors included: both sides have them, 32 MiB at N = 8,192. Errors are those of
float32 against the dense formula in float64, on the same vectors.
"""

import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import loss_ranks, peers
from benchmarks.dense_loss import (
    CHUNK,
    one_matmul,
    sigmoid_chunks,
    sigmoid_whole,
    two_matmuls,
    value_and_gradients,
)
from benchmarks.harness import paired_ratio
from navit.loss import contrastive_loss, sigmoid_loss

DIM = 512
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Environment of the processes that measure memory: glibc gives large blocks back at once. Without
it the same loss took 325 to 736 MiB, by how the heap happened to be cut up."""
WANTED_ERROR = 2e-6
"""Largest error of value or gradients that is wanted, times the scale."""
Rows = list[dict[str, Any]]


@cache
def losses() -> dict[str, peers.Loss]:
    """Return the softmax losses and, named so, the sigmoid losses there are; ours first."""
    found: dict[str, peers.Loss] = {"tiled": contrastive_loss}
    sigmoids: dict[str, peers.Loss] = {"sigmoid tiled": sigmoid_loss}
    if peers.is_there(peers.LOSSES["open_clip"]):
        theirs, chunked = peers.open_clip_sigmoid(CHUNK)
        found["open_clip ClipLoss"] = peers.open_clip_softmax()
        sigmoids[f"sigmoid open_clip, {'chunks' if chunked else 'whole'}"] = theirs
    else:
        found["two matmuls"] = two_matmuls
        sigmoids["sigmoid whole"] = sigmoid_whole
    found["one matmul"] = one_matmul
    sigmoids["sigmoid chunks"] = sigmoid_chunks
    return found | sigmoids


def run(quick: bool = False) -> Rows:
    """Measure every size against the baselines, and the errors; ``quick`` is for the tests."""
    softmax = [name for name in losses() if not name.startswith("sigmoid")]
    sigmoid = [name for name in losses() if name.startswith("sigmoid")]
    told = peers.missing(peers.LOSSES)
    print(f"Losses, forward + backward, one thread: tiled / baseline{told and f' ({told})'}")
    print(f"{'N':>6} {'D':>5}  {'baseline':<24} {'MiB tiled':>10} {'dense':>7} {'ratio':>6}  time")
    own_process = not quick
    with _one_thread():
        if quick:
            rows = _measure(256, softmax, 2, own_process) + _measure(256, sigmoid, 2, own_process)
            return rows + _errors(256) + loss_ranks.measure((5, 0, 2, 9))
        rows = _measure(4096, softmax, 4, own_process)
        # The simple alternative says nothing new at larger sizes, and costs minutes.
        rows += _measure(8192, softmax[:2], 4, own_process)
        rows += _measure(8192, sigmoid, 2, own_process)
        rows += _measure(16384, softmax[:2], 2, own_process, warmup=0)
        return rows + _errors(4096) + loss_ranks.measure()


# Time and memory


def _measure(
    count: int, variants: list[str], pairs: int, own_process: bool, *, warmup: int = 1
) -> Rows:
    """Measure the first variant, ours, against each of the others."""
    ours, *baselines = variants
    memory = {variant: _memory(variant, count, own_process) for variant in variants}
    rows = []
    for baseline in baselines:
        time = paired_ratio(_step(ours, count), _step(baseline, count), pairs=pairs, warmup=warmup)
        ratio = memory[ours] / max(memory[baseline], 0.1)  # tiny inputs may add nothing
        print(
            f"{count:>6} {DIM:>5}  {baseline:<24} {memory[ours]:>10.1f} "
            f"{memory[baseline]:>7.1f} {ratio:>6.3f}  {time}",
            flush=True,
        )
        rows.append(
            {
                "num_pairs": count,
                "dim": DIM,
                "loss": ours,
                "baseline": baseline,
                "time_ratio": time,
                "tiled_mib": round(memory[ours], 1),
                "baseline_mib": round(memory[baseline], 1),
                "gradients_mib": round(2 * count * DIM * 4 / 2**20, 1),
                "memory_ratio": round(ratio, 4),
            }
        )
    return rows


def extra_memory(variant: str, count: int) -> float:
    """Return MiB of resident memory one forward + backward adds at its peak."""
    torch.set_num_threads(1)
    _step(variant, 64)()  # Libraries and their workspaces are loaded before the measurement.
    step = _step(variant, count)
    before = _peak_memory(reset=True)
    step()
    return _peak_memory() - before


def _step(variant: str, count: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, count, DIM, generator=generator)
    text = F.normalize(image + noise, dim=-1).requires_grad_()
    image = F.normalize(image, dim=-1).requires_grad_()
    inputs = [image, text, torch.tensor(20.0, requires_grad=True)]
    if variant.startswith("sigmoid"):
        inputs.append(torch.tensor(-10.0, requires_grad=True))
    loss = losses()[variant]
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def _memory(variant: str, count: int, own_process: bool) -> float:
    if not own_process:
        return extra_memory(variant, count)
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, _ALLOCATOR), ProcessPoolExecutor(1, context) as pool:
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


# Errors


def _errors(count: int) -> Rows:
    """Compare value and gradients in float32 with the dense formula in float64.

    The texts have nothing to do with the images: the loss is large and every score counts.
    """
    rows = []
    for variant, exact in (("tiled", one_matmul), ("sigmoid tiled", sigmoid_whole)):
        for scale in (20.0, 100.0):
            vectors = torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(2))
            numbers = [*F.normalize(vectors, dim=-1), torch.tensor(scale)]
            if exact is sigmoid_whole:
                numbers.append(torch.tensor(-10.0))
            found = value_and_gradients(losses()[variant], numbers)
            truth = value_and_gradients(exact, [number.double() for number in numbers])
            errors = [float((a - b).abs().max()) for a, b in zip(found, truth, strict=True)]
            relative = [
                error / float(value.abs().max()) for error, value in zip(errors, truth, strict=True)
            ]
            row = {
                "num_pairs": count,
                "dim": DIM,
                "loss": variant,
                "scale": scale,
                "value": float(truth[0]),
                "value_error_over_scale": errors[0] / scale,
                "gradient_error_over_scale": max(errors[1:]) / scale,
                "gradient_error_over_largest": max(relative[1:]),
                "wanted_error_over_scale": WANTED_ERROR,
            }
            print(
                f"{count:>6} {DIM:>5}  {variant}, scale {scale:g}: float32 - float64 over the "
                f"scale: value {row['value_error_over_scale']:.1e}, gradients "
                f"{row['gradient_error_over_scale']:.1e} (wanted: {WANTED_ERROR:.0e}); gradients "
                f"over their largest entry {row['gradient_error_over_largest']:.1e}",
                flush=True,
            )
            rows.append(row)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
