"""What the commands of small experiments share: options, settings of a folder, ends."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import tyro

from benchmarks.harness import environment

Options = TypeVar("Options")


def run_command(
    kind: type[Options], run: Callable[[Options], None], args: Sequence[str] | None, prog: str
) -> int:
    """Read options from the command line and run with them; return the exit status."""
    try:
        run(tyro.cli(kind, args=args, prog=prog))
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


def write_results(
    folder: Path, prog: str, table: str, results: Sequence[Any], *, quick: bool
) -> None:
    """Write summary.md and summary.json of runs.

    Args:
        folder: Where.
        prog: The command without its options.
        table: Markdown.
        results: Dataclasses, one a run.
        quick: Whether the numbers mean nothing.
    """
    note = "Tiny towers, a few steps: the numbers mean nothing.\n\n" if quick else ""
    (folder / "summary.md").write_text(note + table + "\n")
    # The harness names its own command.
    told = {**environment(), "command": " ".join([prog, *sys.argv[1:]])}
    rows = {"environment": told, "results": [asdict(result) for result in results]}
    (folder / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings all runs of a folder have, making the folder if needed.

    Raises:
        ValueError: If the folder's runs have others.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))  # JSON has no tuples
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"all runs of a folder must have the same settings; {path} has others than those asked "
            "for. Give another --folder, or remove that one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
