"""The files of one output: their names, and how rows are written into each."""

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from navit.embed.parts import Failure

FAILURES_HEAD = b"key\tcause\tdetail\n"

_HEADER_BYTES = 128  # what numpy writes for a matrix of any number of rows
_ROW_GROUP = 65_536  # rows of a Parquet file written together


@dataclass(frozen=True)
class OutputFiles:
    """Where the parts of one output are."""

    vectors: Path
    """The vectors: .npy, or .parquet with the keys beside each."""
    keys: Path | None
    """One key a line, in the order of the vectors; None where Parquet holds them."""
    failures: Path
    """Key, cause and detail of each image that has no vector; there is none if none failed."""
    manifest: Path
    """What was embedded, with what, and how far."""

    @property
    def is_parquet(self) -> bool:
        """Whether the finished file is Parquet."""
        return self.keys is None

    @property
    def parts(self) -> dict[str, Path]:
        """The files that grow while a run is going."""
        keys = self.keys or self.vectors.with_suffix(".keys.txt")
        named = {
            "vectors": self.vectors.with_suffix(".npy"),
            "keys": keys,
            "failures": self.failures,
        }
        return {name: path.with_name(path.name + ".partial") for name, path in named.items()}


def output_files(out: Path) -> OutputFiles:
    """Name the files of an output.

    Args:
        out: ``NAME.npy``, ``NAME.parquet``, or a folder.

    Raises:
        ValueError: If it is anything else, or Parquet is asked for and pyarrow is not installed.
    """
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            "writing .parquet needs the package pyarrow, which is not installed. Run `pip install "
            f"pyarrow`, or write {out.with_suffix('.npy').name}."
        )
    if out.is_dir() or not out.suffix:
        named = {"vectors": "vectors.npy", "keys": "keys.txt", "failures": "failures.tsv"}
        paths = {name: out / file for name, file in named.items()}
        return OutputFiles(**paths, manifest=out / "manifest.json")
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out must be a .npy or .parquet file, or a folder; got {out}.")
    keys = None if out.suffix == ".parquet" else out.with_suffix(".keys.txt")
    failures, manifest = out.with_suffix(".failures.tsv"), out.with_suffix(".manifest.json")
    return OutputFiles(out, keys, failures, manifest)


def failure_line(failure: Failure) -> bytes:
    """Return a failure's row of the table."""
    # Anything that would break the table: tabs, and every kind of line break.
    cells = (" ".join(cell.split()) for cell in (failure.key, failure.cause, failure.detail))
    return ("\t".join(cells) + "\n").encode("utf-8", "surrogateescape")


def npy_header(dtype: np.dtype[Any], rows: int, dim: int) -> bytes:
    """Return the header of a .npy file of ``rows`` x ``dim`` values, in row order."""
    buffer = BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": (rows, dim)}
    np.lib.format.write_array_header_1_0(buffer, described)
    header = buffer.getvalue()
    assert len(header) == _HEADER_BYTES, "a header must not change its length as rows are added"
    return header


def locked(path: Path) -> BinaryIO:
    """Open a file for this process alone; the lock ends with the process, however it ends.

    Raises:
        ValueError: If another process has it open so.
    """
    file = path.open("r+b")
    with suppress(ImportError):  # not on every system
        import fcntl

        try:
            # Not flock: processes that read the images would hold it on, seconds after this one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ValueError(
                f"an output must be written by one process; another one is writing {path}. Wait "
                "for it, or name another --out."
            ) from error
    return file


def write_parquet(path: Path, vectors: Path, keys: Path) -> None:
    """Write columns ``key`` (string) and ``vector`` (a list of D values), a row group at a time."""
    arrow: Any = import_module("pyarrow")
    parquet: Any = import_module("pyarrow.parquet")
    matrix = np.load(vectors, mmap_mode="r")
    dim = matrix.shape[1]
    value = arrow.from_numpy_dtype(matrix.dtype)
    schema = arrow.schema([("key", arrow.string()), ("vector", arrow.list_(value, dim))])
    new = path.with_name(path.name + ".new")
    with (
        keys.open(encoding="utf-8", errors="replace", newline="\n") as lines,
        parquet.ParquetWriter(new, schema) as writer,
    ):
        for start in range(0, len(matrix), _ROW_GROUP):
            rows = np.ascontiguousarray(matrix[start : start + _ROW_GROUP])
            names = [next(lines).rstrip("\n") for _ in rows]
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), dim)
            writer.write_table(arrow.table([arrow.array(names), column], schema=schema))
    new.replace(path)
