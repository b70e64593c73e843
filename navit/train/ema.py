"""Exponential moving average of a model's parameters, for evaluation and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from navit.train.parallel import local, sharded_like


class Ema:
    """Average over the parameters seen, each update weighing ``decay`` times its successor.

    After n updates with parameters p_1 .. p_n the average is
    ``sum_k decay^(n - k) p_k / sum_k decay^(n - k)``: the initial weights have no share, so the
    average of a young run is not biased towards them. Buffers are not averaged. The average of a
    sharded model (FSDP2) is sharded alike.

    Args:
        model: The plain model, after `parallelize`. Gives names, shapes, dtype and device; its
            present parameters are the average until the first `update`.
        decay: In [0, 1); 0.995 looks back over some 200 steps.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1); got {decay}.")
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters after an optimizer step."""
        self.num_updates += 1
        # 1 / sum_k decay^(n - k): the share of the newest parameters; 1 in the first update.
        share = (1 - self.decay) / (1 - self.decay**self.num_updates)
        # Frozen weights are their own average; the arithmetic would round them.
        learning = {name: p for name, p in self._of(model).items() if p.requires_grad}
        newest = [local(parameter) for parameter in learning.values()]
        torch._foreach_lerp_([local(self.average[name]) for name in learning], newest, share)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of ``model`` with the average."""
        for name, parameter in self._of(model).items():
            local(parameter).copy_(local(self.average[name]))

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` the averaged parameters inside the ``with`` block, then its own again."""
        own = {name: p.detach().clone() for name, p in self._of(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._of(model).items():
                    local(parameter).copy_(local(own[name]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as ``average/<parameter name>`` and ``num_updates``, not copied."""
        averages = {f"average/{name}": value for name, value in self.average.items()}
        return {**averages, "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by one that `tensors` returned, whole or sharded as the model is.

        Raises:
            ValueError: If names or shapes differ from this model's. Nothing is changed then.
        """
        expected = {name: tuple(value.shape) for name, value in self.tensors().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != expected:
            differing = sorted(dict(expected.items() ^ found.items()))
            raise ValueError(
                "Averaged parameters must have the model's names and shapes; these differ: "
                f"{', '.join(differing[:5])}. Resume with the model of the checkpoint."
            )
        self.num_updates = int(tensors["num_updates"])
        for name, value in self.average.items():
            local(value).copy_(local(sharded_like(tensors[f"average/{name}"], value)))

    def _of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters())
        if parameters.keys() != self.average.keys():
            raise ValueError(
                "The model must have the parameters the average was made from; got another set. "
                "Make a new Ema for it."
            )
        return parameters
