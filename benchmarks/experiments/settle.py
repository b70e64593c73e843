"""What all runs of an experiment's folder have in common."""

import json
from pathlib import Path
from typing import Any


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
