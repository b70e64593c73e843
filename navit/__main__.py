"""`navit`: one subcommand per entry of `COMMANDS`."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import tyro


def train(args: Sequence[str]) -> int:
    """Train on packed images: `navit train [demo | pairs | classify] [options]`."""
    from navit.serialize import to_plain
    from navit.train.config import PRESETS
    from navit.train.loop import Trainer
    from navit.train.setup import resolve_run
    from navit.train.summary import draw_results, format_run

    name, options = _split_preset(args, tuple(PRESETS))
    config = tyro.cli(
        type(PRESETS[name]()),
        default=PRESETS[name](),
        args=options,
        prog=f"navit train {name}",
        description=PRESETS[name].__doc__,
        # Options may stand before or after a choice such as packer.token-drop:beta-drop.
        config=(tyro.conf.CascadeSubcommandArgs,),
    )
    run = resolve_run(config, name)
    trainer = Trainer(config, run)
    print(f"{run}: {trainer.describe()}", file=sys.stderr)
    result = trainer.train()
    if result.evaluation is not None:
        summary = {"step": result.step, "metrics": result.evaluation.metrics}
        summary |= {"padding": result.stats.padding, "stats": to_plain(result.stats)}
        summary |= {"tokens_per_second": result.tokens_per_second}
        (run / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(format_run(result))
    pictures = draw_results(result, trainer.val_shards)
    print("pictures:   " + "\n            ".join(map(str, pictures)))
    if result.step < trainer.config.steps:
        print(f"stopped early; go on with: navit train {name} --run {run} --resume ...")
    return 0


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a checkpoint on tar shards of image-text pairs, or of labelled images."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder or one of its checkpoints."""
    shards: tuple[str, ...]
    """Validation shards: tar files or brace ranges."""
    train_shards: tuple[str, ...] = ()
    """Training shards, for the shape-only baseline; empty leaves it out."""
    raw_weights: bool = False
    """Evaluate the last step's weights and not their running average."""
    sequences_per_batch: int = 8
    """Sequences encoded at a time."""
    device: str = "auto"
    """"auto" is CUDA where there is one."""
    json: Path | None = None
    """Also write the metrics to this file."""


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a checkpoint: `navit evaluate CHECKPOINT --shards ...`."""
    from navit.evaluate.encode import read_metadata
    from navit.train.restore import load_trained
    from navit.train.setup import resolve_autocast, resolve_device
    from navit.train.summary import format_evaluation
    from packer.shards import expand_shards
    from packer.tally import tally_text

    options = tyro.cli(EvaluateConfig, args=args, prog="navit evaluate")
    trained = load_trained(options.checkpoint, averaged=not options.raw_weights)
    device = resolve_device(replace(trained.config, device=options.device))
    metadata = read_metadata(expand_shards(options.train_shards)) if options.train_shards else None
    found = trained.evaluate(
        options.shards,
        sequences_per_batch=options.sequences_per_batch,
        device=device,
        autocast_dtype=resolve_autocast(trained.config, device),
        train_metadata=metadata,
    )
    print(format_evaluation(found))
    print(tally_text(found.stats))
    if options.json is not None:
        options.json.write_text(json.dumps(found.metrics, indent=2) + "\n")
    return 0


def embed(args: Sequence[str]) -> int:
    """Images to vectors: `navit embed CHECKPOINT INPUT... --out vectors.npy`."""
    from navit.embed.command import EmbedCommand, format_result, run_embed

    command = tyro.cli(EmbedCommand, args=args, prog="navit embed")
    try:
        result = run_embed(command)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:  # no checkpoint, no connection to the hub, a full disk
        print(f"navit embed: {error}", file=sys.stderr)
        return 2
    print(format_result(result))
    return 1 if result.failures else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
}


def main() -> int:
    """Run the subcommand named first; a wrong setting ends with its message and status 2."""
    # Read when torch loads OpenMP. Threads that spin while they wait take the cores from the
    # loader's workers: on 2 cores with one worker a step took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    args = sys.argv[1:]
    if not args or args[0] not in COMMANDS:
        print("usage: navit COMMAND ...\n", file=sys.stderr)
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}", file=sys.stderr)
        print("\n`navit COMMAND --help` lists a command's options.", file=sys.stderr)
        return 0 if args and args[0] in ("-h", "--help") else 2
    try:
        return COMMANDS[args[0]](args[1:])
    except (ValueError, FileNotFoundError) as error:
        print(f"navit {args[0]}: {error}", file=sys.stderr)
        return 2


def _split_preset(args: Sequence[str], names: tuple[str, ...]) -> tuple[str, Sequence[str]]:
    """Take the run's name off the front; without one, task or shards say which is meant."""
    if args and args[0] in names:
        return args[0], args[1:]
    if "--task=classify" in args or ("--task", "classify") in pairwise(args):
        return "classify", args
    named = any(arg.split("=")[0] == "--shards" for arg in args)
    return ("pairs" if named else "demo"), args


if __name__ == "__main__":
    sys.exit(main())
