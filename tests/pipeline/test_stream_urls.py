"""A stream over commands and URLs gives the batches of the local files, resumed or not."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from examples import stream_urls
from packer.batch import BatchStats, PackedBatch
from packer.config import PackerConfig
from packer.errors import TooManyFailures
from packer.plan.drop import BetaDrop
from packer.plan.place import Placement
from packer.stream import LoaderState, PackedStream
from tests.helpers.samples import assert_same_batches, drain, image_samples, make_shards
from tests.helpers.server import Server, serve

# Python 3.12 and later warn where a process that runs threads forks DataLoader workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

P = 8
COUNT = 37


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """37 samples in 4 shards."""
    return make_shards(tmp_path_factory.mktemp("urls"), image_samples(COUNT, unit=P), 10)


@pytest.fixture
def server(shards: list[str], tmp_path: Path) -> Iterator[Server]:
    for path in shards:
        shutil.copy(path, tmp_path)
    with serve(tmp_path) as running:
        yield running


def config(**options: Any) -> PackerConfig:
    placement = Placement("exact", window=12, max_age=60)
    return PackerConfig(
        **{"patch_size": P, "seq_len": 32, "placement": placement, "token_drop": BetaDrop(0.3, 0.6)}
        | options
    )


def open_stream(
    shards: Sequence[str] | str, settings: PackerConfig | None = None, **options: Any
) -> PackedStream:
    options = {"sequences_per_batch": 2, "shuffle_window": 5} | options
    return PackedStream(shards, settings or config(), **options)


def load(stream: PackedStream, workers: int = 0, limit: int | None = None) -> list[PackedBatch]:
    """List batches; what positions depend on has sizes in it, which a URL has not."""
    batches = drain(DataLoader(stream, batch_size=None, num_workers=workers), limit)
    return [replace(batch, state={**(batch.state or {}), "source": 0}) for batch in batches]


def state_after(stream: PackedStream, batches: int) -> LoaderState:
    state = LoaderState()
    for batch in drain(DataLoader(stream, batch_size=None), batches):
        state.update(batch)
    return LoaderState.from_dict(json.loads(json.dumps(state.to_dict())))


def total(batches: Sequence[PackedBatch]) -> BatchStats:
    return sum((batch.stats for batch in batches), BatchStats())


@pytest.mark.parametrize("num_streams", [1, 2, 6])
@pytest.mark.parametrize("size_index", [False, True])
def test_batches_are_those_of_the_local_files(
    shards: list[str], server: Server, num_streams: int, size_index: bool
) -> None:
    options = {"num_streams": num_streams, "epochs": 2}
    local = load(open_stream(shards, **options))
    assert total(local).images == 2 * COUNT
    options["size_index"] = size_index  # there is no index of a URL: nothing changes
    url = server.url("s-0000{0..3}.tar?token=1")
    command = f"pipe:cat {Path(shards[0]).parent}/s-0000{{0..3}}.tar"
    for spec in (
        url,
        command,
        [shards[0], server.url("s-0000{1..2}.tar"), f"pipe:cat {shards[3]}"],
    ):
        assert_same_batches(load(open_stream(spec, **options)), local)
    assert_same_batches(
        load(open_stream(url, **options), 2), load(open_stream(shards, **options), 2)
    )


@pytest.mark.parametrize("num_streams", [1, 3])
def test_resuming_after_any_batch_is_bit_identical(
    shards: list[str], server: Server, num_streams: int
) -> None:
    spec = [server.url("s-0000{0..1}.tar"), *(f"pipe:cat {path}" for path in shards[2:])]
    options = {"num_streams": num_streams}
    whole = load(open_stream(spec, **options), 0, 9)
    assert_same_batches(whole, load(open_stream(shards, **options), 0, 9))
    for stop in (1, 4, 6):
        state = state_after(open_stream(spec, **options), stop)
        stream = open_stream(spec, **options, state=state)
        assert_same_batches(load(stream, 0, 9 - stop), whole[stop:])
    stream = open_stream(spec, state=state_after(open_stream(spec, **options), 4))
    assert_same_batches(load(stream, 1, 5), whole[4:])


def test_resuming_asks_for_a_shard_once_for_all_that_waits_in_it(server: Server) -> None:
    url = server.url("s-0000{0..3}.tar")
    settings = config(seq_len=64, placement=Placement("exact", window=25, max_age=99))
    options = {"shuffle_window": 8, "num_streams": 1}
    state = state_after(open_stream(url, settings, **options), 1)
    stored = state.streams[0]
    rows = [*stored["window"], *stored["placer"], *chain.from_iterable(stored["ready"])]
    waiting = {row[1] for row in rows}
    assert len(stored["window"]) + len(stored["placer"]) > 15
    assert len(waiting) > 1
    server.requests.clear()
    stream = iter(open_stream(url, settings, state=state, **options))
    next(stream)
    names = {f"s-{shard:05d}.tar" for shard in waiting}
    # Once for all that waits in it, and once more where the stream goes on in it.
    assert all(1 <= server.requests[name] <= 2 for name in names)


def test_urls_that_fail_are_counted_with_their_cause(
    shards: list[str], server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.status["s-00001.tar"] = 500 + 10  # not one of those curl tries again
    server.cut["s-00002.tar"] = 15000
    spec = [server.url("s-0000{0..2}.tar"), f"pipe:head -c 20000 {shards[3]}; exit 1"]
    batches = load(open_stream(spec, epochs=1, num_streams=2))
    assert total(batches).skipped == {"missing_shard": 1, "truncated_shard": 2}
    assert total(batches).images == total(batches).samples_read - 3
    assert 10 < total(batches).images < 27
    for shard in ("s-00001.tar", "s-00002.tar", f"head -c 20000 {shards[3]}"):
        assert sum(shard in record.getMessage() for record in caplog.records) == 1
    # Failing is part of the run: it goes the same way again, and from a state.
    assert_same_batches(load(open_stream(spec, epochs=1, num_streams=2)), batches)
    state = state_after(open_stream(spec, epochs=1, num_streams=2), 2)
    assert_same_batches(load(open_stream(spec, epochs=1, state=state)), batches[2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_urls_that_fail_in_a_row_are_fatal(server: Server, workers: int) -> None:
    stream = open_stream(server.url("none-{0..5}.tar"), config(max_failures_in_row=4))
    with pytest.raises(TooManyFailures, match=r"fewer than 4 samples.*missing_shard: .*none-.*22"):
        load(stream, workers)


def test_a_url_that_changed_since_is_refused(server: Server) -> None:
    url = server.url("s-0000{0..3}.tar")
    state = state_after(open_stream(url, num_streams=1), 2)
    shard = state.streams[0]["placer"][0][1]
    path = server.folder / f"s-{shard:05d}.tar"
    path.write_bytes(path.read_bytes()[10240:])
    with pytest.raises(ValueError, match=r"waited for its place .* must be as it was"):
        load(open_stream(url, state=state), 0, 1)
    # The same offsets with other images in them: another length gives it away.
    make_shards(server.folder / "other", image_samples(COUNT, unit=P, seed=1), 10)
    shutil.copy(server.folder / "other" / path.name, path)
    with pytest.raises(ValueError, match=r"waited for its place"):
        load(open_stream(url, state=state), 0, 1)
    server.status[path.name] = 404
    with pytest.raises(ValueError, match=r"waited for its place .*curl ended with status 22"):
        load(open_stream(url, state=state), 0, 1)
    with pytest.raises(ValueError, match="was taken on other shards"):
        open_stream(server.url("s-0000{0..2}.tar"), state=state)


def test_the_example_streams_from_a_server_and_a_command(
    shards: list[str], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = stream_urls.read([server.url("s-0000{0..1}.tar"), f"pipe:cat {shards[2]}"])
    assert (stats.images, stats.skipped) == (30, {})
    stream_urls.main()
    shown = capsys.readouterr().out
    assert "24 images" in shown
    assert "{'missing_shard': 1}" in shown
