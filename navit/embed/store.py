"""Vectors on disk, written so that a kill at any moment loses no chunk that was finished.

While a run is going, vectors, keys and failures are appended to files that end in ``.partial``, and
after each chunk a manifest says how long they were. What a kill leaves behind it is cut off when
the run goes on, so the finished files are those of a run that was never stopped.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from navit.embed.files import (
    FAILURES_HEAD,
    OutputFiles,
    failure_line,
    locked,
    npy_header,
    write_parquet,
)
from navit.embed.parts import Failure

VectorType = Literal["float32", "float16"]
State = Literal["partial", "finishing", "finished"]

_FORMAT = "navit embed 1"


@dataclass(frozen=True)
class Done:
    """How far a run is."""

    chunks: int = 0
    """Chunks embedded and stored."""
    rows: int = 0
    """Vectors stored."""
    causes: Mapping[str, int] = field(default_factory=dict)
    """Images that failed, by cause."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each growing file."""

    @property
    def failures(self) -> int:
        """Images that have no vector."""
        return sum(self.causes.values())


class VectorStore:
    """One output, new or continued; `append` its chunks in order, then `finish`.

    Args:
        files: Where it is.
        identity: What makes it what it is, JSON-ready: checkpoint, inputs, settings. An output that
            was begun with another is not continued.
        dim: D.
        dtype: Type of the stored values.
        num_chunks: Chunks of the whole run.
        overwrite: Whether to begin anew whatever is there.

    Raises:
        ValueError: If the output was begun with another identity, other files are in the way, or
            another process is writing it.
    """

    def __init__(
        self,
        files: OutputFiles,
        identity: Mapping[str, Any],
        *,
        dim: int,
        dtype: VectorType,
        num_chunks: int,
        overwrite: bool = False,
    ) -> None:
        self.files, self.dim, self.dtype = files, dim, np.dtype(dtype)
        self.num_chunks = num_chunks
        self.identity = dict(identity) | {"dim": dim, "dtype": dtype, "chunks": num_chunks}
        self.done = Done()
        self.is_finished = False
        """Whether the output is whole."""
        self._open: dict[str, BinaryIO] = {}
        files.manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest = None if overwrite else _read_manifest(files.manifest)
        try:
            if manifest is None:
                self._begin(overwrite)
            else:
                self._go_on(manifest)
        except BaseException:
            self.close()
            raise

    def append(
        self, vectors: npt.NDArray[np.float32], keys: Sequence[str], failures: Sequence[Failure]
    ) -> None:
        """Store the next chunk; when this returns, no kill loses it.

        Args:
            vectors: float32 (n, D).
            keys: Key of each.
            failures: The chunk's images that have no vector.

        Raises:
            ValueError: If a value is beyond the range of float16.
            OSError: If the disk is full; the run can go on from the chunk before.
        """
        assert vectors.shape == (len(keys), self.dim)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(vectors.astype(self.dtype))
        if not np.isfinite(stored).all():
            raise ValueError(
                f"vectors must fit float16 (at most 65504); got {np.abs(vectors).max():.6g}. Use "
                "--dtype float32 or --normalize."
            )
        self._write("vectors", stored.tobytes())
        self._write("keys", "".join(f"{key}\n" for key in keys).encode("utf-8", "surrogateescape"))
        self._write("failures", b"".join(map(failure_line, failures)))
        causes = Counter(self.done.causes) + Counter(failure.cause for failure in failures)
        self.done = Done(
            self.done.chunks + 1,
            self.done.rows + len(keys),
            dict(sorted(causes.items())),
            {name: file.tell() for name, file in self._open.items()},
        )
        self._flush()
        self._write_manifest("partial")

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Give the files their names; it can be called again where it was interrupted.

        Args:
            summary: What else the manifest is to say.
        """
        assert self.done.chunks == self.num_chunks, "every chunk must be stored"
        parts = self.files.parts
        if self._open:
            self._open["vectors"].seek(0)
            self._open["vectors"].write(npy_header(self.dtype, self.done.rows, self.dim))
            self._flush()
        self._write_manifest("finishing")
        if self.files.is_parquet and parts["vectors"].exists():
            write_parquet(self.files.vectors, parts["vectors"], parts["keys"])
        if self.done.failures:
            _rename(parts["failures"], self.files.failures)
        if self.files.keys is not None:
            _rename(parts["vectors"], self.files.vectors)
            _rename(parts["keys"], self.files.keys)
        self._write_manifest("finished", summary)
        for path in parts.values():
            path.unlink(missing_ok=True)
        self.is_finished = True
        self.close()

    def close(self) -> None:
        """Close the files; a run that is not finished can be continued."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def discard(self) -> None:
        """Remove what was written of an output that is not finished."""
        self.close()
        for path in (self.files.manifest, *self.files.parts.values()):
            path.unlink(missing_ok=True)

    def _begin(self, overwrite: bool) -> None:
        files = self.files
        finished = [files.vectors, files.failures, *([files.keys] if files.keys else [])]
        there = [path for path in (*finished, *files.parts.values()) if path.exists()]
        if there and not overwrite:
            raise ValueError(
                f"an output must be new, or have its manifest ({files.manifest.name}) to go on; "
                f"{there[0]} is there without one. Name another --out, or give --overwrite."
            )
        for name, path in files.parts.items():
            path.touch()
            self._open[name] = locked(path)
        # The manifest goes first: without it nothing left over can pass for a finished output.
        for path in (files.manifest, *finished):
            path.unlink(missing_ok=True)
        for file in self._open.values():
            file.truncate()
        self._write("vectors", npy_header(self.dtype, 0, self.dim))
        self._write("failures", FAILURES_HEAD)
        self.done = Done(lengths={name: file.tell() for name, file in self._open.items()})
        self._flush()
        self._write_manifest("partial")

    def _go_on(self, manifest: Mapping[str, Any]) -> None:
        files = self.files
        differing = list(_differences(manifest["identity"], self.identity, ""))
        if differing:
            what = "finished" if manifest["state"] == "finished" else "begun"
            raise ValueError(
                f"{files.vectors} was {what} with other settings: {'; '.join(differing)}. Give "
                "the same, name another --out, or give --overwrite to begin anew."
            )
        self.done = Done(**manifest["done"])
        if manifest["state"] == "finished":
            if not files.vectors.exists():
                raise ValueError(
                    f"{files.manifest} says that its vectors are finished; {files.vectors} is not "
                    "there. Put it back, or give --overwrite to begin anew."
                )
            self.is_finished = True
            return
        if manifest["state"] == "finishing":
            return  # stopped while its files were named: `finish` goes on with that
        for name, path in files.parts.items():
            length = self.done.lengths[name]
            if not path.exists() or path.stat().st_size < length:
                raise ValueError(
                    f"{path} must have at least the {length} bytes its manifest states, to go on. "
                    "Put it back, or give --overwrite to begin anew."
                )
            self._open[name] = locked(path)
            self._open[name].truncate(length)
            self._open[name].seek(length)

    def _write(self, name: str, data: bytes) -> None:
        self._open[name].write(data)

    def _flush(self) -> None:
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())

    def _write_manifest(self, state: State, summary: Mapping[str, Any] | None = None) -> None:
        described = {"format": _FORMAT, "state": state, "identity": self.identity}
        described |= {"done": asdict(replace(self.done, causes=dict(self.done.causes)))}
        described |= {"summary": dict(summary)} if summary else {}
        new = self.files.manifest.with_name(self.files.manifest.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(described, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.files.manifest)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"{path} must be a manifest of {_FORMAT!r}; it is not. Name another --out, or give "
            "--overwrite to begin anew."
        )
    return found


def _differences(a: Any, b: Any, name: str) -> "list[str]":
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted({*a, *b})
            for found in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [f"{name} was {a!r} and is {b!r}"]


def _rename(partial: Path, final: Path) -> None:
    if partial.exists():
        partial.replace(final)
