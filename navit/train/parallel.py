"""One model on many ranks: DDP or FSDP2, and the way back to plain tensors.

`parallelize` returns what a training step calls. The plain model keeps its names: optimizer,
average, checkpoint and evaluation go on with it. Under FSDP2 its parameters become `DTensor`s, of
which each rank holds a part.

FSDP2 is imported where it is used: it takes as long as torch itself, and few runs shard.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from navit.model.vision import PretrainedModel
from navit.train.ranks import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

Strategy = Literal["auto", "ddp", "fsdp2"]
M = TypeVar("M", bound=PretrainedModel[Any])


@dataclass(frozen=True)
class ParallelConfig:
    """How one step is shared by ranks (torchrun) and by batches one after another."""

    strategy: Strategy = "auto"
    """"ddp": every rank holds the whole model; "fsdp2": each holds a part of every parameter, its
    gradient and its optimizer state; "auto": ddp. One process alone holds the plain model."""
    accumulate: int = 1
    """Batches a rank trains on in one optimizer step, one after another."""
    gradient_cache: bool = False
    """For pairs with `accumulate` above 1. False: each batch, of all ranks, has its own loss and
    negatives. True: all batches of a step share one exact loss, for one more forward pass
    (GradCache, arXiv:2101.06983)."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others before it fails: longer than an evaluation takes."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy must be 'auto', 'ddp' or 'fsdp2'; got {self.strategy!r}.")
        if isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1 batch; got {self.accumulate}.")
        if not self.timeout_minutes > 0:
            raise ValueError(f"timeout_minutes must be positive; got {self.timeout_minutes}.")


def parallelize(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """Return what a training step calls: ``model`` itself, or a wrapper that averages gradients.

    Call it once the model is on its device, and before optimizer and average are made: FSDP2
    replaces the parameters of ``model``. Every rank starts with the weights of rank 0.

    Args:
        model: Its submodules named ``blocks`` are sharded block by block, the rest as one.
        world: The ranks.
        config: The strategy.

    Returns:
        ``model`` where there is one rank or FSDP2 (which changes it in place), else DDP around it.
    """
    if world.group is None:
        return model
    if config.strategy != "fsdp2":
        return DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            process_group=world.group,
            gradient_as_bucket_view=True,
        )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0, group=world.group)
    _shard(model, world.group, world.device.type)
    return model


def _shard(model: nn.Module, group: dist.ProcessGroup, device_type: str) -> None:
    """Give each rank a part of every parameter; forward passes gather them block by block."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device_type)
    # A tensor without axes cannot be split: every rank keeps it, see `average_unsharded`.
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}
    for name, blocks in model.named_modules():
        if name.split(".")[-1] == "blocks" and isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for module in model.modules():
        if _is_fsdp(module):  # gloo has no averaging reduction
            module.set_force_sum_reduction_for_comms(device_type == "cpu")


@contextmanager
def no_gradient_exchange(wrapped: nn.Module) -> Iterator[None]:
    """Inside the block forward and backward passes add to this rank's own gradients.

    The first backward pass after it exchanges them all. Does nothing to a plain model.
    """
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif _is_fsdp(wrapped):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
    else:
        yield


def average_unsharded(wrapped: nn.Module, world: World) -> None:
    """Average the gradients that FSDP2 left to each rank: those of scalars. A collective there."""
    grads = [p.grad for p in wrapped.parameters() if p.grad is not None and not is_sharded(p)]
    if grads and _is_fsdp(wrapped):
        together = torch.stack(grads)
        dist.all_reduce(together, group=world.group)
        torch._foreach_copy_(grads, list((together / world.size).unbind()))


def _is_fsdp(module: nn.Module) -> "TypeGuard[FSDPModule]":
    return hasattr(module, "set_requires_gradient_sync")


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each rank holds a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, in the same memory; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors for sharded ones, on every rank; a collective where any is sharded."""
    return {
        name: value.full_tensor() if is_sharded(value) else value for name, value in tensors.items()
    }


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Return ``value``, cut as ``target`` is if that is sharded and ``value`` is whole.

    No collective: every rank passes the same whole tensor.
    """
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def whole_model(model: M) -> M:
    """Return a model that this rank can call alone: ``model``, or a whole copy of a sharded one.

    A collective where the model is sharded. Evaluation and export read the copy; nothing done to
    it comes back.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    with torch.random.fork_rng(devices=[]):  # a new model draws weights, on the CPU
        plain = type(model)(model.config)
    example = next(model.parameters())
    plain.to(device=example.device, dtype=example.dtype)
    plain.load_state_dict(whole(model.state_dict()))
    return plain.train(model.training)
