"""A training step on a GPU: packed against dense, the backends, and the share of the card's rate.

Forward + backward of NaViT B and L under bfloat16 autocast on images of 36 to 256 tokens.

- *packed / dense*: useful tokens/s against equal images without packing, as many tokens, the same
  root-mean-square length (`benchmarks.dense`).
- *backends*: xformers, torch's variable-length kernel and segments, those that run here; compiled
  too where the backend allows it.
- *MFU*: model FLOP/s (`navit.train.flops`, three forward passes, nothing computed twice) over the
  rate of a large bfloat16 matrix product measured in the same run.

Wanted: packed at least 0.95 of dense, MFU 55 %. Without a CUDA device only ``quick`` runs, on the
CPU, to see that everything runs.
"""

import math
from functools import partial
from typing import Any

import torch

from benchmarks.bench_towers import Forward, mixed_images, training_step
from benchmarks.dense import dense_forward, equal_images
from benchmarks.harness import paired_ratio
from navit.model import NaViT, NaViTConfig
from navit.model.backends import resolve_backend
from navit.model.config import AttentionBackend
from navit.train.flops import STEP_OVER_FORWARD, image_flops, matmul_rate
from tests.helpers.batches import pack_images

PATCH_SIZE, SEQ_LEN = 16, 1024
BACKENDS: tuple[AttentionBackend, ...] = ("xformers", "varlen", "segments")


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Measure B and L with every backend that runs here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        print("no CUDA device here: nothing to measure")
        return []
    rate = matmul_rate(device, torch.bfloat16)
    print(f"large bfloat16 product: {rate / 1e12:.1f} TFLOP/s")
    rows = []
    for name in ("tiny",) if quick else ("b", "l"):
        rows += _measure(name, 6 if quick else 256, device, rate, quick=quick)
    return rows


def _measure(
    name: str, count: int, device: torch.device, rate: float, *, quick: bool
) -> list[dict[str, Any]]:
    images = mixed_images(count, seed=0)
    lengths = [len(image.patches) for image in images]
    batch = pack_images(images, patch_size=PATCH_SIZE, seq_len=SEQ_LEN).to(device)
    inputs = [x.to(device) for x in equal_images(lengths, PATCH_SIZE)]
    share = sum(lengths) / inputs[0][..., 0].numel()
    rows = []
    for backend in BACKENDS:
        for compiled in (False, True) if backend != "xformers" and not quick else (False,):
            config = NaViTConfig.named(name, patch_size=PATCH_SIZE, attention=backend)
            if not _runs(config, device):
                print(f"{name}, {backend}: does not run here")
                continue
            torch.manual_seed(0)
            model = NaViT(config).to(device)
            if compiled:
                model.compile()
            forwards: list[Forward] = [
                lambda model=model: model(batch).pooled,  # type: ignore[misc]
                partial(dense_forward, model, *inputs),
            ]
            packed, dense = (
                training_step(model, forward, torch.bfloat16, backward=True) for forward in forwards
            )
            timed = paired_ratio(dense, packed, pairs=2 if quick else 10, warmup=3)
            flops = STEP_OVER_FORWARD * image_flops(config, lengths)
            row = {
                "model": name,
                "backend": backend + (", compiled" if compiled else ""),
                "packed_over_dense": timed.ratio * share,
                "mfu": flops / timed.seconds_b / rate,
                "tokens_per_s": sum(lengths) / timed.seconds_b,
                "peak_mib": _peak_mib(device),
                "seconds_dense_over_packed": timed,
            }
            rows.append(row)
            print(
                f"{name}, {row['backend']:18} packed / dense {row['packed_over_dense']:.3f}, MFU "
                f"{row['mfu']:.1%}, {row['tokens_per_s']:,.0f} tokens/s, {timed}"
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


def _peak_mib(device: torch.device) -> float:
    """Return the most memory allocated since the last call; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return math.ceil(peak)
