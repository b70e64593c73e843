"""Streaming shards that are not on this machine: from a web server and through a command.

Here both are on this machine after all: a server on 127.0.0.1, and `cat`. With shards in a bucket
the command is `pipe:aws s3 cp s3://bucket/pairs-{000..099}.tar -` or `pipe:gsutil cat gs://...`.
"""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from torch.utils.data import DataLoader

from packer import LoaderState, PackedStream, PackerConfig, write_shards
from packer.batch import BatchStats


def read(shards: list[str]) -> BatchStats:
    """Pass once over the shards, half of it after a stop, and return the counts."""
    config = PackerConfig(patch_size=16, seq_len=256)
    options = {"sequences_per_batch": 1, "epochs": 1, "num_streams": 2}
    stats, state = BatchStats(), LoaderState()
    for batch in PackedStream(shards, config, **options):
        stats += batch.stats
        state.update(batch)
        if state.batches == 2:
            break
    # Images that were waiting for a place are fetched again, each shard once.
    stream = PackedStream(shards, config, **options, state=state)
    for batch in DataLoader(stream, batch_size=None, num_workers=2):
        stats += batch.stats
    return stats


class Handler(SimpleHTTPRequestHandler):
    """Serves files."""

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def main() -> None:
    with TemporaryDirectory() as folder:
        samples = []
        for i in range(24):
            buffer = BytesIO()
            Image.new("RGB", (64 + 8 * i, 256 - 4 * i)).save(buffer, "PNG")
            samples.append({"image": buffer.getvalue(), "caption": f"image {i}"})
        write_shards(samples, Path(folder) / "pairs-%03d.tar", samples_per_shard=8)
        handler = partial(Handler, directory=folder)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever).start()
            url = f"http://127.0.0.1:{server.server_port}"
            stats = read(
                [
                    f"{url}/pairs-{{000..001}}.tar",
                    f"pipe:cat {folder}/pairs-002.tar",
                    f"{url}/no-such-shard.tar",
                ]
            )
            server.shutdown()
    print(f"{stats.images} images, {stats.padding:.1%} padding, skipped {dict(stats.skipped)}")


if __name__ == "__main__":
    main()
