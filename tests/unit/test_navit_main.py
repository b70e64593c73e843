import subprocess
import sys

import pytest

import navit
from navit.__main__ import _split_preset
from navit.train.config import PRESETS


def test_the_command_line_is_there_before_torch_is_loaded() -> None:
    """So that it can set how OpenMP waits, which is read when torch loads it."""
    code = "import sys, navit.__main__; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_the_models_and_others_are_refused() -> None:
    assert all(getattr(navit, name).__name__ == name for name in navit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NaVit'"):
        navit.NaVit  # noqa: B018


@pytest.mark.parametrize(
    ("args", "name", "rest"),
    [
        ([], "demo", []),
        (["pairs", "--shards", "a.tar"], "pairs", ["--shards", "a.tar"]),
        (["--shards=a.tar"], "pairs", ["--shards=a.tar"]),
        (["--steps", "3"], "demo", ["--steps", "3"]),
        (["--task", "classify"], "classify", ["--task", "classify"]),
        (["--shards=a.tar", "--task=classify"], "classify", ["--shards=a.tar", "--task=classify"]),
        (["pairs", "--task", "classify"], "pairs", ["--task", "classify"]),
        (["--task", "masked", "--shards=a.tar"], "masked", ["--task", "masked", "--shards=a.tar"]),
        (["--task=masked"], "masked", ["--task=masked"]),
    ],
)
def test_a_run_without_a_name_is_told_by_its_task_and_shards(
    args: list[str], name: str, rest: list[str]
) -> None:
    assert _split_preset(args, tuple(PRESETS)) == (name, rest)
