"""`model.compile()`: the same numbers from one graph, whatever the lengths of a batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from navit import NaViT, NaViTConfig

ROOT = Path(__file__).parents[2]


ALL = ("paper", "class token", "checkpointing", "patch sizes", "stem", "text", "half precision")


def run_cases(backend: str, *names: str, device: str = "cpu") -> dict[str, dict[str, float]]:
    program = [sys.executable, "-W", "ignore", "-m", "tests.helpers.compiled"]
    done = subprocess.run(
        [*program, device, backend, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def check(found: dict[str, dict[str, float]]) -> None:
    for name, case in found.items():
        half = name == "half precision"
        assert case["value"] < (0.02 if half else 2e-6)
        assert case["inference"] < (0.02 if half else 2e-6)
        assert case["gradient"] < (0.03 if half else 1e-5)
        # One with gradients and one without; torch may add one where a size leaves its range.
        assert case["graphs"] <= 4
        assert case["breaks"] == 0


def test_a_compiled_tower_gives_the_eager_numbers_without_a_break() -> None:
    """Traced and differentiated as for any backend, but run without making code."""
    check(run_cases("aot_eager", "paper"))


@pytest.mark.slow
def test_code_made_by_inductor_gives_the_eager_numbers_too() -> None:
    check(run_cases("inductor", *ALL))


@pytest.mark.gpu
def test_code_made_for_a_gpu_gives_the_eager_numbers_too() -> None:
    names = ("paper", "checkpointing", "text", "half precision")
    check(run_cases("inductor", *names, device="cuda"))


def test_xformers_is_refused_with_a_reason() -> None:
    model = NaViT(NaViTConfig.named("tiny", attention="xformers"))
    with pytest.raises(ValueError, match="compiled anew for every batch"):
        model.compile()
