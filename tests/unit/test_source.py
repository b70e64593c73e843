"""Shards behind commands and URLs give what the same file gives, and fail in the open."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from packer import source
from packer.shards import RawSample, expand_shards, iter_shard, read_samples_at
from packer.source import open_shard, shard_name, shown
from tests.helpers.samples import image_samples, make_shards
from tests.helpers.server import Server, serve


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("source"), image_samples(12), 12)[0]


@pytest.fixture
def server(shard: str) -> Iterator[Server]:
    with serve(Path(shard).parent) as running:
        yield running


def read(shard: str, start_offset: int = 0) -> tuple[list[RawSample], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    samples = iter_shard(
        shard, start_offset=start_offset, on_problem=lambda *problem: problems.append(problem)
    )
    return list(samples), problems


def contents(samples: list[RawSample]) -> list[tuple[str, int, dict[str, bytes]]]:
    return [(sample.key, sample.offset, sample.members) for sample in samples]


def test_a_command_and_a_url_give_the_samples_of_the_file(shard: str, server: Server) -> None:
    local, _ = read(shard)
    for remote in (f"pipe:cat {shard}", server.url("s-00000.tar?token=1")):
        for start in (0, local[5].offset):
            samples, problems = read(remote, start)
            assert contents(samples) == contents([s for s in local if s.offset >= start])
            assert not problems


def test_waiting_samples_are_collected_in_one_pass(shard: str, server: Server) -> None:
    local, _ = read(shard)
    offsets = [local[place].offset for place in (8, 2, 3, 3)]
    found = read_samples_at(server.url("s-00000.tar"), offsets)
    assert sorted(found) == sorted(set(offsets))
    assert all(found[s.offset].members == s.members for s in local if s.offset in found)
    assert server.requests == {"s-00000.tar": 1}
    with pytest.raises(ValueError, match=r"must start at byte 512 of http.*; none does"):
        read_samples_at(server.url("s-00000.tar"), [0, 512])
    with pytest.raises(ValueError, match="must start at byte 0 of pipe:exit 3; missing_shard"):
        read_samples_at("pipe:exit 3", [0])


def test_a_cut_stream_gives_what_the_cut_file_gives(shard: str, tmp_path: Path) -> None:
    whole = Path(shard).read_bytes()
    cut = tmp_path / "s-00000.tar"
    for size in range(0, len(whole), 1931):
        cut.write_bytes(whole[:size])
        local, causes = read(str(cut))
        samples, problems = read(f"pipe:head -c {size} {shard}")
        assert contents(samples) == contents(local)
        assert [cause for cause, _ in problems] == [cause for cause, _ in causes]


@pytest.mark.parametrize(
    ("command", "cause", "detail"),
    [
        ("exit 3", "missing_shard", "the command ended with status 3"),
        ("no-such-command", "missing_shard", "status 127 (command not found)"),
        ("kill -9 $$", "missing_shard", "was ended by signal 9"),
        ("head -c 20000 SHARD; exit 3", "truncated_shard", "the command ended with status 3"),
        ("head -c 20000 SHARD; kill -9 $$", "truncated_shard", "was ended by signal 9"),
        ("head -c 20000 SHARD", "truncated_shard", "ends inside"),
        ("true", "truncated_shard", "the file is empty"),
        ("yes", "corrupt_shard", "no tar header at byte 0"),
    ],
)
def test_a_command_that_fails_is_reported_with_its_reason(
    shard: str, command: str, cause: str, detail: str
) -> None:
    command = f"pipe:{command.replace('SHARD', shard)}"
    samples, problems = read(command)
    whole = read(shard)[0]
    assert contents(samples) == contents(whole[: len(samples)])
    assert (len(samples) > 1) == ("head" in command)
    [(found, message)] = problems
    assert found == cause
    assert message.startswith(f"{command}: ")
    assert detail in message


def test_what_a_failing_command_gave_does_not_depend_on_time(shard: str) -> None:
    """A reader that looks at the exit status first would lose what it has already read."""
    found = {
        len(read(f"pipe:head -c 20000 {shard}; {pause} exit 3")[0])
        for pause in ("", "sleep 0.05;")
        for _ in range(4)
    }
    assert len(found) == 1
    with open_shard(f"pipe:head -c 20000 {shard}; exit 3") as reader:
        time.sleep(0.05)  # the command has failed before its first byte is read
        assert len(reader.read(0, 30000)) == 20000
        assert reader.failure == "the command ended with status 3"


def test_a_sample_that_may_be_cut_by_a_failure_is_left_out(shard: str) -> None:
    # Whole members and no more: of an image without its caption nothing shows that one is missing.
    samples, _ = read(shard)
    sent = samples[3].offset
    assert len(read(f"pipe:head -c {sent} {shard}")[0]) == 3
    kept, problems = read(f"pipe:head -c {sent} {shard}; exit 1")
    assert len(kept) == 2
    assert [cause for cause, _ in problems] == ["truncated_shard"]


def test_a_url_that_fails_is_reported_without_its_secrets(server: Server) -> None:
    server.cut["s-00000.tar"] = 20000
    port = server.server_port
    for url, cause, detail, count in (
        (server.url("none.tar"), "missing_shard", "status 22 (the server answered", 0),
        (server.url("s-00000.tar"), "truncated_shard", "status 18 (the connection ended", 4),
        ("http://127.0.0.1:1/a.tar", "missing_shard", "status 7 (no connection)", 0),
        (f"http://u:secret@127.0.0.1:{port}/x.tar?t=secret", "missing_shard", "22", 0),
    ):
        samples, [(found, message)] = read(url)
        assert (len(samples), found) == (count, cause)
        assert detail in message
        assert message.startswith(shown(url) + ": ")
        assert "secret" not in message
    assert shown(f"http://u:secret@127.0.0.1:{port}/x.tar?t=secret").endswith(f":{port}/x.tar")


def test_a_url_without_curl_is_a_missing_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    _, [(cause, message)] = read("http://127.0.0.1:1/a.tar")
    assert cause == "missing_shard"
    assert "curl, which reads URLs, must be installed" in message


def processes(session: int) -> list[str]:
    """List what runs in a session: the sixth field of its `stat` is the session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("after", ["", "sleep 300", "sleep 300 | cat"])
def test_a_process_that_is_left_early_is_gone(
    shard: str,
    tmp_path: Path,
    after: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_LEAVE_SECONDS", 0.2)
    problems: list[str] = []
    command = f"pipe:echo $$ > {tmp_path}/pid; cat {shard} {shard} {shard}; {after}"
    samples = iter_shard(command, on_problem=lambda *problem: problems.extend(problem))
    next(samples)
    shell = int((tmp_path / "pid").read_text())
    assert processes(shell)
    del samples
    gc.collect()  # a process or file that is still open would be a ResourceWarning, hence an error
    assert not processes(shell)
    with pytest.raises(ChildProcessError):  # waited for, so no zombie
        os.waitpid(shell, os.WNOHANG)
    assert not problems
    assert capfd.readouterr() == ("", "")


def test_a_url_that_is_left_early_makes_no_noise(
    server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = iter_shard(server.url("s-00000.tar"), on_problem=lambda *_: pytest.fail("a problem"))
    next(samples)
    del samples
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_command_that_stalls_is_given_up(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(source, "_LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(source, "_GRACE_SECONDS", 0.1)
    for command, detail in (
        (f"head -c 20000 {shard}; sleep 300", "gave no byte for 0.1 seconds"),
        (f"head -c 20000 {shard}; exec >&-; sleep 300", "closed its output but did not end"),
        (f"trap '' TERM; head -c 20000 {shard}; sleep 300", "gave no byte"),
    ):
        samples, [(cause, message)] = read(f"pipe:{command}")
        assert len(samples) == 4
        assert cause == "truncated_shard"
        assert detail in message


def test_webdatasets_switches_are_respected(
    shard: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from webdataset import utils

    monkeypatch.setenv("GOPEN_REWRITE", f"http://cache/={Path(shard).parent}/")
    assert contents(read("http://cache/s-00000.tar")[0]) == contents(read(shard)[0])
    monkeypatch.setattr(utils, "enforce_security", True)
    with pytest.raises(ValueError, match="WDS_SECURE is set"):
        read(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


# Names


def test_urls_and_commands_expand_and_are_not_looked_for() -> None:
    assert expand_shards("http://h/a-{00..02}.tar?x=1") == [
        f"http://h/a-{i:02d}.tar?x=1" for i in range(3)
    ]
    assert expand_shards(["pipe:cat a-{0..1}.tar", "https://h/b.tar"]) == [
        "pipe:cat a-0.tar",
        "pipe:cat a-1.tar",
        "https://h/b.tar",
    ]
    assert expand_shards("pipe:cat a.tar::http://h/b.tar") == ["pipe:cat a.tar", "http://h/b.tar"]
    assert expand_shards(r"pipe:cat a\ b.tar") == [r"pipe:cat a\ b.tar"]


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("folder/a.tar", "a.tar"),
        ("https://u:p@h:80/b/a.tar?x=/c.tar#d", "a.tar"),
        ("http://h", "h"),
        ("pipe:cat b/a.tar", "a.tar"),
        ("pipe:curl -s 'http://h/b/a.tar?x=1&y=2' | pv -q", "a.tar"),
        ("pipe:zstd -dc b/a.tar.zst|pv", "a.tar.zst"),
        ("pipe:fetch --number 3", "3"),
        ("pipe:echo 'a", "'a"),
    ],
)
def test_the_name_of_a_shard_is_that_of_its_file(shard: str, name: str) -> None:
    assert shard_name(shard) == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["http://h/x/a.tar", "http://h/y/a.tar"], "different file names.*both 'a.tar'"),
        (["pipe:zcat a.tar | pv", "pipe:cat b/a.tar"], "different file names.*both 'a.tar'"),
        ("s3://bucket/a.tar", r"http\(s\) URLs or 'pipe:'.*pipe:aws s3 cp"),
        ("http:///a.tar", "must be local files"),
        ("pipe: ", "a command must follow 'pipe:'"),
        ("pipe:awk '{' a-{0..1}.tar", "braces must hold a range or a list"),
        ("pipe:cat ${HOME_FOLDER}/a.tar", "a variable set as WDS_NAME"),
    ],
)
def test_what_cannot_be_a_shard_is_refused(spec: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_shards(spec)
