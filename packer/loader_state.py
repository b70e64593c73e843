"""`LoaderState`: what a run has consumed of its streams, on one rank or on all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from packer.batch import PackedBatch


@dataclass
class LoaderState:
    """What a run has consumed: updated after every optimizer step, stored with the checkpoint.

    Every rank has its own. To go on with another number of ranks, `merge` the states of all.
    """

    num_streams: int = 0
    """Logical streams of the run; 0 before the first batch."""
    batches: int = 0
    """Batches this rank has consumed since the start, or since the states were merged."""
    before: int = 0
    """Batches all ranks together had consumed when their states were merged."""
    rank: int = 0
    """The rank that consumed `batches`."""
    ranks: int = 0
    """Number of ranks it is one of; 0 where `batches` is 0, and any rank may continue."""
    streams: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """The latest state of each stream that has given a batch."""

    def update(self, batch: PackedBatch) -> None:
        """Take note that ``batch`` has been trained on.

        Raises:
            ValueError: If it comes from no stream, or from that of another rank.
        """
        if batch.state is None:
            raise ValueError(
                "LoaderState.update needs a batch of a PackedStream; this batch has no state "
                "(batches of a collator have none)."
            )
        state = dict(batch.state)
        rank, ranks = int(state.pop("rank")), int(state.pop("ranks"))
        if self.ranks and (rank, ranks) != (self.rank, self.ranks):
            raise ValueError(
                f"each rank keeps a LoaderState of its own; that of rank {self.rank} of "
                f"{self.ranks} got a batch of rank {rank} of {ranks}."
            )
        self.rank, self.ranks = rank, ranks
        self.num_streams = int(state["num_streams"]) or self.num_streams
        if state["stream"] is not None:  # else a batch that stands in for a stream that has ended
            self.streams[int(state["stream"])] = state
        self.batches += 1

    @classmethod
    def merge(cls, states: Sequence["LoaderState"]) -> "LoaderState":
        """Join the states of all ranks; any number of ranks and workers continues from the result.

        In a finite pass every sample then comes exactly once. Where the ranks were in step, and the
        new ranks x workers divide the streams, the batches come in the order of a run that was
        never stopped.

        Args:
            states: The state of each rank, in any order; that of a rank which has consumed nothing
                may be a new one.

        Raises:
            ValueError: If a rank's state is missing or given twice, or they are not of one run.
        """
        consumed = [state for state in states if state.ranks]
        found = sorted(state.rank for state in consumed)
        if not states or len(set(found)) < len(found):
            raise ValueError(
                f"merge needs the state of each rank, once; got those of the ranks {found}."
            )
        for state in consumed:
            if state.ranks != len(states):
                raise ValueError(
                    f"merge needs the states of all {state.ranks} ranks; got {len(states)}. Store "
                    "and load the state of every rank."
                )
        runs = {state.num_streams for state in states if state.num_streams}
        merged = {state.before for state in states if state.before or state.ranks}
        if len(runs) > 1 or len(merged) > 1:
            raise ValueError(
                f"merge needs the states of one run; got states of {sorted(runs)} streams, merged "
                f"after {sorted(merged)} batches."
            )
        streams: dict[int, Mapping[str, Any]] = {}
        for state in states:
            for number, stream in state.streams.items():
                # A rank that started from a merged state still has the streams of others in it.
                if number not in streams or stream["batches"] > streams[number]["batches"]:
                    streams[number] = stream
        before = sum(int(stream["batches"]) for stream in streams.values())
        return cls(num_streams=max(runs, default=0), before=before, streams=streams)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        described = {item.name: getattr(self, item.name) for item in fields(self)}
        return described | {
            "streams": [dict(self.streams[stream]) for stream in sorted(self.streams)]
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "LoaderState":
        """Read what `to_dict` wrote."""
        streams = {int(state["stream"]): state for state in value["streams"]}
        return cls(**{**value, "streams": streams})
