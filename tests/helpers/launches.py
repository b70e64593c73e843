"""`navit train` started many times from one process: ranks as torchrun sets them up, random kills.

Importing torch takes seconds, so a process of its own imports everything once and forks for each
start. A test calls `launch` or `kill_at_random`; this file, run as a program, is that process.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = (
    *("--packer.patch-size", "8", "--packer.seq-len", "32", "--packer.max-tokens", "25"),
    *("--sequences-per-batch", "2", "--shuffle-window", "8", "--vocab-size", "300"),
    *("--model.vision.width", "16", "--model.vision.depth", "2", "--model.vision.mlp-dim", "32"),
    *("--model.vision.num-heads", "2", "--model.vision.drop-path", "0.3"),
    *("--model.text.width", "16", "--model.text.depth", "1", "--model.text.mlp-dim", "32"),
    *("--model.text.num-heads", "2", "--model.embed-dim", "16", "--flip", "0"),
    *("--color-jitter", "0", "--workers", "0", "--precision", "fp32", "--device", "cpu"),
)
"""Options of a run of short steps; with drop path its random state counts."""
RECORD = """
import json
from navit.train.loop import Trainer
real = Trainer._step
def recorded(self, batches, log):
    with open(self.run / f"batches-{rank}.jsonl", "a") as file:
        for batch in batches:
            file.write(json.dumps([self.state.step, batch.state["stream"], batch.keys]) + "\\n")
    return real(self, batches, log)
Trainer._step = recorded
"""
"""A patch that writes which stream each batch of a step comes from, and its keys."""


def train_args(shards: Sequence[str], run: Path, *options: str) -> list[str]:
    """Return the arguments of a tiny run."""
    return ["train", "pairs", "--shards", *shards, "--run", str(run), *TINY, *options]


@dataclass
class Launch:
    """One start of `navit train` on some ranks."""

    args: Sequence[str]
    """Arguments after `navit`."""
    ranks: int = 1
    """Number of processes; with one there is no process group, as without torchrun."""
    kill: Sequence[int] = ()
    """(rank, signal number): sent once the run has done `kill_at` steps."""
    kill_at: int = 3
    """Steps of the run after which the signal is sent."""
    frozen: Sequence[int] = ()
    """Ranks that are killed in the end, once the others have ended: those stopped by `kill`."""
    patch: str = ""
    """Python statements that each rank runs first; `rank` is its number."""


@dataclass
class Ended:
    """How a launch ended."""

    status: list[int] = field(default_factory=list)
    """Exit status of each rank; minus the signal of one that was killed."""
    stdout: list[str] = field(default_factory=list)
    """What each rank printed."""
    stderr: list[str] = field(default_factory=list)
    """What each rank wrote to standard error."""
    seconds: float = 0.0
    """From the start, or from the signal, to the end of the last rank."""


def launch(folder: Path, launches: Sequence[Launch], *, timeout: float = 100) -> list[Ended]:
    """Run launches one after the other; ``folder`` takes their output."""
    spec = {"folder": str(folder), "launches": [asdict(item) for item in launches]}
    return [Ended(**ended) for ended in _run("launches", spec, timeout)]


def kill_at_random(
    folder: Path,
    shards: Sequence[str],
    *options: str,
    kills: int,
    seed: int = 0,
    timeout: float = 100,
) -> list[str]:
    """Train in ``folder/undisturbed``, and in ``folder/killed`` with kills at random moments.

    After each kill the run is resumed, after the last one it goes to its end.

    Returns:
        What each kill met: "setup", "steps" or "saving".
    """
    names = ("undisturbed", "killed")
    args = {name: train_args(shards, folder / name, *options) for name in names}
    spec = {"folder": str(folder), "args": args, "kills": kills, "seed": seed}
    met: list[str] = _run("kills", spec, timeout)
    return met


def _run(what: str, spec: dict[str, Any], timeout: float) -> Any:
    # One thread each, as torchrun sets it: several processes share the cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.launches", what],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What follows runs in the process of its own.


def _fork(main: Callable[[], int], output: Path) -> int:
    """Run ``main`` in a child with its output in files; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)  # a group of its own: loader workers are killed with it
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
        )
    status = 1
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rank(
    args: Sequence[str], rank: int = 0, ranks: int = 1, port: int = 0, patch: str = ""
) -> int:
    from navit.__main__ import main

    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    sys.argv = ["navit", *args]
    exec(patch, {"rank": rank})
    return main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _steps(run: Path) -> int:
    """Steps that a run's metrics.jsonl tells of."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def _run_launches(spec: dict[str, Any]) -> list[dict[str, Any]]:
    ended = []
    for number, item in enumerate(Launch(**values) for values in spec["launches"]):
        port = _free_port()
        outputs = [Path(spec["folder"]) / f"launch-{number}-{rank}" for rank in range(item.ranks)]
        pids = [
            _fork(partial(_rank, item.args, rank, item.ranks, port, item.patch), output)
            for rank, output in enumerate(outputs)
        ]
        start = time.monotonic()
        if item.kill:
            run = Path(item.args[item.args.index("--run") + 1])
            deadline = start + 60
            while _steps(run) < item.kill_at and time.monotonic() < deadline:
                time.sleep(0.005)
            start = time.monotonic()
            os.kill(pids[item.kill[0]], item.kill[1])
        frozen = set(item.frozen)
        status = [0] * item.ranks
        for rank in sorted(range(item.ranks), key=lambda rank: rank in frozen):
            if rank in frozen:
                os.kill(pids[rank], signal.SIGKILL)
            status[rank] = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
        texts = [[_text(output, suffix) for output in outputs] for suffix in (".out", ".err")]
        ended.append(asdict(Ended(status, *texts, seconds=time.monotonic() - start)))
    return ended


def _kill_at_random(spec: dict[str, Any]) -> list[str]:
    """Kill at moments drawn three ways: any time, after some steps, while a checkpoint is made."""
    draws = random.Random(spec["seed"])
    folder = Path(spec["folder"])
    _finish(spec["args"]["undisturbed"], folder / "undisturbed-output")
    run, output, args = folder / "killed", folder / "killed-output", spec["args"]["killed"]
    met = []
    for number in range(spec["kills"]):
        begun = time.time()
        resume = ["--resume"] if run.is_dir() else []
        pid = _fork(partial(_rank, [*args, *resume]), output)
        _wait(draws, number % 3, run)
        os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == -signal.SIGKILL, f"it ended by itself: {_text(output, '.err')}"
        partials = [path.stat().st_mtime for path in (run / "checkpoints").glob(".partial-*")]
        saving = any(made > begun for made in partials)
        met.append("saving" if saving else "steps" if _steps(run) else "setup")
    _finish([*args, "--resume"], output)
    return met


def _finish(args: Sequence[str], output: Path) -> None:
    pid = _fork(partial(_rank, args), output)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, _text(output, ".err")


def _text(output: Path, suffix: str) -> str:
    return output.with_suffix(suffix).read_text()


def _wait(draws: random.Random, kind: int, run: Path) -> None:
    """Wait for a moment to kill."""
    if kind == 0:
        time.sleep(draws.uniform(0, 1.0))
        return
    checkpoints, begun = run / "checkpoints", time.monotonic()
    before = _newest(checkpoints)
    while time.monotonic() - begun < 60:
        if kind == 1 and _newest(checkpoints) > before:
            time.sleep(draws.uniform(0, 0.1))
            return
        if kind == 2 and _newest(checkpoints) > before and any(checkpoints.glob(".partial-0*")):
            time.sleep(draws.uniform(0, 0.01))
            return
    raise TimeoutError("the run made no checkpoint")


def _newest(checkpoints: Path) -> str:
    return max((path.name for path in checkpoints.glob("step-*")), default="")


if __name__ == "__main__":
    # Imported before the first fork: what every start needs.
    import torch._dynamo
    import torch.utils.tensorboard.writer  # noqa: F401

    import navit.train.command  # noqa: F401

    given = json.load(sys.stdin)
    result = (_run_launches if sys.argv[1] == "launches" else _kill_at_random)(given)
    print(json.dumps(result))
