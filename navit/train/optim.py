"""Parameter groups, optimizers and the learning-rate schedule.

Muon orthogonalises the update of a matrix, which suits the hidden matrices of the blocks; what
meets the outside (embeddings, heads) and everything that is no matrix stays with AdamW. Parameters
may be sharded (FSDP2): updates and norms are those of the whole ones.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from navit.train.parallel import is_sharded, local, sharded_like


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule; lengths in optimizer steps."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """"muon": Muon for the blocks' matrices and AdamW for the rest; "adamw": AdamW for all."""
    learning_rate: float = 1e-3
    """AdamW's peak learning rate."""
    muon_learning_rate: float = 2e-3
    """Muon's peak learning rate, scaled so that updates have the size of AdamW's."""
    weight_decay: float = 0.05
    """Decoupled, times the learning rate; not for vectors, scalars and position tables."""
    head_weight_decay: float | None = None
    """Of a classifier's head, in place of `weight_decay`; None: the same. The paper's for JFT are
    3.0 for the head and 0.03 for the body, at a learning rate of 8e-4."""
    head_learning_rate_factor: float = 1.0
    """Times the learning rate, for a classifier's head: above 1 for a new head on a trained
    tower."""
    tower_learning_rate_factor: float = 1.0
    """Times the learning rates, for the image tower: below 1 where it starts from trained
    weights."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay of the first and second moment."""
    muon_momentum: float = 0.95
    """Muon's decay of the (Nesterov) momentum."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly to its peak."""
    timescale: int = 10_000
    """Steps after warm-up in which the rsqrt decay reaches 1/sqrt(2) of the peak."""
    cooldown_steps: int = 200
    """Last steps of the run, in which the learning rate falls linearly to 0."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together; math.inf turns clipping off."""

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon'; got {self.optimizer!r}.")
        factors = ("head_learning_rate_factor", "tower_learning_rate_factor")
        for name in ("learning_rate", "muon_learning_rate", "clip_norm", *factors):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("weight_decay", "head_weight_decay"):
            decay = getattr(self, name)
            if decay is not None and not 0 <= decay < math.inf:
                raise ValueError(f"{name} must be finite, at least 0; got {decay}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas}.")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"muon_momentum must be in [0, 1); got {self.muon_momentum}.")
        for name, least in (("warmup_steps", 0), ("timescale", 1), ("cooldown_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")


def learning_rate_factor(step: int, config: OptimConfig, total_steps: int) -> float:
    """Return the share of the peak learning rate used by a step.

    Three factors are multiplied: a linear warm-up ``(step + 1) / warmup_steps``; the reciprocal
    square root ``sqrt(timescale / (timescale + steps since warm-up))``; and a linear cool-down
    ``(total_steps - step) / cooldown_steps``.

    Args:
        step: Steps done before this one; the first step is 0.
        config: Lengths of warm-up, decay and cool-down.
        total_steps: Steps of the whole run.

    Returns:
        A factor in [0, 1]. It is positive for every step of the run and, with a cool-down, 0
        from ``total_steps`` on.

    Raises:
        ValueError: If ``step`` is negative or ``total_steps`` not positive.

    Source: NaViT (arXiv:2307.06304), training details: "reciprocal square-root with warm-up and
    cool-down", the schedule of Scaling Vision Transformers (arXiv:2106.04560).
    """
    if step < 0 or total_steps < 1:
        raise ValueError(
            "step must be at least 0 and total_steps at least 1; "
            f"got step {step}, total_steps {total_steps}."
        )
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    since_warmup = max(0, step - config.warmup_steps)
    decay = math.sqrt(config.timescale / (config.timescale + since_warmup))
    left = max(0, total_steps - step)
    cooldown = min(1.0, left / config.cooldown_steps) if config.cooldown_steps else 1.0
    return warmup * decay * cooldown


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix inside the blocks of a transformer, so Muon may train it."""
    return parameter.ndim == 2 and "blocks" in name.split(".")[:-1]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to vectors, scalars, position tables."""
    return parameter.ndim >= 2 and "pos_embed" not in name.split(".")


def blank_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer remembers of a parameter before the first step: zeros."""
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class Optimizers:
    """One or more optimizers that together train every parameter once, used as one.

    Build it with `build_optimizers`.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        parameters: dict[str, nn.Parameter],
        clip_norm: float,
    ) -> None:
        self.optimizers = optimizers
        self.parameters = parameters
        self.clip_norm = clip_norm
        self._peaks = [group["lr"] for group in self.param_groups]
        # Now and not at the first step: a checkpoint is read into the state that is there.
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = blank_state(optimizer, parameter)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, as torch keeps them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, multiplier: float) -> None:
        """Set every group's learning rate to its peak times ``multiplier``."""
        for group, peak in zip(self.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier

    def step(self) -> float:
        """Clip the gradients to ``clip_norm`` and update all parameters; a collective if sharded.

        Returns:
            The norm of all gradients before clipping, equal on every rank. If it is not finite
            nothing is updated, neither parameters nor optimizer state: the caller counts a skipped
            step.
        """
        norm = clip_gradients(list(self.parameters.values()), self.clip_norm)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        return norm

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as ``<parameter name>/<state name>`` -> tensor, not copied.

        It is complete from the start, and sharded as the parameters are. Learning rates are no
        state: they follow from the step by `set_lr`.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            f"{names[id(parameter)]}/{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by one that `tensors` returned; training goes on bit-identically.

        Args:
            tensors: Whole, or sharded as the parameters are. Parameters without a state start anew.

        Raises:
            ValueError: If a tensor belongs to no parameter, a parameter's state is not complete,
                or a shape differs. Nothing is changed then.
        """
        own = self.tensors()
        self._check_states(tensors, own)
        for name, value in own.items():
            if name in tensors:
                local(value).copy_(local(sharded_like(tensors[name], value)))
            else:
                local(value).zero_()

    def _check_states(self, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        expected, given = (_by_parameter(tensors) for tensors in (own, found))
        for name, state in given.items():
            wanted = expected.get(name, {})
            if state.keys() != wanted.keys():
                raise ValueError(
                    f"Optimizer state of {name!r} must hold {sorted(wanted)}; found "
                    f"{sorted(state)}. Resume with the model and optimizer of the checkpoint."
                )
            if state != wanted:
                shape = tuple(self.parameters[name].shape)
                raise ValueError(
                    f"Optimizer state of {name!r} must have shape {shape}; found {state}. Resume "
                    "with the model of the checkpoint."
                )


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Sort the shapes of a state by parameter."""
    states: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        states[parameter_name][key] = tuple(tensor.shape)
    return states


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale all gradients together so that their norm is at most ``limit``.

    Args:
        parameters: Whole or sharded; a collective if any is sharded.
        limit: The largest norm.

    Returns:
        The norm before, equal on every rank.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    sharded = [grad for grad in grads if is_sharded(grad)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit).item()
    # As parts: lists of torch's fused operations must not hold both kinds.
    parts = [local(grad) for grad in sharded]
    rest = [grad for grad in grads if not is_sharded(grad)]
    squared = nn.utils.get_total_norm(parts).double() ** 2
    dist.all_reduce(squared, group=sharded[0].device_mesh.get_group())
    if rest:
        squared += nn.utils.get_total_norm(rest).double() ** 2
    norm = squared.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_
    torch._foreach_mul_([*parts, *rest], factor.to(parts[0].dtype))
    return norm.item()


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Deal every trainable parameter of a model to exactly one optimizer group.

    With "muon", matrices inside ``blocks`` go to `torch.optim.Muon` (a fused q, k, v matrix is
    orthogonalised as one) and all others to AdamW. Muon's step is scaled by
    0.2 sqrt(max(rows, columns)) ("match_rms_adamw"), so its learning rate and weight decay have
    AdamW's meaning.

    Args:
        model: The plain model, after `parallelize`. Its parameters' names decide: see
            `is_hidden_matrix` and `is_decayed`; ``head.`` is a classifier's head, ``vision.`` the
            image tower.
        config: Optimizer, peak learning rates, weight decays and clipping.

    Raises:
        ValueError: If no parameter of the model is trainable.

    Source: Muon is Scalable for LLM Training (arXiv:2502.16982), section 2.2.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("The model must have a trainable parameter; all are frozen.")
    groups: dict[tuple[bool, bool], dict[tuple[float, float], list[nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        hidden = config.optimizer == "muon" and is_hidden_matrix(name, parameter)
        # torch's fused updates take no list of both sharded and whole tensors.
        kind = groups.setdefault((hidden, is_sharded(parameter)), {})
        rate, decay = _rate_and_decay(name, parameter, config, hidden=hidden)
        kind.setdefault((rate, decay), []).append(parameter)
    optimizers = [
        _optimizer(
            [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in found.items()],
            config,
            hidden=hidden,
            sharded=sharded,
        )
        for (hidden, sharded), found in sorted(groups.items(), reverse=True)
    ]
    return Optimizers(optimizers, parameters, config.clip_norm)


def _rate_and_decay(
    name: str, parameter: Tensor, config: OptimConfig, *, hidden: bool
) -> tuple[float, float]:
    part = name.split(".")[0]
    factors = {
        "head": config.head_learning_rate_factor,
        "vision": config.tower_learning_rate_factor,
    }
    rate = config.muon_learning_rate if hidden else config.learning_rate
    decay = config.weight_decay
    if part == "head" and config.head_weight_decay is not None:
        decay = config.head_weight_decay
    return rate * factors.get(part, 1.0), decay if is_decayed(name, parameter) else 0.0


def _optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, hidden: bool, sharded: bool
) -> torch.optim.Optimizer:
    if not hidden:
        return torch.optim.AdamW(groups, betas=config.betas, fused=True)
    kind = torch.optim.Muon
    if sharded:
        from navit.train.muon import ShardedMuon

        kind = ShardedMuon
    return kind(groups, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
