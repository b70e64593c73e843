"""A run at scale by planning only: 64 ranks x 4 streams over 10,000 shards, restarted on 48."""

import json
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.harness import paired_ratio
from packer.config import PackerConfig
from packer.plan.balance import attention_costs
from packer.plan.drop import BetaDrop
from packer.plan.place import pack_lengths
from packer.plan.scale import PlannedRun, PlannedShards, draw_shards

RANKS, RESTARTED_RANKS, STREAMS_PER_RANK = 64, 48, 4
WIDTH = 384  # of the attention cost: n^2 + 6 D n


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Plan an epoch, stop it half way, go on with fewer ranks; check that nothing is lost.

    Args:
        quick: Use 512 shards of 20 samples instead of 10,000 of 1,000.
    """
    num_shards, mean_samples, sequences = (512, 20, 2) if quick else (10_000, 1_000, 32)
    config = PackerConfig(seq_len=1024, token_drop=BetaDrop(0.5, 0.8))
    start = perf_counter()
    shards = draw_shards(num_shards, config, mean_samples=mean_samples, num_empty=num_shards // 500)
    drawn = perf_counter() - start
    samples = np.diff(shards.bounds)
    num_streams = RANKS * STREAMS_PER_RANK
    print(
        f"{shards.num_samples:,} LAION-like images in {num_shards:,} shards of {samples.min()} to "
        f"{samples.max():,}, drawn in {drawn:.1f} s; {num_streams} streams, L = {config.seq_len}, "
        f"B = {sequences}, BetaDrop(0.5, 0.8)"
    )
    common: dict[str, Any] = {"num_streams": num_streams, "sequences_per_batch": sequences}
    seen = np.zeros(shards.num_samples, np.int64)
    first = PlannedRun(shards, config, num_ranks=RANKS, **common)
    # A rank's share of all tokens, in steps of B sequences, halved.
    half = int(shards.lengths.sum(dtype=np.int64)) // (RANKS * sequences * config.seq_len) // 2
    rows = [_phase(first, shards, config, seen, max_steps=max(half, 1))]
    states = json.loads(json.dumps(first.states()))
    rows[0]["state_kib"] = max(len(json.dumps(state)) for state in states) / 1024
    second = PlannedRun(shards, config, num_ranks=RESTARTED_RANKS, states=states, **common)
    rows.append(_phase(second, shards, config, seen))
    missing, twice = int((seen == 0).sum()), int((seen > 1).sum())
    if missing or twice:
        raise RuntimeError(f"every sample must be planned once; {missing} never, {twice} again.")
    whole = PlannedRun(shards, config, num_ranks=RANKS, **common)
    rows.append(_phase(whole, shards, config, np.zeros_like(seen)))
    for row, name in zip(rows, ("to the stop", "restarted", "never stopped"), strict=True):
        _print(name, row)
        row["phase"] = name
    print(
        f"stopped after {rows[0]['steps']} steps, states merged (largest {rows[0]['state_kib']:.1f}"
        f" KiB a stream), restarted: each of the {shards.num_samples:,} samples came exactly once"
    )
    rows.append(_interleaving(shards, config, sequences, pairs=2 if quick else 10))
    return rows


def _interleaving(
    shards: PlannedShards, config: PackerConfig, sequences_per_batch: int, pairs: int
) -> dict[str, Any]:
    """Time one rank's streams, batch by batch in turn, against placing the same lengths at once."""
    rank = PlannedRun(
        shards, config, num_ranks=RANKS, num_streams=RANKS * STREAMS_PER_RANK, sequences_per_batch=1
    ).ranks[0]
    few = PlannedShards(
        np.concatenate([shards.lengths[stream.samples] for stream in rank]),
        np.cumsum([0, *(len(stream.samples) for stream in rank)]),
    )

    def in_turn() -> None:
        run = PlannedRun(
            few,
            config,
            num_ranks=1,
            num_streams=STREAMS_PER_RANK,
            sequences_per_batch=sequences_per_batch,
        )
        for _ in run.steps():
            pass

    ratio = paired_ratio(in_turn, lambda: pack_lengths(few.lengths, config.seq_len), pairs=pairs)
    print(
        f"time of one rank's {STREAMS_PER_RANK} streams, batch by batch, / placing their "
        f"{few.num_samples:,} lengths at once: {ratio}; "
        f"{few.num_samples / ratio.seconds_a:,.0f} lengths/s"
    )
    return {"phase": "one rank", "num_images": few.num_samples, "interleaving": ratio}


def _phase(
    run: PlannedRun,
    shards: PlannedShards,
    config: PackerConfig,
    seen: np.ndarray,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Run up to so many steps, count every sample, and measure the balance between ranks."""
    ranks = len(run.ranks)
    batches, images, tokens, sequences = np.zeros((4, ranks), np.int64)
    imbalances = []
    start = perf_counter()
    for step in islice(run.steps(), max_steps):
        costs = np.zeros(ranks)
        for rank, batch in enumerate(step):
            if batch is None:
                continue
            np.add.at(seen, batch.samples, 1)
            lengths = shards.lengths[batch.samples]
            batches[rank] += 1
            images[rank] += len(lengths)
            tokens[rank] += lengths.sum()
            sequences[rank] += len(batch.bounds) - 1
            costs[rank] = attention_costs(lengths, batch.bounds, WIDTH).sum()
        full = [b is not None and len(b.bounds) > run.sequences_per_batch for b in step]
        if all(full):  # at the end of an epoch ranks run dry one by one
            imbalances.append(costs.max() / costs.mean() - 1)
    seconds = perf_counter() - start
    return {
        "ranks": ranks,
        "steps": int(batches.max()),
        "even_steps": len(imbalances),
        "batches_per_rank": [int(batches.min()), int(batches.max())],
        "images_per_rank": [int(images.min()), int(images.max())],
        "images_spread": float(images.max() / images.mean() - 1),
        "tokens_spread": float(tokens.max() / tokens.mean() - 1),
        "padding": float(1 - tokens.sum() / (sequences.sum() * config.seq_len)),
        "cost_imbalance": float(np.mean(imbalances)),
        "cost_imbalance_p95": float(np.quantile(imbalances, 0.95)),
        "seconds": seconds,
        "lengths_per_second": images.sum() / seconds,
    }


def _print(name: str, row: dict[str, Any]) -> None:
    low, high = row["images_per_rank"]
    print(
        f"{name:13} on {row['ranks']} ranks: {row['batches_per_rank'][0]:,} to "
        f"{row['batches_per_rank'][1]:,} batches and {low:,} to {high:,} images a rank; padding "
        f"{100 * row['padding']:.4f} %\n"
        f"{'':14}slowest rank's cost above the mean: {100 * row['cost_imbalance']:.1f} % of a step "
        f"(95th percentile {100 * row['cost_imbalance_p95']:.1f} %); planned at "
        f"{row['lengths_per_second']:,.0f} lengths/s"
    )
