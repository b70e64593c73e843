"""What the commands of small experiments share: options, settings of a folder, ends."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

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
