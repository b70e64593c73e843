"""`python -m benchmarks.scaling`: what a run on 10 billion pairs and many GPUs needs, as a table.

Every line says where it comes from: *measured* on this machine by this command or by a stored
benchmark, *computed* from other lines, *assumed* (an option of the command), or *cited*. What the
figures mean, and what they leave out, is in docs/scaling.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import tyro

from benchmarks.scaling_formulas import (
    Workload,
    exchange_bytes,
    loss_flops,
    loss_memory,
    workload,
)
from benchmarks.scaling_measure import Measured, measure


@dataclass(frozen=True)
class Scaling:
    """The planned run: what is assumed, each with where it comes from."""

    ranks: tuple[int, ...] = (256, 1024, 4096)
    """GPUs, a column each."""
    pairs: int = 10_000_000_000
    """Pairs seen: WebLI's 10 billion images (PaLI, arXiv:2209.06794, abstract), once."""
    size: str = "l"
    """Size of both towers (ViT, arXiv:2010.11929, table 1)."""
    embed_dim: int = 1024
    """D: width of the vectors the loss compares."""
    batch: int = 32_768
    """Pairs of all GPUs in a step: one block of the table; 32k suffice (SigLIP,
    arXiv:2303.15343, abstract)."""
    images_per_rank: int = 512
    """Pairs of each GPU in a step: the other block, in which the batch grows with the GPUs."""
    peak_tflops: float = 989.0
    """Of a GPU, bf16 without sparsity: NVIDIA's data sheet of the H100 SXM."""
    loss_tflops: float = 31.0
    """Rate of the tiled loss, forward and backward in float32, on a GPU: on an H200 8,192 pairs of
    512 channels took 8.8 ms (`python -m benchmarks gpu_loss`)."""
    utilization: float = 0.4
    """Model FLOPs utilization: 38 to 43 % on H100 in Llama 3 (arXiv:2407.21783, table 4)."""
    link_gbit: float = 400.0
    """Network of a GPU, each way, in Gbit/s: that of the same cluster (section 3.3.1)."""
    gpus_per_node: int = 8
    """GPUs of a server: what crosses between servers crosses once, over all their links."""
    nvlink_gbyte: float = 450.0
    """Bandwidth of a GPU inside its server, each way, in GB/s: NVLink of the same data sheet."""
    shard_pairs: int = 10_000
    """Pairs in a shard."""
    photos: tuple[Path, ...] = ()
    """Tars or folders of JPEGs that stand for the run's images; none: drawn ones."""
    quick: bool = False
    """Tiny measurements, to see that it runs; the numbers mean nothing."""

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be positive numbers of GPUs; got {self.ranks}.")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization must be in (0, 1]; got {self.utilization}.")

    @property
    def link_bytes(self) -> float:
        """Bytes/s at which all GPUs of a server receive the same data: by network or NVLink."""
        network = self.gpus_per_node * self.link_gbit * 1e9 / 8
        return min(network, self.nvlink_gbyte * 1e9)

    def images_per_second(self, work: Workload) -> float:
        """Return the pairs a GPU trains on each second."""
        return self.peak_tflops * 1e12 * self.utilization / work.flops


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    """The quantity and its unit."""
    values: tuple[str, ...]
    """A text for each number of GPUs; one text where they share it."""
    source: str
    """Where it comes from."""


def tables(planned: Scaling, found: Measured, work: Workload) -> dict[str, list[Line]]:
    """Compute every line, by heading, from what is assumed and what was measured."""
    fixed, growing = planned.batch, planned.images_per_rank
    return {
        "Compute and data": _data_lines(planned, found, work),
        "State and restart": _state_lines(planned, found, work),
        f"Loss at {fixed:,} pairs a step": _loss_lines(
            planned, found, work, lambda ranks: max(fixed // ranks, 1)
        ),
        f"Loss at {growing:,} pairs a GPU": _loss_lines(
            planned, found, work, lambda ranks: growing
        ),
        "Weights": _model_lines(planned, work),
    }


def cores_per_gpu(planned: Scaling, found: Measured, work: Workload) -> float:
    """Return the processor threads that keep one GPU supplied."""
    return planned.images_per_second(work) * found.milliseconds_per_image / 1000


def _data_lines(planned: Scaling, found: Measured, work: Workload) -> list[Line]:
    speed = planned.images_per_second(work)
    cores = cores_per_gpu(planned, found, work)
    read = speed * found.bytes_per_pair
    lines = [
        _all("kept image tokens a pair", f"{work.tokens:.0f}", "measured: 20,000 planned sizes"),
        _all("model FLOPs a pair", _si(work.flops), "computed: 3 forward passes of both towers"),
        _all(
            "pairs/s a GPU",
            f"{speed:,.0f}",
            f"computed: {planned.peak_tflops:g} TFLOP/s x {planned.utilization:g} (assumed)",
        ),
        _each(
            "time for all pairs",
            planned,
            lambda r: _days(planned.pairs / speed / r),
            "computed: arithmetic alone",
        ),
        _all("data loading, ms a pair", f"{found.milliseconds_per_image:.2f}", _DECODE),
        _all("CPU threads a GPU", f"{cores:.1f}", "computed: pairs/s x ms"),
        _each("CPU threads", planned, lambda r: f"{cores * r:,.0f}", "computed"),
        _all(
            "of these for planning",
            f"{speed / found.lengths_per_second:.2%} of one".replace("%", " %"),
            f"measured: {found.lengths_per_second:,.0f} lengths/s (benchmarks scale)",
        ),
        _all("bytes a pair", _bytes(found.bytes_per_pair), f"measured: {found.bytes_source}"),
        _all("data set", _bytes(planned.pairs * found.bytes_per_pair), "computed"),
        _all("reading, a GPU", f"{_bytes(read)}/s", "computed: pairs/s x bytes"),
        _each("reading", planned, lambda r: f"{_bytes(read * r)}/s", "computed"),
    ]
    return lines


_DECODE = "measured: benchmarks image_path (256 tokens, photographs) and loader"


def _state_lines(planned: Scaling, found: Measured, work: Workload) -> list[Line]:
    workers = ceil(cores_per_gpu(planned, found, work))
    shards = ceil(planned.pairs / planned.shard_pairs)
    again = found.waiting_pairs * found.bytes_per_pair
    listing = found.open_seconds_per_shard * shards
    ordering = found.order_seconds_per_shard * shards
    reading = again * workers / (planned.images_per_second(work) * found.bytes_per_pair)
    held = "measured here: a state of PackedStream, shuffle window 1,024"
    return [
        _all("loader state a stream", _bytes(found.state_bytes), held),
        _each("streams", planned, lambda r: f"{r * workers:,}", "computed: one a worker thread"),
        _each(
            "loader state, all streams",
            planned,
            lambda r: _bytes(r * workers * found.state_bytes),
            "computed",
        ),
        _all(
            "memory of waiting pairs, a stream", _bytes(again), "computed: undecoded, never pixels"
        ),
        _all(
            "first batch of a stream: fresh, restarted",
            f"{found.first_batch_fresh:.2f} s, {found.first_batch_resumed:.2f} s",
            "measured here: local shards in the page cache, processor time",
        ),
        _all("read again by a restart, a stream", _bytes(again), "computed: what waits"),
        _each(
            "read again by a restart, all streams",
            planned,
            lambda r: _bytes(again * workers * r),
            "computed",
        ),
        _all(
            "time of reading it",
            _seconds(reading),
            "computed: at the rate of the run, all streams of a GPU at once",
        ),
        _all(
            f"listing {shards:,} shards",
            _seconds(listing),
            f"measured here: {1e6 * found.open_seconds_per_shard:.0f} us a local file, every rank",
        ),
        _all(
            "ordering them, each epoch",
            _seconds(ordering),
            f"measured here: {1e6 * found.order_seconds_per_shard:.1f} us a shard, every stream",
        ),
        _all(
            "data side of a restart",
            _seconds(listing + ordering + reading + found.first_batch_resumed),
            "computed: listing, ordering, reading, first batch",
        ),
        _all(
            "list of shards, a process",
            _bytes(found.bytes_per_shard_name * shards),
            f"measured here: {found.bytes_per_shard_name:.0f} bytes a path",
        ),
    ]


def _loss_lines(
    planned: Scaling, found: Measured, work: Workload, rows_of: Callable[[int], int]
) -> list[Line]:
    """Compute the loss of batches of ``rows_of(ranks)`` pairs a GPU."""
    dim = planned.embed_dim
    rate = planned.loss_tflops * 1e12

    def operations(ranks: int) -> float:
        return loss_flops(rows_of(ranks), ranks * rows_of(ranks), dim)

    def step(ranks: int) -> float:
        return rows_of(ranks) / planned.images_per_second(work)

    def exchanged(ranks: int) -> tuple[float, float]:
        return exchange_bytes(ranks, rows_of(ranks), dim)

    def share(ranks: int) -> str:
        seconds = operations(ranks) / rate + sum(exchanged(ranks)) / planned.link_bytes
        return f"{seconds / step(ranks):.0%}".replace("%", " %")

    return [
        _each("pairs in the loss", planned, lambda r: f"{r * rows_of(r):,}", "assumed"),
        _each("pairs a GPU", planned, lambda r: f"{rows_of(r):,}", "assumed"),
        _each("a step of the model", planned, lambda r: _seconds(step(r)), "computed"),
        _each("loss: operations a GPU", planned, lambda r: _si(operations(r)), "computed: 8 n N D"),
        _each(
            "loss: time a GPU",
            planned,
            lambda r: _seconds(operations(r) / rate),
            f"computed: {planned.loss_tflops:g} TFLOP/s (measured on an H200, 8,192 pairs)",
        ),
        _each(
            "loss: time on one thread here",
            planned,
            lambda r: _seconds(operations(r) / found.loss_flops_per_second),
            f"measured: {found.loss_flops_per_second / 1e9:.0f} GFLOP/s at N = 2,048; scaled",
        ),
        _each(
            "loss: memory a GPU",
            planned,
            lambda r: _bytes(loss_memory(r, rows_of(r), dim)),
            "computed: texts, gradients, tiles",
        ),
        _each(
            "texts gathered, gradients reduced",
            planned,
            lambda r: ", ".join(map(_bytes, exchanged(r))),
            "computed: a GPU and step, ring, float32",
        ),
        _each(
            "time of this exchange",
            planned,
            lambda r: _seconds(sum(exchanged(r)) / planned.link_bytes),
            f"computed: {planned.link_bytes / 1e9:g} GB/s a server (assumed), no latency",
        ),
        _each("loss and exchange / step", planned, share, "computed: nothing overlaps"),
    ]


def _model_lines(planned: Scaling, work: Workload) -> list[Line]:
    stored = 16.0 * work.parameters

    def reduced(ranks: int) -> float:
        return 2 * 4.0 * work.parameters * (ranks - 1) / ranks

    return [
        _all("weights", f"{work.parameters:,}", f"computed: both towers {planned.size!r}"),
        _all("checkpoint", _bytes(stored), "computed: weights, average, two moments; float32"),
        _each("checkpoint, a GPU (FSDP2)", planned, lambda r: _bytes(stored / r), "computed"),
        _each(
            "weights' gradients reduced, a GPU and step",
            planned,
            lambda r: _bytes(reduced(r)),
            "computed: ring all-reduce, float32",
        ),
        _each(
            "time of it",
            planned,
            lambda r: _seconds(reduced(r) / planned.link_bytes),
            f"computed: {planned.link_bytes / 1e9:g} GB/s a server (assumed), no latency",
        ),
    ]


def format_table(planned: Scaling, lines: Sequence[Line]) -> str:
    """Lay the lines out as a Markdown table."""
    heads = [f"{ranks:,} GPUs" for ranks in planned.ranks]
    rows = [["", *heads, "source"], ["---", *["---:"] * len(heads), "---"]]
    for line in lines:
        values = line.values if len(line.values) > 1 else (*[""] * (len(heads) - 1), line.values[0])
        rows.append([line.what, *values, line.source])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(args: Sequence[str] | None = None) -> dict[str, list[Line]]:
    """Measure, compute, print."""
    planned = tyro.cli(Scaling, args=args, prog="python -m benchmarks.scaling")
    work = workload(planned.size, planned.embed_dim, 200 if planned.quick else 20_000)
    found = measure(
        planned.photos,
        num_shards=ceil(planned.pairs / planned.shard_pairs),
        shard_bytes=planned.shard_pairs * 80_000,
        quick=planned.quick,
    )
    found_lines = tables(planned, found, work)
    for heading, lines in found_lines.items():
        print(f"\n### {heading}\n\n{format_table(planned, lines)}")
    return found_lines


def _all(what: str, value: str, source: str) -> Line:
    return Line(what, (value,), source)


def _each(what: str, planned: Scaling, value: Callable[[int], str], source: str) -> Line:
    return Line(what, tuple(map(value, planned.ranks)), source)


def _bytes(value: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _si(value: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def _seconds(value: float) -> str:
    if value >= 90:
        return f"{value / 60:.3g} min"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _hours(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{hours * 60:.3g} min"


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:.3g} days" if days >= 2 else _hours(days * 24)


if __name__ == "__main__":
    main()
