"""Rules that say which tensors of ours are which of theirs, read in both directions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from navit.model.vision import PretrainedModel

Weights = Mapping[str, Tensor]
Tensors = Sequence[Tensor]
M = TypeVar("M", bound=PretrainedModel[Any])


@dataclass(frozen=True)
class Rule:
    """Tensors of ours that hold the same as tensors of theirs."""

    ours: tuple[str, ...]
    """Names in our state dict."""
    theirs: tuple[str, ...]
    """Names in theirs."""
    load: Callable[[Tensors], Tensors] = tuple
    """Theirs -> ours."""
    save: Callable[[Tensors], Tensors] = tuple
    """Ours -> theirs."""

    def under(self, ours: str, theirs: str) -> "Rule":
        """Return the rule for modules that stand under these prefixes."""
        return Rule(
            tuple(ours + name for name in self.ours),
            tuple(theirs + name for name in self.theirs),
            self.load,
            self.save,
        )


def copied(ours: str, theirs: str) -> Rule:
    """One tensor, the same in both."""
    return Rule((ours,), (theirs,))


def layer(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """Weight and bias of a linear or norm layer, the same in both."""
    return [copied(f"{ours}.{part}", f"{theirs}.{part}") for part in _parts(bias)]


def merged(ours: str, theirs: Sequence[str]) -> list[Rule]:
    """Linear layers of theirs that are one of ours, its outputs stacked."""
    return [
        Rule(
            (f"{ours}.{part}",),
            tuple(f"{name}.{part}" for name in theirs),
            lambda tensors: [torch.cat(list(tensors))],
            lambda tensors: tensors[0].chunk(len(theirs)),
        )
        for part in _parts(True)
    ]


def reshaped(ours: str, theirs: str, *shape: int) -> Rule:
    """A vector of ours that has axes of length 1 in theirs."""
    return Rule((ours,), (theirs,), lambda t: [t[0].flatten()], lambda t: [t[0].view(shape)])


def scalar(ours: str, theirs: str) -> Rule:
    """A number of ours that theirs keep as a vector of one."""
    return Rule((ours,), (theirs,), lambda t: [t[0].reshape(())], lambda t: [t[0].view(1)])


def convolved(ours: str, theirs: str, patch_size: int) -> Rule:
    """The patch embedding: (D, row column channel) of ours, (D, channel, row, column) of theirs."""
    return Rule(
        (ours,),
        (theirs,),
        lambda t: [t[0].permute(0, 2, 3, 1).flatten(1)],
        lambda t: [t[0].view(-1, patch_size, patch_size, 3).permute(0, 3, 1, 2)],
    )


def _parts(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def load_by_rules(rules: Iterable[Rule], weights: Weights, where: str) -> dict[str, Tensor]:
    """Make our state dict of theirs, in new memory and in the types theirs have.

    Raises:
        ValueError: If names are missing or left over; the message lists them.
    """
    rules = list(rules)
    wanted = {name for rule in rules for name in rule.theirs}
    missing, unknown = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or unknown:
        raise ValueError(
            f"{where} must hold exactly the tensors its configuration asks for; missing "
            f"{missing or 'none'}, unknown {unknown or 'none'}. Read it by the function for its "
            "kind of model, with its own config.json."
        )
    state: dict[str, Tensor] = {}
    for rule in rules:
        made = rule.load([weights[name].detach() for name in rule.theirs])
        state.update(zip(rule.ours, map(_own, made), strict=True))
    return state


def save_by_rules(rules: Iterable[Rule], state: Weights) -> dict[str, Tensor]:
    """Make their state dict of ours, in new memory."""
    weights: dict[str, Tensor] = {}
    for rule in rules:
        made = rule.save([state[name].detach() for name in rule.ours])
        weights.update(zip(rule.theirs, map(_own, made), strict=True))
    return weights


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def build(kind: type[M], config: Any, state: Weights, where: str) -> M:
    """Make a model of a configuration and all of its weights, in the types these have.

    Nothing is drawn at random and no memory is used twice.

    Raises:
        ValueError: If a weight's shape is not what the configuration says.
    """
    with torch.device("meta"):
        model = kind(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = {
        name: (tuple(value.shape), shapes.get(name))
        for name, value in state.items()
        if tuple(value.shape) != shapes.get(name)
    }
    if wrong:
        listed = "; ".join(f"{name} {found}, not {held}" for name, (found, held) in wrong.items())
        raise ValueError(
            f"The weights of {where} must have the shapes its configuration says; got {listed}. "
            "Pass the configuration the weights were saved with."
        )
    model.load_state_dict(state, assign=True)
    return model
