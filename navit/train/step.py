"""One optimizer step's loss and gradients, however its images are split.

The global batch of a step is split over ranks and, on each rank, over batches one after another
(accumulation). Parts are weighted by their global number of images, never averaged as means, so
that the loss and its gradients do not depend on the split.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from navit.train.parallel import average_unsharded, no_gradient_exchange
from navit.train.ranks import World
from navit.train.tasks import Output, Task
from packer.batch import PackedBatch

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StepLoss:
    """What a step's forward and backward passes gave; equal on every rank."""

    loss: float
    """Mean over all images of all ranks and batches; 0 without images."""
    images: int
    """Images of all ranks and batches. Without any there are no gradients: take no step."""


def gradients(
    task: Task,
    model: nn.Module,
    batches: Sequence[PackedBatch],
    world: World,
    *,
    autocast_dtype: torch.dtype | None = None,
    cache: bool = False,
) -> StepLoss:
    """Set ``.grad`` of every parameter to the gradient of the step's loss, on every rank.

    Every rank calls it, with equally many batches, also where some or all of its own are empty.
    The gradients of an earlier step must have been forgotten (``zero_grad``). A loss that is not
    finite is so on every rank.

    Args:
        task: Its loss.
        model: What `parallelize` returned for the task's model.
        batches: This rank's batches, on the host or on the device.
        world: The ranks.
        autocast_dtype: Type of autocast in the forward passes; None for none.
        cache: Whether all batches share one loss where the task couples images (contrastive): a
            pass without gradients gives all vectors, the loss their gradients, and a second pass
            takes these, batch by batch, to the parameters (GradCache, arXiv:2101.06983). Otherwise
            each batch, of all ranks, has a loss of its own. Stochastic depth draws alike in both
            passes.
    """
    counts = world.sum([batch.num_images for batch in batches])
    images = int(sum(counts))
    # Left out by every rank alike: a batch that is empty on all.
    batches = [batch for batch, count in zip(batches, counts, strict=True) if count]
    weights = [count / images for count in counts if count]
    if not images:
        return StepLoss(0.0, 0)
    passes = _Passes(task, model, world, autocast_dtype)
    cached = cache and task.couples_images and len(batches) > 1
    loss = passes.cached(batches) if cached else passes.plain(batches, weights)
    average_unsharded(model, world)
    return StepLoss(loss.item(), images)


@dataclass(frozen=True)
class _Passes:
    """Forward and backward passes over the batches of a step."""

    task: Task
    model: nn.Module
    world: World
    autocast_dtype: torch.dtype | None

    def plain(self, batches: Sequence[PackedBatch], weights: Sequence[float]) -> Tensor:
        """Give each batch its own loss; return their weighted sum."""
        losses = []
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            with self._exchange(last=i == len(batches) - 1):
                output = self._forward(batch)
                loss, grads = self._vector_gradients(output, [batch], weight)
                losses.append(loss * weight)
                _backward(output, grads)
        return torch.stack(losses).sum()

    def cached(self, batches: Sequence[PackedBatch]) -> Tensor:
        """Give all batches one loss; return it."""
        states, outputs = [], []
        for batch in batches:
            states.append(_random_state(self.world.device))
            with torch.no_grad():
                outputs.append(self._forward(batch))
        loss, grads = self._vector_gradients(_join(outputs), batches, 1.0)
        shares = _split(grads, [_tensors(output) for output in outputs])
        for i, batch in enumerate(batches):
            _set_random_state(self.world.device, states[i])
            with self._exchange(last=i == len(batches) - 1):
                _backward(self._forward(batch), shares[i])
        return loss

    def _exchange(self, *, last: bool) -> Any:
        return nullcontext() if last else no_gradient_exchange(self.model)

    def _forward(self, batch: PackedBatch) -> Output:
        device, dtype = self.world.device, self.autocast_dtype
        batch = batch.to(device, non_blocking=True)
        # An autocast of its own for each pass: weights that one casts without gradients are kept
        # to its end, and a pass with gradients must not meet them.
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output: Output = self.model(batch)
        return output

    def _vector_gradients(
        self, output: Output, batches: Sequence[PackedBatch], weight: float
    ) -> tuple[Tensor, Tensors]:
        """Return the loss, and ``weight`` times its gradient by each tensor of the output."""
        leaves = {name: t.detach().requires_grad_() for name, t in _tensors(output).items()}
        loss = self.task.loss(_rebuilt(output, leaves), batches, self.world.group)
        # Zeros for what this loss does not read: DDP and FSDP2 wait for every parameter.
        grads = torch.autograd.grad(
            loss, list(leaves.values()), loss.new_tensor(weight), materialize_grads=True
        )
        return loss.detach(), dict(zip(leaves, grads, strict=True))


def _backward(output: Output, grads: Tensors) -> None:
    tensors = {name: t for name, t in _tensors(output).items() if t.requires_grad}
    torch.autograd.backward(list(tensors.values()), [grads[name] for name in tensors])


def _tensors(output: Output) -> Tensors:
    """Name the tensors of a model's output: the fields of a dataclass, or the tensor it is."""
    if not is_dataclass(output):
        return {"": output}
    named = {item.name: getattr(output, item.name) for item in fields(output)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _rebuilt(output: Output, tensors: Tensors) -> Output:
    return replace(output, **tensors) if is_dataclass(output) else tensors[""]


def _join(outputs: Sequence[Output]) -> Output:
    """Concatenate what has one row per image; take once what the batches share."""
    named = [_tensors(output) for output in outputs]
    joined = {
        name: torch.cat([tensors[name] for tensors in named]) if value.ndim else value
        for name, value in named[0].items()
    }
    return _rebuilt(outputs[0], joined)


def _split(grads: Tensors, outputs: Sequence[Tensors]) -> list[Tensors]:
    """Undo `_join`: rows to their batches, the gradient of what is shared to the last batch."""
    shares: list[Tensors] = [{} for _ in outputs]
    for name, grad in grads.items():
        if grad.ndim:
            parts = grad.split_with_sizes([len(tensors[name]) for tensors in outputs])
        else:
            parts = (*[torch.zeros_like(grad)] * (len(outputs) - 1), grad)
        for share, part in zip(shares, parts, strict=True):
            share[name] = part
    return shares


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
