"""`python -m packer`: one subcommand per entry of `COMMANDS`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tyro

from packer.demo import ensure_demo, make_demo
from packer.errors import TooManyFailures
from packer.tools.check import Check
from packer.tools.show import Show
from packer.tools.simulate import Simulate
from packer.tools.stats import Stats


class Command(Protocol):
    """A subcommand: a frozen dataclass whose fields are its options."""

    def run(self) -> int:
        """Do the work, print the result and return the exit status.

        A ValueError is shown as a usage error.
        """


@dataclass(frozen=True)
class MakeDemo:
    """Write the demonstration set: drawn, captioned scenes in webdataset tar shards."""

    folder: Path = Path("data/demo")
    """Where the shards go; a complete set with the same settings is reused."""
    num_train: int = 4000
    """Training pairs."""
    num_val: int = 500
    """Validation pairs, their captions unambiguous and their scenes not among the training ones."""
    scale: float = 1.0
    """Multiplies every length; at 1 the median short side is about 89 px, at 4 about 356 px."""
    seed: int = 0
    """Seed of every draw."""
    overwrite: bool = False
    """Write even where the same set is already complete."""

    def run(self) -> int:
        """Write the set and print the paths of its shards."""
        write = make_demo if self.overwrite else ensure_demo
        counts = {"train": self.num_train, "val": self.num_val}
        paths = write(
            self.folder,
            num_train=self.num_train,
            num_val=self.num_val,
            scale=self.scale,
            seed=self.seed,
        )
        for split, shards in (("train", paths.train), ("val", paths.val)):
            where = f"{self.folder}/demo-{split}-*.tar"
            print(f"{split}: {counts[split]:,} pairs in {len(shards)} shard(s), {where}")
        return 0


COMMANDS: dict[str, type[Command]] = {
    "make-demo": MakeDemo,
    "simulate": Simulate,
    "show": Show,
    "stats": Stats,
    "check": Check,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        args: Command line without the program's name; None takes the process's own.

    Returns:
        Exit status: 0, 1 where `check` found samples that would be skipped or a run broke off, or 2
        after a setting that cannot be.
    """
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            dict(COMMANDS),
            prog="python -m packer",
            description="Pack images into sequences.",
            args=args,
            # Options may stand before or after a choice such as token-drop:beta-drop.
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
        return command.run()
    except ValueError as error:
        print(f"python -m packer: {error}", file=sys.stderr)
        return 2
    except TooManyFailures as error:
        print(f"python -m packer: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
