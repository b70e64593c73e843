"""`Cascade`: sure answers are kept, the other images are packed anew with more tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from navit.cascade.outcomes import check_thresholds
from navit.cascade.run import Answer, CascadeRun, CascadeStats
from navit.cascade.stage import Stage
from navit.cascade.thresholds import CascadeThresholds
from navit.embed.parts import check_images


@dataclass(frozen=True, eq=False)
class CascadeOutput:
    """The answers to N images, in input order."""

    logits: Float[Tensor, "N C"]
    """Class logits of the stage each image left at; NaN for one that could not be read."""
    stages: Int64[Tensor, " N"]
    """Stage each left at, from 0; -1 for one that could not be read."""
    confidence: Float[Tensor, " N"]
    """Largest probability."""
    tokens: Int64[Tensor, "N K"]
    """Tokens spent on each image at each stage; 0 where it was not run."""
    keys: tuple[str, ...]
    """Key of each image."""
    stats: CascadeStats
    """Counts and times."""

    @classmethod
    def join(
        cls, answers: Sequence[Answer], num_stages: int, stats: CascadeStats
    ) -> "CascadeOutput":
        """Put the answers of a pass together."""
        known = [answer.logits for answer in answers if answer.logits is not None]
        missing = torch.full_like(known[0], torch.nan) if known else torch.zeros(0)
        rows = [missing if answer.logits is None else answer.logits for answer in answers]
        tokens = [answer.tokens for answer in answers]
        return cls(
            logits=torch.stack(rows) if rows else torch.zeros(0, 0),
            stages=torch.tensor([answer.stage for answer in answers], dtype=torch.int64),
            confidence=torch.tensor([a.confidence for a in answers], dtype=torch.float64),
            tokens=torch.tensor(tokens, dtype=torch.int64).reshape(-1, num_stages),
            keys=tuple(answer.key for answer in answers),
            stats=stats,
        )


class Cascade:
    """Classifies images in stages of growing token budgets.

    Every image is run at the first stage. One whose largest probability reaches the stage's
    threshold leaves with its answer; the others are packed anew, from their source, into dense
    sequences of the next stage, together with all that wait for it, so that batches are as full
    there as anywhere. The last stage keeps what it gets.

    An image that the next stage would see with the very same pixels (it is small, and images are
    not enlarged) passes it without being run again; it counts no tokens there.

    Args:
        stages: One or more, cheapest first; `budget_stages` makes those of one network.
        thresholds: K - 1 values, or what a rule of `navit.cascade` has solved.
        sequences_per_batch: B of every stage.
        device: Where the networks are; None: where the first one's weights are.
        autocast_dtype: Precision of the matrix products; None leaves autocast off.
        max_held: Answers that may wait for an earlier image's; when there are more, the stages
            run what they have, be it less than a batch.

    Raises:
        ValueError: If there is no stage, or a number is out of range.

    Source: DVT (arXiv:2105.15075), without its reuse modules; NaViT
    (arXiv:2307.06304), appendix D. That one network serves all stages, and that the undecided are
    packed anew, is ours.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        thresholds: CascadeThresholds | Sequence[float] = (),
        *,
        sequences_per_batch: int = 8,
        device: torch.device | str | None = None,
        autocast_dtype: torch.dtype | None = None,
        max_held: int = 8192,
    ) -> None:
        if not stages:
            raise ValueError("a cascade must have at least one stage; got none.")
        if sequences_per_batch < 1 or max_held < 1:
            raise ValueError(
                "sequences_per_batch and max_held must be at least 1; got "
                f"{sequences_per_batch} and {max_held}."
            )
        values = thresholds.values if isinstance(thresholds, CascadeThresholds) else thresholds
        self.stages = tuple(stages)
        self.thresholds = check_thresholds(values, len(self.stages))
        self.sequences_per_batch, self.max_held = sequences_per_batch, max_held
        weights = next(self.stages[0].model.parameters(), torch.zeros(0))
        self.device = weights.device if device is None else torch.device(device)
        self.autocast_dtype = autocast_dtype

    def run(self, samples: Iterable[Any]) -> CascadeRun:
        """Classify images of any number, read as they are needed.

        Args:
            samples: Encoded bytes, uint8 arrays or tensors (H, W, 3), PIL images or paths; or
                samples with a key and a label, as in `packer.sample.as_sample`.

        Returns:
            An iterator over the answers, in input order. An image that cannot be read is answered
            with stage -1 and counted in `CascadeRun.stats`; one that breaks only at a later stage
            keeps the answer it had.

        Raises:
            ValueError: If ``samples`` is a single image; on the way, if an item is no image.
            TooManyFailures: On the way, after ``max_failures_in_row`` broken images in a row.
        """
        check_images(samples, "nan")
        return CascadeRun(
            self.stages,
            self.thresholds,
            samples,
            sequences_per_batch=self.sequences_per_batch,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
            max_held=self.max_held,
        )

    def __call__(self, samples: Iterable[Any]) -> CascadeOutput:
        """Classify images and return all answers together; see `run`."""
        run = self.run(samples)
        answers = list(run)
        return CascadeOutput.join(answers, len(self.stages), run.stats)
