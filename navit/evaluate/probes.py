"""What image vectors know of classes: linear probe, few-shot and nearest neighbours.

Each probe is fed the training vectors as they come, keeps what it needs of them and no more, and
then scores the validation vectors. Vectors that are not finite must be left out before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from navit.evaluate.accuracy import accuracies, class_ranks, ranks_in_chunks
from navit.evaluate.ridge import Moments
from packer.plan.draws import keyed_draws_many

STRENGTHS = tuple(10.0**power for power in range(-8, 3))
"""Ridge strengths the linear probe chooses from."""
HELD_OUT = 0.1
"""Share of the training images its choice is made on."""
_SPARE = 7  # the draw no decision about packing uses


@dataclass(frozen=True)
class ProbeConfig:
    """How image vectors are probed."""

    shots: tuple[int, ...] = (1, 5, 10)
    """k: training images a class of the few-shot probes."""
    draws: int = 5
    """Few-shot sets drawn for each k; their accuracies are averaged."""
    few_shot_strength: float = 0.1
    """Ridge strength of the few-shot probes, beside the mean squared error."""
    neighbours: int = 20
    """Training images that vote in the nearest-neighbour probe."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine similarity / temperature)."""
    held_out_limit: int = 10_000
    """Most training images held out to choose the linear probe's strength on."""
    seed: int = 0
    """Seed of the keyed draws."""

    def __post_init__(self) -> None:
        for name in ("draws", "neighbours", "held_out_limit", "few_shot_strength", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if any(k < 1 for k in self.shots):
            raise ValueError(f"shots must be positive; got {list(self.shots)}.")


class LinearProbe:
    """Ridge regression on all training vectors, its strength chosen on a held-out tenth.

    Which images are held out depends on their keys alone. Afterwards the regression is solved once
    more with all of them.

    Args:
        dim: D.
        config: Its limit and seed are used.
        strengths: Ridge strengths to choose from, rising.
    """

    def __init__(
        self, dim: int, config: ProbeConfig, *, strengths: Sequence[float] = STRENGTHS
    ) -> None:
        self.config, self.strengths = config, tuple(strengths)
        self._fitted = Moments(dim)
        self._vectors = torch.zeros(0, dim)
        self._classes = torch.zeros(0, dtype=torch.int64)
        self._draws = np.zeros(0, np.uint64)

    def add(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"], keys: Sequence[str]
    ) -> None:
        """Add training vectors."""
        draws = _draws(self.config.seed, keys)
        held = torch.from_numpy(draws < np.uint64(HELD_OUT * 2**64))
        self._fitted.add(vectors[~held], classes[~held])
        self._vectors = torch.cat([self._vectors, vectors[held].float()])
        self._classes = torch.cat([self._classes, classes[held]])
        self._draws = np.concatenate([self._draws, draws[held.numpy()]])
        if len(self._draws) > 2 * self.config.held_out_limit:
            self._prune()

    def metrics(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"]
    ) -> dict[str, float]:
        """Score validation vectors.

        Returns:
            ``linear_accuracy@1``, ``@5``, ``linear_class_recall`` and the chosen
            ``linear_strength``; nothing without training vectors.
        """
        self._prune()
        if not self._fitted.count + len(self._classes):
            return {}
        strength = self.choose()
        self._fitted.add(self._vectors, self._classes)
        self._vectors, self._classes = self._vectors[:0], self._classes[:0]
        self._draws = self._draws[:0]
        solved = self._fitted.solve([strength])[0]
        ranks = ranks_in_chunks(lambda part: solved.scores(vectors[part]), classes)
        return {**accuracies(ranks, classes, "linear_"), "linear_strength": strength}

    def choose(self) -> float:
        """Return the strength with most held-out hits; of equal ones the largest."""
        if not self._fitted.count or not len(self._classes):
            return self.strengths[len(self.strengths) // 2]
        hits = [
            int((class_ranks(found.scores(self._vectors), self._classes) < 1).sum())
            for found in self._fitted.solve(self.strengths)
        ]
        return max(zip(hits, self.strengths, strict=True))[1]

    def _prune(self) -> None:
        """Move what is beyond the limit to the fitted images: those of the largest draws."""
        order = np.argsort(self._draws, kind="stable")
        kept, rest = np.split(order, [self.config.held_out_limit])
        self._fitted.add(self._vectors[rest], self._classes[rest])
        self._vectors, self._classes = self._vectors[kept], self._classes[kept]
        self._draws = self._draws[kept]


class FewShot:
    """Ridge regression on k images a class, for several k and several draws of them.

    The images of a class are ordered by keyed draws: the 5 shots of a draw hold its 1 shot, and
    the order the images come in decides nothing. At most ``max(k) * draws`` vectors a class are
    kept.

    Args:
        dim: D.
        config: Its shots, draws, strength and seed are used.

    Source: ViT (arXiv:2010.11929), section 4.1 "Metrics".
    """

    def __init__(self, dim: int, config: ProbeConfig) -> None:
        self.config = config
        self._vectors = torch.zeros(0, dim)
        self._classes = torch.zeros(0, dtype=torch.int64)
        self._draws = np.zeros((0, config.draws), np.uint64)
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._after_prune = 0

    def add(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"], keys: Sequence[str]
    ) -> None:
        """Add training vectors."""
        seeds = range(self.config.seed + 1, self.config.seed + 1 + self.config.draws)
        draws = np.stack([_draws(seed, keys) for seed in seeds], 1)
        self._vectors = torch.cat([self._vectors, vectors.float()])
        self._classes = torch.cat([self._classes, classes])
        self._draws = np.concatenate([self._draws, draws])
        size = max(len(self._counts), int(classes.max()) + 1 if len(classes) else 0)
        self._counts = F.pad(self._counts, (0, size - len(self._counts)))
        self._counts += torch.bincount(classes, minlength=size)
        if len(self._classes) > 2 * self._after_prune + 4096:
            self._prune()

    def metrics(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"]
    ) -> dict[str, float]:
        """Score validation vectors.

        Returns:
            Per k ``<k>_shot_accuracy@1``, ``@5`` and ``<k>_shot_class_recall``, means over the
            draws, and ``<k>_shot_std``, the standard deviation of the first over the draws. A class
            with fewer than k images takes part with all it has; a k that fewer than half the
            classes reach is left out.
        """
        self._prune()
        present = self._counts[self._counts > 0]
        places = self._places()
        found: dict[str, float] = {}
        for k in self.config.shots:
            if not len(present) or 2 * int((present >= k).sum()) < len(present):
                continue
            runs = [
                self._score(torch.from_numpy(places[:, draw] < k), vectors, classes, k)
                for draw in range(self.config.draws)
            ]
            found |= {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
            first = [run[f"{k}_shot_accuracy@1"] for run in runs]
            found[f"{k}_shot_std"] = float(np.std(first, ddof=1)) if len(first) > 1 else 0.0
        return found

    def _score(
        self, chosen: Tensor, vectors: Tensor, classes: Int64[Tensor, " N"], k: int
    ) -> dict[str, float]:
        moments = Moments(vectors.shape[1])
        moments.add(self._vectors[chosen], self._classes[chosen])
        solved = moments.solve([self.config.few_shot_strength])[0]
        ranks = ranks_in_chunks(lambda part: solved.scores(vectors[part]), classes)
        return accuracies(ranks, classes, f"{k}_shot_")

    def _places(self) -> np.ndarray:
        """Number the images of each class in the order of each draw: int64 (n, draws)."""
        classes = self._classes.numpy()
        places = np.zeros(self._draws.shape, np.int64)
        for column in range(self._draws.shape[1]):
            order = np.lexsort((self._draws[:, column], classes))
            ordered = classes[order]
            starts = np.searchsorted(ordered, ordered)  # where each one's class begins
            places[order, column] = np.arange(len(order)) - starts
        return places

    def _prune(self) -> None:
        chosen = self._places() < max(self.config.shots, default=0)
        kept = torch.from_numpy(np.asarray(chosen.any(1)))
        self._vectors, self._draws = self._vectors[kept], self._draws[kept.numpy()]
        self._classes = self._classes[kept]
        self._after_prune = len(self._classes)


class NearestNeighbours:
    """The k nearest training vectors vote, weighted by their cosine similarity.

    The validation vectors are held and the training vectors pass by, so that memory does not depend
    on their number.

    Args:
        queries: Validation vectors.
        config: Its neighbours and temperature are used.

    Source: DINO (arXiv:2104.14294), section 4 and appendix F.1, "k-NN classification": k of 20 and
    a temperature of 0.07 are its choices.
    """

    def __init__(self, queries: Float[Tensor, "N D"], config: ProbeConfig) -> None:
        self.config = config
        self._queries = F.normalize(queries.float(), dim=-1)
        self._similarity = torch.zeros(len(queries), 0)
        self._class = torch.zeros(len(queries), 0, dtype=torch.int64)

    def add(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"], keys: Sequence[str] = ()
    ) -> None:
        """Add training vectors."""
        gallery = F.normalize(vectors.float(), dim=-1)
        k = min(self.config.neighbours, self._similarity.shape[1] + len(gallery))
        similarity = torch.zeros(len(self._queries), k)
        neighbour = torch.zeros(len(self._queries), k, dtype=torch.int64)
        for start in range(0, len(self._queries), 1024):
            part = slice(start, start + 1024)
            new = (self._queries[part] @ gallery.T).nan_to_num_(nan=-torch.inf)
            joined = torch.cat([self._similarity[part], new], 1)
            similarity[part], places = joined.topk(k, dim=1)
            labels = torch.cat([self._class[part], classes.expand(len(new), -1)], 1)
            neighbour[part] = labels.gather(1, places)
        self._similarity, self._class = similarity, neighbour

    def metrics(self, classes: Int64[Tensor, " N"]) -> dict[str, float]:
        """Let the neighbours vote.

        Returns:
            ``knn_accuracy@1``, ``@5`` and ``knn_class_recall``; nothing without vectors.
        """
        if not self._class.numel():
            return {}
        num_classes = int(self._class.max()) + 1
        # From the nearest one's similarity on: exp(1 / 0.07) is large, its inverse small.
        votes = ((self._similarity - self._similarity[:, :1]) / self.config.temperature).exp()

        def score(part: slice) -> Tensor:
            scores = torch.zeros(len(classes[part]), num_classes)
            return scores.scatter_add_(1, self._class[part], votes[part])

        return accuracies(ranks_in_chunks(score, classes), classes, "knn_")


class Probes:
    """All probes of one set of classes.

    Args:
        vectors: Validation vectors.
        classes: Class of each.
        config: How they are probed.
        kinds: Which of "linear", "few_shot" and "knn".
    """

    def __init__(
        self,
        vectors: Float[Tensor, "N D"],
        classes: Int64[Tensor, " N"],
        config: ProbeConfig,
        kinds: Sequence[str] = ("linear", "few_shot", "knn"),
    ) -> None:
        self._vectors, self._targets = vectors, classes
        dim = vectors.shape[1]
        self._linear = LinearProbe(dim, config) if "linear" in kinds else None
        self._few_shot = FewShot(dim, config) if "few_shot" in kinds else None
        self._neighbours = NearestNeighbours(vectors, config) if "knn" in kinds else None
        self.images = 0
        """Training images added."""
        self.not_finite = 0
        """Training images left out, their vectors not being finite."""

    def add(
        self, vectors: Float[Tensor, "N D"], classes: Int64[Tensor, " N"], keys: Sequence[str]
    ) -> None:
        """Add training vectors, with the class and the key of each."""
        finite = vectors.isfinite().all(1)
        self.not_finite += int((~finite).sum())
        if not finite.all():
            vectors, classes = vectors[finite], classes[finite]
            keys = [key for key, good in zip(keys, finite.tolist(), strict=True) if good]
        self.images += len(vectors)
        for probe in (self._linear, self._few_shot, self._neighbours):
            if probe is not None and len(vectors):
                probe.add(vectors, classes, keys)

    def metrics(self) -> dict[str, float]:
        """Score the validation vectors with every probe that was given training vectors."""
        found: dict[str, float] = {}
        if self._linear is not None:
            found |= self._linear.metrics(self._vectors, self._targets)
        if self._few_shot is not None:
            found |= self._few_shot.metrics(self._vectors, self._targets)
        if self._neighbours is not None:
            found |= self._neighbours.metrics(self._targets)
        return found


def _draws(seed: int, keys: Sequence[str]) -> np.ndarray:
    """Draw a uint64 per key."""
    return keyed_draws_many(seed, 0, keys)[:, _SPARE]
