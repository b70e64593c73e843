"""Parameter groups, optimizers and the learning-rate schedule.

Muon orthogonalises the update of a matrix, which suits the hidden matrices of the blocks; what
meets the outside (embeddings, heads) and everything that is no matrix stays with AdamW.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

STATE_KEYS: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    torch.optim.Muon: frozenset({"momentum_buffer"}),
}
"""What each optimizer remembers of a parameter between two steps."""


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
        for name in ("learning_rate", "muon_learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite, at least 0; got {self.weight_decay}.")
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


class Optimizers:
    """One or two optimizers that together train every parameter once, used as one.

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

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, as torch keeps them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def set_lr(self, multiplier: float) -> None:
        """Set every group's learning rate to its peak times ``multiplier``."""
        for group, peak in zip(self.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier

    def step(self) -> float:
        """Clip the gradients to ``clip_norm`` and update all parameters.

        Returns:
            The norm of all gradients before clipping. If it is not finite nothing is updated,
            neither parameters nor optimizer state: the caller counts a skipped step.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm).item()
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

        Learning rates are no state: they follow from the step by `set_lr`.
        """
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        return {
            f"{names[id(parameter)]}/{key}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by one that `tensors` returned; training goes on bit-identically.

        Raises:
            ValueError: If a tensor belongs to no parameter, a parameter's state is not complete,
                or a shape differs. Nothing is changed then.
        """
        states: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            parameter_name, _, key = name.rpartition("/")
            states[parameter_name][key] = tensor
        self._check_states(states)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            # torch numbers the parameters through all groups of one optimizer.
            ordered = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {key: value.clone() for key, value in states[names[id(p)]].items()}
                for index, p in enumerate(ordered)
                if names[id(p)] in states
            }
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        keys = {
            id(parameter): STATE_KEYS[type(optimizer)]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, state in states.items():
            parameter = self.parameters.get(name)
            expected = frozenset() if parameter is None else keys[id(parameter)]
            if parameter is None or state.keys() != expected:
                raise ValueError(
                    f"Optimizer state of {name!r} must hold {sorted(expected)}; found "
                    f"{sorted(state)}. Resume with the model and optimizer of the checkpoint."
                )
            shapes = {key: tuple(value.shape) for key, value in state.items() if key != "step"}
            if any(shape != tuple(parameter.shape) for shape in shapes.values()):
                raise ValueError(
                    f"Optimizer state of {name!r} must have shape {tuple(parameter.shape)}; found "
                    f"{shapes}. Resume with the model of the checkpoint."
                )


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Deal every trainable parameter of a model to exactly one optimizer group.

    With "muon", matrices inside ``blocks`` go to `torch.optim.Muon` (a fused q, k, v matrix is
    orthogonalised as one) and all others to AdamW. Muon's step is scaled by
    0.2 sqrt(max(rows, columns)) ("match_rms_adamw"), so its learning rate and weight decay have
    AdamW's meaning.

    Args:
        model: Its parameters' names decide: see `is_hidden_matrix` and `is_decayed`.
        config: Optimizer, peak learning rates, weight decay and clipping.

    Raises:
        ValueError: If no parameter of the model is trainable.

    Source: Muon is Scalable for LLM Training (arXiv:2502.16982), section 2.2.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("The model must have a trainable parameter; all are frozen.")
    hidden: list[nn.Parameter] = []
    rest: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters.items():
        if config.optimizer == "muon" and is_hidden_matrix(name, parameter):
            hidden.append(parameter)
        else:
            rest[is_decayed(name, parameter)].append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": group, "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed, group in rest.items()
        if group
    ]
    if groups:
        optimizers.append(
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        )
    return Optimizers(optimizers, parameters, config.clip_norm)
