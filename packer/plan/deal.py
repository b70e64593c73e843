"""Dealing: which shards a logical stream reads in an epoch, and which streams a reader serves."""

from packer.plan.draws import keyed_draws


def stream_shards(
    num_shards: int, stream: int, num_streams: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[int]:
    """List the shards a logical stream reads in an epoch, in order.

    Args:
        num_shards: Shards of the data set.
        stream: The stream, from 0.
        num_streams: Logical streams of the run.
        seed: The configuration's seed.
        epoch: Passes over the data completed before this one.
        shuffle: Whether each epoch has another order, drawn by key.

    Returns:
        Every ``num_streams``-th shard of the epoch's order; with fewer shards than streams all of
        them, of which each stream then reads every ``num_streams``-th sample.
    """
    order = list(range(num_shards))
    if shuffle:
        order.sort(key=lambda shard: keyed_draws(seed, epoch, f"shard {shard}").spare)
    return order[stream::num_streams] if deals_shards(num_shards, num_streams) else order


def deals_shards(num_shards: int, num_streams: int) -> bool:
    """Whether streams own whole shards; with fewer shards than streams they share them."""
    return num_shards >= num_streams


def reader_streams(reader: int, num_readers: int, num_streams: int) -> range:
    """List the streams one of ``num_readers`` readers (a rank's worker) serves, by turns."""
    return range(reader, num_streams, num_readers)
