"""Training steps on a GPU: packed against dense, other programs, the paper's mix, the loss.

Forward + backward under bfloat16 autocast (the loss in float32), on images of 8 to 256 tokens.

- `run`: NaViT B and L with xformers and torch's variable-length kernel, those that run here, the
  latter compiled too; B with segments. *packed / dense* is useful tokens/s against equal
  images without packing, as many tokens, the same root-mean-square length (`benchmarks.dense`),
  compiled where ours is. *MFU* is model FLOP/s (`navit.train.flops`, three forward passes, nothing
  computed twice) over the rate of a large bfloat16 matrix product measured in the same run.
- `run_programs`: NaViT B against towers of other programs (`benchmarks.bench_towers`), all eager.
- `run_mix`: images/s on the paper's mix against a fixed square (`benchmarks.bench_mix`), NaViT B.
- `run_loss`: the tiled contrastive loss against the dense formula, by side of a tile.

Wanted: packed at least 0.95 of dense, MFU 55 %. Without a CUDA device only ``quick`` runs, on the
CPU, to see that everything runs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_mix import compare, format_row, mixed_batch, pooled, square_batch
from benchmarks.bench_towers import (
    PATCH_SIZE,
    PEERS,
    SEQ_LEN,
    TOWERS,
    fastest,
    mixed_images,
    packed_tower,
    peers_there,
    training_step,
)
from benchmarks.dense import dense_forward, equal_images, equal_plan
from benchmarks.dense_loss import one_matmul
from benchmarks.harness import paired_ratio
from navit.loss import contrastive_loss
from navit.model import NaViT, NaViTConfig
from navit.model.backends import resolve_backend
from navit.model.config import AttentionBackend
from navit.train.flops import STEP_OVER_FORWARD, image_flops, matmul_rate
from tests.helpers.batches import pack_images

BACKENDS: tuple[tuple[AttentionBackend, bool], ...] = (
    ("xformers", False),
    ("varlen", False),
    ("segments", False),
    ("varlen", True),
)
"""Backend, and whether the model is compiled."""
Rows = list[dict[str, Any]]


def run(quick: bool = False) -> Rows:
    """Measure every backend with both sizes."""
    device = _device(quick)
    if device is None:
        return []
    rate = matmul_rate(device, torch.bfloat16)
    print(f"large bfloat16 product: {rate / 1e12:.1f} TFLOP/s")
    rows: Rows = []
    for name in ("tiny",) if quick else ("b", "l"):
        rows += _backends(name, 6 if quick else 256, device, rate, quick=quick)
    return rows


def _device(quick: bool) -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if quick:
        return torch.device("cpu")
    print("no CUDA device here: nothing to measure")
    return None


def _backends(name: str, count: int, device: torch.device, rate: float, *, quick: bool) -> Rows:
    images = mixed_images(count, seed=0)
    lengths = [len(image.patches) for image in images]
    batch = pack_images(images, patch_size=PATCH_SIZE, seq_len=SEQ_LEN).to(device)
    inputs = [x.to(device) for x in equal_images(lengths, PATCH_SIZE)]
    share = sum(lengths) / inputs[0][..., 0].numel()
    rows = []
    for backend, compiled in BACKENDS:
        config = NaViTConfig.named(name, patch_size=PATCH_SIZE, attention=backend)
        if backend == "segments" and name == "l":
            continue  # B says how slow it is
        if not _runs(config, device):
            print(f"{name}, {backend}: does not run here")
            continue
        torch.manual_seed(0)
        model = NaViT(config).to(device)
        dense_tower: Callable[..., Tensor] = dense_forward
        if compiled:
            model.compile()
            dense_tower = torch.compile(dense_forward, fullgraph=True)
        packed, dense = (
            training_step(model, forward, torch.bfloat16, backward=True)
            for forward in (
                partial(pooled, model, batch),
                partial(dense_tower, model, *inputs, equal_plan(inputs[0])),
            )
        )
        timed = paired_ratio(dense, packed, pairs=2 if quick else 6, warmup=3)
        flops = STEP_OVER_FORWARD * image_flops(config, lengths)
        row = {
            "model": name,
            "backend": backend + (", compiled" if compiled else ""),
            "packed_over_dense": timed.ratio * share,
            "mfu": flops / timed.seconds_b / rate,
            "matmul_tflops": rate / 1e12,
            "tokens_per_s": sum(lengths) / timed.seconds_b,
            "peak_mib": _peak_mib(packed, device),
            "seconds_dense_over_packed": timed,
        }
        rows.append(row)
        print(
            f"{name}, {row['backend']:18} packed / dense {row['packed_over_dense']:.3f}, MFU "
            f"{row['mfu']:.1%}, {row['tokens_per_s']:,.0f} tokens/s, {timed}",
            flush=True,
        )
    return rows


def run_programs(quick: bool = False) -> Rows:
    """Measure the towers of other programs that are installed."""
    device, name = _device(quick), "tiny" if quick else "b"
    if device is None:
        return []
    count = 6 if quick else 256
    images = mixed_images(count, seed=0)
    tokens = sum(len(image.patches) for image in images)
    config = NaViTConfig.named(name, patch_size=PATCH_SIZE)
    model, forward = packed_tower(config, images, device)
    ours = training_step(model, forward, torch.bfloat16, backward=True)
    mine = _peak_mib(ours, device)
    control = paired_ratio(ours, ours, pairs=2 if quick else 4, warmup=2)
    told = peers.missing(PEERS)
    print(f"{count} images of 8 to 256 tokens{told and f' ({told})'}")
    print(f"{name}, ours: {tokens / control.seconds_a:,.0f} tokens/s, {mine:,} MiB", flush=True)
    rows: Rows = [{"model": name, "against": "ours", "times_their_speed": control}]
    for peer in peers_there():
        side = TOWERS[peer](config, images, device)
        if peer == "vit-pytorch":
            theirs = fastest(side, torch.bfloat16, backward=True)
        else:
            theirs = training_step(*side, torch.bfloat16, backward=True)
        timed = paired_ratio(theirs, ours, pairs=2 if quick else 4, warmup=2)
        row = {
            "model": name,
            "against": peer,
            "times_their_speed": timed,
            "our_tokens_per_s": tokens / timed.seconds_b,
            "memory_of_theirs": mine / max(_peak_mib(theirs, device), 1),
        }
        rows.append(row)
        print(
            f"{name}, {peer:20} {timed.ratio:.2f} times their speed, "
            f"{row['memory_of_theirs']:.2f} of their memory, {timed}",
            flush=True,
        )
    return rows


def run_mix(quick: bool = False) -> Rows:
    """Measure images/s of both, uncompiled and compiled."""
    device, name, sequences = _device(quick), "tiny" if quick else "b", 2 if quick else 128
    if device is None:
        return []
    mix, squares = (make(sequences).to(device) for make in (mixed_batch, square_batch))
    rows = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = NaViT(NaViTConfig.named(name, patch_size=PATCH_SIZE)).to(device)
        if compiled and not quick:
            model.compile()
        called = {"model": name + (", compiled" if compiled else "")}
        pairs = 2 if quick else 10
        rows.append(called | compare(model, mix, squares, torch.bfloat16, pairs=pairs, warmup=3))
        print(f"{called['model']}: mix {format_row(rows[-1])}", flush=True)
    return rows


def run_loss(quick: bool = False) -> Rows:
    """Measure two numbers of pairs."""
    device = _device(quick)
    if device is None:
        return []
    counts = (64,) if quick else (8192, 32768)
    return [row for count in counts for row in _loss(count, device, quick=quick)]


def _loss(count: int, device: torch.device, *, quick: bool) -> Rows:
    generator = torch.Generator(device).manual_seed(0)
    vectors = torch.randn(2, count, 512, generator=generator, device=device)
    inputs = [x.requires_grad_() for x in torch.nn.functional.normalize(vectors, dim=-1)]
    inputs.append(torch.tensor(20.0, device=device, requires_grad=True))

    def step(loss: Callable[..., Tensor], **more: int) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(*inputs, **more), inputs)

    dense = step(one_matmul)
    whole = _peak_mib(dense, device)
    print(f"{count:,} pairs, D = 512, float32, forward + backward")
    rows = []
    for side in (32,) if quick else (512, 1024, 2048, 4096, 8192):
        tiled = step(contrastive_loss, chunk_size=side)
        timed = paired_ratio(tiled, dense, pairs=2 if quick else 4)
        row = {
            "num_pairs": count,
            "chunk_size": side,
            "tiled_mib": _peak_mib(tiled, device),
            "dense_mib": whole,
            "seconds_tiled_over_dense": timed,
        }
        rows.append(row)
        print(
            f"loss of {count:,} pairs, tiles of {side}: {timed.seconds_a * 1e3:.1f} ms, "
            f"{row['tiled_mib']:,} MiB of {whole:,}; tiled / dense {timed}",
            flush=True,
        )
    return rows


def _runs(config: NaViTConfig, device: torch.device) -> bool:
    try:
        resolve_backend(
            config.attention, device=device, dtype=torch.bfloat16, head_dim=config.head_dim
        )
    except (ValueError, ImportError):
        return False
    return True


def _peak_mib(step: Callable[[], Any], device: torch.device) -> int:
    """Return how much one call adds to the memory allocated, at its peak; 0 on the CPU."""
    if device.type != "cuda":
        step()
        return 0
    step()  # gradients and workspaces are there before
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return math.ceil((torch.cuda.max_memory_allocated(device) - before) / 2**20)
