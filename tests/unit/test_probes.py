import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from navit.evaluate.accuracy import class_ranks
from navit.evaluate.probes import (
    HELD_OUT,
    FewShot,
    LinearProbe,
    NearestNeighbours,
    ProbeConfig,
    Probes,
)
from navit.evaluate.ridge import Moments
from packer.plan.draws import keyed_draws

SMALL = ProbeConfig(shots=(1, 3), draws=2, neighbours=4)


Data = tuple[Tensor, Tensor, list[str]]


def clusters(
    count: int, seed: int, *, num_classes: int = 4, dim: int = 6, noise: float = 1.0
) -> Data:
    """Vectors around one centre a class, their classes and keys."""
    centres = np.random.default_rng(99).normal(size=(num_classes, dim)) * 2
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, num_classes, count)
    vectors = centres[classes] + noise * rng.normal(size=(count, dim))
    keys = [f"s.tar/{seed}-{i}" for i in range(count)]
    return torch.tensor(vectors, dtype=torch.float32), torch.from_numpy(classes), keys


def shuffled(data: Data, seed: int) -> Data:
    order = np.random.default_rng(seed).permutation(len(data[2]))
    return data[0][order], data[1][order], [data[2][i] for i in order]


def in_parts(data: Data, parts: int) -> Iterator[Data]:
    for part in np.array_split(np.arange(len(data[2])), parts):
        yield data[0][part], data[1][part], [data[2][i] for i in part]


@given(
    seed=st.integers(0, 99),
    train=st.integers(1, 12),
    queries=st.integers(1, 5),
    k=st.integers(1, 15),
    temperature=st.sampled_from([0.07, 1.0]),
    parts=st.integers(1, 4),
)
def test_neighbours_vote_as_counted_one_by_one(
    seed: int, train: int, queries: int, k: int, temperature: float, parts: int
) -> None:
    data = clusters(train, seed, dim=3)
    wanted = clusters(queries, seed + 1000, dim=3)
    config = ProbeConfig(neighbours=k, temperature=temperature)
    probe = NearestNeighbours(wanted[0], config)
    for vectors, classes, keys in in_parts(data, parts):
        probe.add(vectors, classes, keys)

    found = probe.metrics(wanted[1])

    hits = []
    gallery = [(v / v.norm(), int(c)) for v, c in zip(data[0], data[1], strict=True)]
    for query, own in zip(wanted[0], wanted[1].tolist(), strict=True):
        near = sorted(((float(query / query.norm() @ v), c) for v, c in gallery), reverse=True)[:k]
        votes = [sum(math.exp(s / temperature) for s, c in near if c == x) for x in range(4)]
        hits.append(votes[own] > max(v for x, v in enumerate(votes) if x != own))
    assert found["knn_accuracy@1"] == pytest.approx(sum(hits) / max(len(hits), 1))


def test_the_linear_probe_chooses_its_strength_on_the_keyed_tenth() -> None:
    train, val = clusters(300, 0, noise=3), clusters(80, 1, noise=3)
    probe = LinearProbe(6, ProbeConfig(seed=3))
    for part in in_parts(train, 7):
        probe.add(*part)
    held = [keyed_draws(3, 0, key).spare < HELD_OUT * 2**64 for key in train[2]]
    assert 10 < sum(held) < 60

    fitted, everything = Moments(6), Moments(6)
    mask = torch.tensor(held)
    fitted.add(train[0][~mask], train[1][~mask])
    everything.add(train[0], train[1])
    right = {
        strength: float((solved.scores(train[0][mask]).argmax(1) == train[1][mask]).double().mean())
        for strength in probe.strengths
        for solved in fitted.solve([strength])
    }
    best = max(strength for strength in right if right[strength] == max(right.values()))
    scores = everything.solve([best])[0].scores(val[0])

    metrics = probe.metrics(val[0], val[1])

    assert metrics["linear_strength"] == best
    assert metrics["linear_accuracy@1"] == pytest.approx(
        float((scores.argmax(1) == val[1]).double().mean())
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 99), limit=st.integers(1, 40), parts=st.integers(1, 9))
def test_what_is_held_out_depends_on_the_keys_alone_and_is_bounded(
    seed: int, limit: int, parts: int
) -> None:
    train, val = clusters(200, seed), clusters(30, seed + 500)
    results = []
    for data, pieces in ((train, 1), (shuffled(train, seed), parts)):
        probe = LinearProbe(6, ProbeConfig(held_out_limit=limit))
        for part in in_parts(data, pieces):
            probe.add(*part)
        results.append(probe.metrics(*val[:2]))
    assert results[0] == pytest.approx(results[1])


def test_few_shots_are_the_images_of_the_smallest_draws() -> None:
    train, val = clusters(60, 2, noise=2), clusters(50, 3, noise=2)
    probe = FewShot(6, SMALL)
    for part in in_parts(shuffled(train, 5), 4):
        probe.add(*part)

    metrics = probe.metrics(*val[:2])

    for k in (1, 3):
        found = []
        for seed in (1, 2):
            rows = []
            for c in range(4):
                members = [i for i in range(60) if train[1][i] == c]
                members.sort(key=lambda i: keyed_draws(seed, 0, train[2][i]).spare)
                rows += members[:k]
            moments = Moments(6)
            moments.add(train[0][rows], train[1][rows])
            scores = moments.solve([SMALL.few_shot_strength])[0].scores(val[0])
            found.append(float((class_ranks(scores, val[1]) < 1).double().mean()))
        assert metrics[f"{k}_shot_accuracy@1"] == pytest.approx(np.mean(found))
        assert metrics[f"{k}_shot_std"] == pytest.approx(np.std(found, ddof=1))


def test_only_the_shots_are_kept_of_a_long_stream() -> None:
    probe = FewShot(6, SMALL)
    for seed in range(30):
        probe.add(*clusters(500, seed))
    probe.metrics(*clusters(5, 77)[:2])

    assert len(probe._classes) <= 4 * 2 * 3


def test_shots_that_most_classes_do_not_have_are_left_out() -> None:
    vectors, keys = torch.randn(5, 6), [str(i) for i in range(5)]
    probe = FewShot(6, SMALL)
    probe.add(vectors, torch.tensor([0, 0, 0, 1, 2]), keys)

    assert {name.split("_")[0] for name in probe.metrics(vectors, torch.zeros(5).long())} == {"1"}


def test_all_probes_learn_clusters_and_leave_out_what_is_not_finite() -> None:
    train, val = clusters(400, 0, noise=0.3), clusters(60, 1, noise=0.3)
    train[0][::50] = math.nan
    val[0][0] = math.nan
    probes = Probes(val[0], val[1], SMALL)
    for part in in_parts(train, 3):
        probes.add(*part)

    metrics = probes.metrics()

    assert (probes.images, probes.not_finite) == (392, 8)
    assert {name for name in metrics if name.endswith("@1")} == {
        *("linear_accuracy@1", "1_shot_accuracy@1", "3_shot_accuracy@1", "knn_accuracy@1")
    }
    for name in ("linear", "3_shot", "knn"):
        assert metrics[f"{name}_accuracy@1"] == pytest.approx(59 / 60)


def test_without_training_images_there_is_nothing_to_say() -> None:
    val = clusters(5, 0)

    assert Probes(val[0], val[1], SMALL).metrics() == {}


@pytest.mark.parametrize(
    "wrong", [{"draws": 0}, {"neighbours": 0}, {"temperature": 0.0}, {"shots": (1, 0)}]
)
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ProbeConfig(**wrong)
