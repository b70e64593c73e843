"""`model.compile()`: what a tower runs on the device as one graph, for batches of any lengths.

The plan of a batch (which tokens belong to which segment) is made on the host from integers, so it
stays outside; what follows is one graph without breaks in which the number of tokens, of segments
and of images is dynamic. Batches of fewer than two images run uncompiled: torch would compile a
size of 1 apart.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn

from navit.model.attention import AttentionPlan


class CompiledTower(nn.Module):
    """A tower whose ``encode`` can be compiled."""

    encode: Callable[..., Any]
    """Everything that runs on the device, reading the lengths only as tensors."""

    _graph: Callable[..., Any] | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._graph is not None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the tower at its next batch; its numbers stay the same but for rounding.

        Meant for GPUs, and for many batches: the first takes up to a minute. On a CPU it gains
        nothing in float32 (docs/experiments.md). The attention backend
        must be "segments" or "varlen"; "auto" then leaves xformers out, whose masks hold the
        lengths as Python numbers and would be compiled anew for every batch.

        Args:
            args: As for `torch.compile`.
            options: As for `torch.compile`; ``fullgraph`` and ``dynamic`` are on if not given.

        Raises:
            ValueError: If the configuration asks for xformers.
        """
        asked = getattr(self.config, "attention", "auto")
        if asked == "xformers":
            raise ValueError(
                "attention must be 'auto', 'segments' or 'varlen' to compile a model; got "
                "'xformers', whose masks would be compiled anew for every batch. Set "
                "attention='auto'."
            )
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": True}
        if "isolate_recompiles" in signature(torch.compile).parameters:  # torch 2.13
            # Else all towers of a process share one small cache: they run the same code.
            settings["isolate_recompiles"] = True
        self._graph = torch.compile(self.encode, *args, **settings | options)

    def graph(self, *plans: AttentionPlan) -> Callable[..., Any]:
        """Return what runs a batch of these plans: the compiled ``encode``, or ``encode``."""
        if self._graph is None or len(plans[0].lengths) < 2:
            return self.encode
        for plan in plans:
            plan.make_tensors()
        return self._graph

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the graph, which cannot be copied: a copy is not compiled."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_graph": None}
