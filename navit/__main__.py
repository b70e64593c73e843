"""`navit`: one subcommand per entry of `COMMANDS`."""

import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import tyro


def train(args: Sequence[str]) -> int:
    """Train on packed images: `navit train [demo | pairs | classify | masked] [options]`."""
    from navit.train.command import run_train
    from navit.train.config import PRESETS

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
    return run_train(config, name)


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a checkpoint: `navit evaluate CHECKPOINT --shards ...`."""
    from navit.evaluate.command import EvaluateCommand, format_result, run_evaluate
    from navit.evaluate.source import RunLoader
    from navit.train.restore import load_trained
    from navit.train.setup import resolve_autocast

    command = tyro.cli(EvaluateCommand, args=args, prog="navit evaluate")
    try:
        found = run_evaluate(command, RunLoader(load_trained, resolve_autocast))
    except OSError as error:  # no checkpoint, no connection to the hub, a full disk
        print(f"navit evaluate: {error}", file=sys.stderr)
        return 2
    print(format_result(found, command))
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


def report(args: Sequence[str]) -> int:
    """Runs compared on one HTML page: `navit report RUN... --out report.html`."""
    from navit.report.command import ReportCommand, format_report, run_report

    path, runs = run_report(tyro.cli(ReportCommand, args=args, prog="navit report"))
    print(format_report(path, runs))
    return 0


def analyze(args: Sequence[str]) -> int:
    """Look inside a model: `navit analyze CHECKPOINT --images ...`."""
    from navit.analyze.command import AnalyzeCommand, format_result, run_analyze

    command = tyro.cli(AnalyzeCommand, args=args, prog="navit analyze")
    try:
        result = run_analyze(command)
    except OSError as error:  # no checkpoint, no connection to the hub, a full disk
        print(f"navit analyze: {error}", file=sys.stderr)
        return 2
    print(format_result(result))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "analyze": analyze,
    "report": report,
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
    for task in ("classify", "masked"):
        if f"--task={task}" in args or ("--task", task) in pairwise(args):
            return task, args
    named = any(arg.split("=")[0] == "--shards" for arg in args)
    return ("pairs" if named else "demo"), args


if __name__ == "__main__":
    sys.exit(main())
