"""Opening shards: local files, which seek, and `pipe:` commands and http(s) URLs, which cannot.

URLs are read by webdataset's `gopen`, which runs curl. Its handling of the process is replaced:
`gopen` looks at the exit status after every read, and drops what it has just read where the process
has failed meanwhile, so that the samples found before a failure depend on timing; a process that is
left early counts as failed (its status is -13 where the shell replaced itself) and is waited for,
up to two hours. Commands are started here, since `gopen` can end a shell but not its pipeline.
"""

import os
import re
import select
import shlex
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

STALL_SECONDS = 300.0
"""Seconds without a byte after which a process is given up (a collective of torch waits 600)."""

_GRACE_SECONDS = 10.0  # between the end of a process's output and its own
_LEAVE_SECONDS = 1.0  # between closing a process's output, or asking it to end, and its end
_CHUNK = 1 << 16  # bytes; what a pipe holds
_PIPE = "pipe:"
_URL = re.compile(r"(?i)(https?)://")
_ANY_SCHEME = re.compile(r"(?i)[a-z][a-z0-9+.-]*://")
_SHELL_STATUS = {126: "it is no program", 127: "command not found"}
_CURL_STATUS = {
    3: "not a URL",
    6: "host not found",
    7: "no connection",
    18: "the connection ended early",
    22: "the server answered with an error, such as 404",
    28: "timed out",
    35: "no secure connection",
    56: "the connection broke",
    60: "the server's certificate is not trusted",
}


class ShardReader(ABC):
    """The bytes of a shard, read at rising offsets."""

    seekable: bool
    """Whether reading may also go back."""
    failure: str = ""
    """Why the bytes end where they do, where the source says that it failed; else empty."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at an offset; fewer only where the shard ends."""

    @abstractmethod
    def reaches(self, offset: int) -> bool:
        """Tell whether the shard has at least ``offset`` bytes; a stream is read up to there."""

    @abstractmethod
    def close(self) -> None:
        """Release what was opened."""


def is_remote(shard: str) -> bool:
    """Tell whether a shard is a URL or a `pipe:` command, rather than a local file."""
    return shard.startswith(_PIPE) or _ANY_SCHEME.match(shard) is not None


def check_remote(shard: str) -> None:
    """Refuse what `open_shard` cannot open.

    Raises:
        ValueError: If the shard is a URL of another scheme than http and https, or no command.
    """
    if shard.startswith(_PIPE):
        if not shard[len(_PIPE) :].strip():
            raise ValueError(f"a command must follow 'pipe:'; got {shard!r}.")
    elif not _URL.match(shard) or not urlsplit(shard).hostname:
        raise ValueError(
            f"shards must be local files, http(s) URLs or 'pipe:' commands; got {shard!r}. Use a "
            "command that writes the shard to its standard output, such as 'pipe:aws s3 cp URL -'."
        )


def shard_name(shard: str | Path) -> str:
    """Return the file name of a shard, the first part of its samples' keys.

    Of a URL it is the last part of the path, without the query; of a command the file name of its
    last word with ``.tar`` in it, or of its last word.
    """
    text = str(shard)
    if not is_remote(text):
        return Path(text).name
    if not text.startswith(_PIPE):
        return _base(text)
    words = [word for word in map(_base, _words(text[len(_PIPE) :])) if word]
    return next((word for word in reversed(words) if ".tar" in word), words[-1] if words else text)


def _words(command: str) -> list[str]:
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer)
    except ValueError:  # unbalanced quotes: the shell will say so
        return command.split()


def _base(word: str) -> str:
    if _ANY_SCHEME.match(word):
        parts = urlsplit(word)
        return parts.path.rpartition("/")[2] or parts.netloc.rpartition("@")[2]
    return word.rpartition("/")[2]


def shown(shard: str | Path) -> str:
    """Name a shard in a message: a URL without user, password and query, which may be secret.

    A command is named whole: keep secrets in a file or the environment.
    """
    text = str(shard)
    if not _URL.match(text):
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def open_shard(shard: str | Path) -> Iterator[ShardReader]:
    """Open a shard for reading; a process behind it is ended when the block is left.

    Raises:
        OSError: If a local file cannot be opened, or curl (the shell) cannot be started. What goes
            wrong later is told by `ShardReader.failure`.
    """
    text = str(shard)
    if not is_remote(text):
        with open(text, "rb") as file:
            yield _File(file)
        return
    reader = _run(text[len(_PIPE) :]) if text.startswith(_PIPE) else _fetch(text)
    try:
        yield reader
    finally:
        reader.close()


def _run(command: str) -> "_Process":
    from webdataset import utils  # imported here: it takes a second

    if utils.enforce_security:
        raise ValueError(
            "'pipe:' commands are run only where webdataset allows them; WDS_SECURE is set."
        )
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # its process group is then the whole pipeline
    )
    return _Process(process, "the command", _SHELL_STATUS, is_group=True)


def _fetch(url: str) -> "_File | _Process":
    from webdataset.gopen import Pipe, gopen  # imported here: it takes a second

    try:
        opened = gopen(url, "rb")
    except FileNotFoundError as error:
        raise OSError(f"curl, which reads URLs, must be installed: {error}") from error
    if not isinstance(opened, Pipe):  # GOPEN_REWRITE made it a local file
        return _File(opened)
    return _Process(opened.proc, "curl", _CURL_STATUS, keep=opened)


class _File(ShardReader):
    seekable = True

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        # A damaged header may ask for far more than there is; memory is reserved before reading.
        return self._file.read(max(min(length, self._size - offset), 0))

    def reaches(self, offset: int) -> bool:
        return offset <= self._size

    def close(self) -> None:
        self._file.close()


class _Process(ShardReader):
    """The output of a process: bytes that are not asked for are read and thrown away."""

    seekable = False

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        what: str,
        meanings: Mapping[int, str],
        *,
        is_group: bool = False,
        keep: object = None,
    ) -> None:
        assert process.stdout is not None
        self._process, self._output = process, process.stdout
        self._what, self._meanings, self._is_group = what, meanings, is_group
        self._keep = keep  # webdataset's Pipe: when it is deleted it closes the output
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        self._chunk = b""
        self._used = 0  # bytes of the chunk already given
        self._position = 0
        self._ended = False

    def read(self, offset: int, length: int) -> bytes:
        if not self.reaches(offset):
            return b""
        parts = []
        while length > 0 and (part := self._take(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def reaches(self, offset: int) -> bool:
        assert offset >= self._position, "a stream cannot go back"
        while self._position < offset and self._take(offset - self._position):
            pass
        return self._position == offset

    def _take(self, most: int) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        if self._used == len(self._chunk):
            self._chunk, self._used = self._next_chunk(), 0
        part = self._chunk[self._used : self._used + most]
        self._used += len(part)
        self._position += len(part)
        return part

    def _next_chunk(self) -> bytes:
        if self._ended:
            return b""
        if self._poll.poll(STALL_SECONDS * 1000):
            chunk = os.read(self._output.fileno(), _CHUNK)
            if not chunk:
                self.failure = self._describe_exit()
        else:
            chunk = b""
            self.failure = f"{self._what} gave no byte for {STALL_SECONDS:g} seconds"
        self._ended = not chunk
        return chunk

    def _describe_exit(self) -> str:
        """Wait for the process, whose output has ended; empty if it ended well."""
        try:
            status = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{self._what} closed its output but did not end"
        if status < 0:
            return f"{self._what} was ended by signal {-status}"
        meaning = self._meanings.get(status)
        reason = f" ({meaning})" if meaning else ""
        return f"{self._what} ended with status {status}{reason}" if status else ""

    def _signal(self, number: int) -> None:
        if self._is_group:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def close(self) -> None:
        """End the process if it still runs; a reader that leaves early is no failure."""
        if not self._is_group and self._process.poll() is None:
            self._process.terminate()
        # A pipeline ends by itself where it writes on. Ending its shell first would leave the rest
        # to process 1, which in many containers keeps dead processes forever.
        self._output.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(_LEAVE_SECONDS)
                return
            except subprocess.TimeoutExpired:
                self._signal(number)
        self._process.wait()
