"""Which attention backend can run where, and which one is chosen."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch

from navit.model.config import AttentionBackend

XFORMERS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VARLEN_DTYPES = (torch.float16, torch.bfloat16)
VARLEN_MAX_HEAD_DIM = 256
VARLEN_MODULE = "torch.nn.attention.varlen"
VARLEN_MIN_CAPABILITY = (8, 0)
"""Compute capability torch's variable-length kernel (FlashAttention 2) is built for."""


def resolve_backend(
    backend: AttentionBackend,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compiled: bool = False,
) -> AttentionBackend:
    """Choose what runs the attention: on CUDA xformers, else varlen, where they can; "segments".

    Args:
        backend: The configured backend; "auto" picks.
        device: Where the tokens are.
        dtype: Type the attention is computed in (under autocast, autocast's).
        head_dim: Size of one head.
        compiled: Whether the model is compiled: "auto" then leaves out xformers.

    Raises:
        ValueError: If a backend is asked for where it cannot run.
        ImportError: If a backend is asked for and not installed.
    """
    if backend == "segments":
        return backend
    if backend == "auto":
        names = [name for name in _RUNS if not (compiled and name == "xformers")]
        able = [name for name in names if _RUNS[name](device, dtype, head_dim)]
        there = (name for name in able if _is_installed(name, device, dtype, head_dim))
        return next(there, "segments")
    if not _RUNS[backend](device, dtype, head_dim):
        raise ValueError(
            f"Attention backend {backend!r} needs {_NEEDS[backend]}; got {device.type}, {dtype}, "
            f"{head_dim}. Set attention='auto' or 'segments', or move the model."
        )
    if not _is_installed(backend, device, dtype, head_dim):
        raise ImportError(
            f"Attention backend {backend!r} needs {_MISSING[backend]}, or set attention='auto' or "
            "'segments'."
        )
    return backend


def _runs_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return device.type == "cuda" and dtype in XFORMERS_DTYPES and head_dim % 8 == 0


def _runs_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    fits = head_dim % 8 == 0 and head_dim <= VARLEN_MAX_HEAD_DIM
    return device.type == "cuda" and dtype in VARLEN_DTYPES and fits


def _is_installed(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> bool:
    if backend == "xformers":
        return find_spec("xformers") is not None and _xformers_computes(device, dtype, head_dim)
    return (
        find_spec(VARLEN_MODULE) is not None
        and torch.cuda.get_device_capability(device) >= VARLEN_MIN_CAPABILITY
    )


@cache
def _xformers_computes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try xformers once, forward and backward, on two segments.

    Its wheels are built for one version of CUDA. Beside a torch of another it can be imported, says
    so in a warning of its own, and has no kernels. The trial has a thread of its own, where
    gradients, autocast, hooks and modes are those of a fresh program.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_xformers, device, dtype, head_dim).result()


def _try_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            x = torch.zeros(1, 3, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
            mask = BlockDiagonalMask.from_seqlens([1, 2], device=device)
            torch.autograd.grad(memory_efficient_attention(x, x, x, attn_bias=mask).sum(), x)
    except torch.OutOfMemoryError:
        raise
    # A library that does not load, no operator for these inputs, no kernel for this device.
    except (ImportError, OSError, RuntimeError):
        return False
    return True


_RUNS: dict[AttentionBackend, Callable[[torch.device, torch.dtype, int], bool]] = {
    "xformers": _runs_xformers,
    "varlen": _runs_varlen,
}
_NEEDS = {
    "xformers": (
        "a CUDA device, float16, bfloat16 or float32, and a head size that is a multiple of 8"
    ),
    "varlen": (
        "a CUDA device, float16 or bfloat16, and a head size that is a multiple of 8 and at most "
        f"{VARLEN_MAX_HEAD_DIM}"
    ),
}
_MISSING = {
    "xformers": (
        "the package xformers with kernels for this device and this torch's version of CUDA. Run "
        "`pip install xformers`, or, where it is installed, `python -m xformers.info`, which says "
        "what it was built for"
    ),
    "varlen": (
        f"torch.nn.attention.varlen (torch 2.10 or newer) and a device of compute capability "
        f"{VARLEN_MIN_CAPABILITY[0]}.{VARLEN_MIN_CAPABILITY[1]} or above; one is missing. Upgrade "
        "torch"
    ),
}
