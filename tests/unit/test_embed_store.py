"""What `navit embed` leaves on disk, stopped at any moment or finished."""

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navit.embed.files import output_files
from navit.embed.parts import Failure
from navit.embed.store import VectorStore

DIM = 3
IDENTITY = {"model": "abc", "packing": {"max_tokens": 256}}


def chunk(number: int) -> tuple[np.ndarray, list[str], list[Failure]]:
    """Make the chunk of a number: some rows, perhaps none, and some failures."""
    rng = np.random.default_rng(number)
    rows = int(rng.integers(0, 6))
    vectors = rng.standard_normal((rows, DIM), dtype=np.float32)
    failures = [Failure(9, f"k{number}\tx", "decode_error", "bad\nbytes")] * (number % 3)
    return vectors, [f"é{number}/{row}" for row in range(rows)], failures


def opened(out: Path, chunks: int, **changes: Any) -> VectorStore:
    settings_ = {"dim": DIM, "dtype": "float32", "num_chunks": chunks} | changes
    identity = settings_.pop("identity", IDENTITY)
    return VectorStore(output_files(out), identity, **settings_)


def write(out: Path, chunks: int, **changes: Any) -> VectorStore:
    store = opened(out, chunks, **changes)
    for number in range(store.done.chunks, chunks):
        store.append(*chunk(number))
    store.finish()
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_files_hold_every_chunk_in_order_and_nothing_else_is_left(tmp_path: Path) -> None:
    store = write(tmp_path / "v.npy", 7)

    made = [chunk(number) for number in range(7)]
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.concatenate([v for v, _, _ in made]))
    keys = (tmp_path / "v.keys.txt").read_text().splitlines()
    assert keys == [key for _, names, _ in made for key in names]
    lines = (tmp_path / "v.failures.tsv").read_text().splitlines()
    assert lines[0] == "key\tcause\tdetail"
    assert lines[1:] == [f"k{n} x\tdecode_error\tbad bytes" for n in range(7) for _ in range(n % 3)]
    assert sorted(contents(tmp_path)) == [
        "v.failures.tsv",
        "v.keys.txt",
        "v.manifest.json",
        "v.npy",
    ]
    assert store.done.causes == {"decode_error": 6}
    assert np.load(tmp_path / "v.npy", mmap_mode="r").shape == (store.done.rows, DIM)


@settings(max_examples=30)
@given(
    chunks=st.integers(0, 6),
    stops=st.lists(st.integers(0, 6), max_size=4),
    torn=st.binary(max_size=40),
)
def test_a_run_killed_at_any_chunk_and_continued_gives_the_bytes_of_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory, chunks: int, stops: list[int], torn: bytes
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    for stop in sorted(stops):
        store = opened(folder / "v.npy", chunks)
        for number in range(store.done.chunks, min(stop, chunks)):
            store.append(*chunk(number))
        store.close()
        for path in store.files.parts.values():  # what a kill leaves in the middle of a chunk
            with path.open("ab") as file:
                file.write(torn)
    write(folder / "v.npy", chunks)

    whole = tmp_path_factory.mktemp("whole")
    write(whole / "v.npy", chunks)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("broken_at", range(5))
def test_a_kill_while_the_files_get_their_names_is_continued_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_at: int
) -> None:
    calls = 0
    original = Path.replace

    def replace(self: Path, target: Any) -> Path:
        nonlocal calls
        if finishing:
            calls += 1
            if calls == broken_at + 1:
                raise KeyboardInterrupt
        return original(self, target)

    finishing = False
    monkeypatch.setattr(Path, "replace", replace)
    store = opened(tmp_path / "a" / "v.npy", 4)
    for number in range(4):
        store.append(*chunk(number))
    finishing = True
    with pytest.raises(KeyboardInterrupt):
        store.finish()
    store.close()
    finishing = False

    write(tmp_path / "a" / "v.npy", 4)

    write(tmp_path / "b" / "v.npy", 4)
    found = contents(tmp_path / "a")
    assert found == contents(tmp_path / "b")


def test_an_output_without_failures_has_no_list_of_them(tmp_path: Path) -> None:
    store = opened(tmp_path / "v.npy", 1)
    store.append(np.zeros((2, DIM), np.float32), ["a", "b"], [])
    store.finish()

    assert sorted(contents(tmp_path)) == ["v.keys.txt", "v.manifest.json", "v.npy"]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"identity": {**IDENTITY, "model": "abd"}}, "model was 'abc' and is 'abd'"),
        (
            {"identity": {"model": "abc", "packing": {"max_tokens": 64}}},
            "packing.max_tokens was 256 and is 64",
        ),
        ({"dtype": "float16"}, "dtype was 'float32' and is 'float16'"),
        ({"dim": 4}, "dim was 3 and is 4"),
        ({"chunks": 3}, "chunks was 2 and is 3"),
    ],
)
def test_an_output_of_other_settings_is_neither_continued_nor_touched(
    tmp_path: Path, finished: bool, changes: dict[str, Any], difference: str
) -> None:
    store = opened(tmp_path / "v.npy", 2)
    store.append(*chunk(0))
    if finished:
        store.append(*chunk(1))
        store.finish()
    store.close()
    before = contents(tmp_path)

    with pytest.raises(ValueError, match=difference):
        opened(tmp_path / "v.npy", **({"chunks": 2} | changes))

    assert contents(tmp_path) == before
    write(tmp_path / "v.npy", 2, overwrite=True, identity={"model": "new"})
    assert json.loads((tmp_path / "v.manifest.json").read_text())["identity"]["model"] == "new"


def test_a_finished_output_is_known_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "v.npy", 3)
    before = contents(tmp_path)

    store = opened(tmp_path / "v.npy", 3)

    assert store.is_finished
    assert contents(tmp_path) == before
    (tmp_path / "v.npy").unlink()
    with pytest.raises(ValueError, match=r"is not there\. Put it back"):
        opened(tmp_path / "v.npy", 3)


def test_files_in_the_way_are_never_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"precious")

    with pytest.raises(ValueError, match=r"v\.npy is there without one"):
        opened(tmp_path / "v.npy", 1)
    assert (tmp_path / "v.npy").read_bytes() == b"precious"
    (tmp_path / "v.npy").unlink()
    (tmp_path / "v.manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a manifest"):
        opened(tmp_path / "v.npy", 1)
    write(tmp_path / "v.npy", 1, overwrite=True)


def test_a_partial_file_that_lost_bytes_is_not_continued(tmp_path: Path) -> None:
    store = opened(tmp_path / "v.npy", 2)
    store.append(*chunk(2))
    store.close()
    with (tmp_path / "v.keys.txt.partial").open("r+b") as file:
        file.truncate(1)

    with pytest.raises(ValueError, match="must have at least"):
        opened(tmp_path / "v.npy", 2)


def test_two_processes_never_write_one_output(tmp_path: Path) -> None:
    store = opened(tmp_path / "v.npy", 2)
    code = (
        "import sys; from pathlib import Path\n"
        "from navit.embed.files import output_files\n"
        "from navit.embed.store import VectorStore\n"
        f"identity = {IDENTITY!r}\n"
        "try:\n"
        "    VectorStore(output_files(Path(sys.argv[1])), identity, dim=3, dtype='float32',\n"
        "                num_chunks=2, overwrite=len(sys.argv) > 2)\n"
        "except ValueError as error: print(error)\n"
    )
    for more in ([], ["overwrite"]):
        arguments = [sys.executable, "-c", code, str(tmp_path / "v.npy"), *more]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert "another one is writing" in done.stdout, done.stderr
    for number in range(2):
        store.append(*chunk(number))
    store.finish()
    store.close()
    assert len(np.load(tmp_path / "v.npy")) == store.done.rows


def test_half_precision_is_rounded_and_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path / "v.npy", 2, dtype="float16")
    store.append(np.full((1, DIM), 0.1, np.float32), ["a"], [])
    with pytest.raises(ValueError, match=r"fit float16 .*got 70000"):
        store.append(np.full((1, DIM), 7e4, np.float32), ["b"], [])
    store.append(np.full((1, DIM), 0.2, np.float32), ["b"], [])
    store.finish()

    expected = np.repeat(np.array([[0.1], [0.2]], np.float16), DIM, axis=1)
    assert np.load(tmp_path / "v.npy").dtype == np.float16
    assert np.array_equal(np.load(tmp_path / "v.npy"), expected)


@pytest.mark.parametrize("name", ["folder", "new/folder"])
def test_a_folder_holds_files_of_plain_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, 3)

    expected = ["failures.tsv", "keys.txt", "manifest.json", "vectors.npy"]
    assert sorted(contents(tmp_path / name)) == expected


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npy or \.parquet file, or a folder"):
        output_files(tmp_path / "v.csv")


def test_parquet_without_pyarrow_names_the_package_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "pyarrow" else original(name, package)

    monkeypatch.setattr("navit.embed.files.find_spec", find_spec)
    with pytest.raises(ValueError, match=r"pyarrow, which is not installed\. Run `pip install"):
        output_files(tmp_path / "v.parquet")
    assert builtins.list(tmp_path.iterdir()) == []


def test_parquet_holds_each_key_beside_its_vector(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    stopped = opened(tmp_path / "v.parquet", 7)
    stopped.append(*chunk(0))
    stopped.close()

    write(tmp_path / "v.parquet", 7)

    table = parquet.read_table(tmp_path / "v.parquet")
    made = [chunk(number) for number in range(7)]
    assert table.column("key").to_pylist() == [key for _, names, _ in made for key in names]
    found = np.array(table.column("vector").to_pylist(), np.float32)
    assert np.array_equal(found, np.concatenate([v for v, _, _ in made]))
    assert sorted(contents(tmp_path)) == ["v.failures.tsv", "v.manifest.json", "v.parquet"]
