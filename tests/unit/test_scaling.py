"""benchmarks.scaling: what a large run needs, from formulas that small cases can check."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import Scaling, cores_per_gpu, format_table, main, tables
from benchmarks.scaling_formulas import (
    Workload,
    exchange_bytes,
    loss_flops,
    loss_memory,
    workload,
)
from benchmarks.scaling_measure import Measured, newest
from navit.loss import contrastive_loss

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


class Products(TorchDispatchMode):
    """Counts the operations of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_operations_of_the_loss_are_those_it_does() -> None:
    image, text = F.normalize(torch.randn(2, 40, 8), dim=-1).unbind()
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    with Products() as counted:
        contrastive_loss(image, text, torch.tensor(10.0), chunk_size=16).backward()
    assert counted.flops == loss_flops(40, 40, 8)


def ring_all_gather(ranks: int, size: int) -> int:
    """Pass blocks on along a ring until all have all; return the elements a rank receives."""
    held = [{rank} for rank in range(ranks)]
    passed = list(range(ranks))  # the block each rank got last
    received = 0
    while any(len(blocks) < ranks for blocks in held):
        passed = [passed[rank - 1] for rank in range(ranks)]
        for rank, block in enumerate(passed):
            held[rank].add(block)
        received += size
    return received


@given(ranks=st.integers(1, 12), rows=st.integers(1, 50), dim=st.integers(1, 64))
def test_exchanged_bytes_are_those_of_a_ring(ranks: int, rows: int, dim: int) -> None:
    gathered, reduced = exchange_bytes(ranks, rows, dim)
    assert gathered == 4 * ring_all_gather(ranks, rows * dim)
    # An all-reduce is a reduce-scatter, the same passes with sums, and a gathering.
    assert reduced == 2 * 4 * ring_all_gather(ranks, rows * (dim + 2))


def test_the_memory_of_the_loss_is_near_what_was_measured() -> None:
    """Stored rows: resident memory above the inputs, less the gradients; chunks of 512, 2 MiB."""
    rows = [row for row in newest("loss") if row.get("loss", "tiled") == "tiled"]
    measured = {row["num_pairs"]: row["tiled_mib"] for row in rows if "tiled_mib" in row}
    for count in (4096, 8192):
        gradients = 2 * count * 512 * 4 / 2**20
        computed = loss_memory(1, count, 512, chunk=512) / 2**20 - gradients
        assert measured[count] - gradients == pytest.approx(computed, abs=3)


def measured(**changes: float) -> Measured:
    values = {f.name: 1.0 for f in fields(Measured) if f.name != "bytes_source"}
    return Measured(**{**values, "waiting_pairs": 10, "bytes_source": "drawn", **changes})


def test_cores_keep_up_with_the_gpu() -> None:
    planned = Scaling(peak_tflops=100.0, utilization=0.5)
    work = Workload(tokens=50, flops=5e9, parameters=10)
    assert planned.images_per_second(work) == 10_000
    cores = cores_per_gpu(planned, measured(milliseconds_per_image=2.0), work)
    assert cores == pytest.approx(20)  # 10,000 images/s at 500 a core


@pytest.mark.parametrize("changes", [{"ranks": ()}, {"ranks": (0,)}, {"utilization": 0.0}])
def test_impossible_runs_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Scaling(**changes)  # type: ignore[arg-type]


def test_the_paper_s_mix_has_the_tokens_it_should() -> None:
    """Sides U(64, 256) at patch 16 are 112 tokens, half dropped; small images are not enlarged."""
    work = workload("tiny", 8, 5_000)
    assert 35 < work.tokens < 56
    assert work.parameters > 0


def test_every_line_has_a_source_and_a_place_in_the_document() -> None:
    planned = Scaling()
    written = DOCUMENT.read_text(encoding="utf-8")
    for heading, lines in tables(planned, measured(), workload("tiny", 8, 200)).items():
        part = written.partition(f"### {heading}\n")[2].partition("\n#")[0]
        for line in lines:
            kind = line.source.split(":")[0]
            assert kind in ("measured", "measured here", "computed", "assumed")
            assert len(line.values) in (1, len(planned.ranks))
            assert re.search(rf"^\| {re.escape(line.what)} \|.*\| {kind}", part, re.MULTILINE)
        assert format_table(planned, lines).count("\n") == len(lines) + 1


def test_lines_of_the_document_that_nothing_measured_enters_are_what_the_code_computes() -> None:
    """Those that stay the same when every measurement changes, and are not assumed."""
    planned = Scaling()
    work = workload(planned.size, planned.embed_dim)
    other = {f.name: 3.0 for f in fields(Measured) if f.name not in ("bytes_source",)}
    found = tables(planned, measured(), work)
    changed = tables(planned, measured(**other), work)
    written = DOCUMENT.read_text(encoding="utf-8")
    checked = 0
    for heading, lines in found.items():
        part = written.partition(f"### {heading}\n")[2].partition("\n#")[0]
        for line, twin in zip(lines, changed[heading], strict=True):
            if line == twin and line.source.startswith("computed"):
                assert format_table(planned, [line]).splitlines()[2] in part
                checked += 1
    assert checked >= 15


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--quick", "--size", "tiny", "--ranks", "2", "4"])
    printed = capsys.readouterr().out
    assert printed.count("| 2 GPUs | 4 GPUs |") == len(found) == 5
    for heading, lines in found.items():
        assert f"### {heading}" in printed
        for line in lines:
            assert f"| {line.what} |" in printed
            assert all("nan" not in value and "inf" not in value for value in line.values)


def test_a_missing_result_says_which_benchmark_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m benchmarks scale"):
        newest("scale", tmp_path)
