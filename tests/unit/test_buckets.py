"""Buckets of segments: every token has one place, padding stays within a segment and is bounded."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from navit.model.buckets import MAX_STRETCH, make_buckets

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), max_size=30)


@given(lengths=LENGTHS)
def test_padding_repeats_a_segments_own_token_and_is_left_out_again(lengths: list[int]) -> None:
    """The plain twin: `pad_sequence`'s place and segment, one segment at a time."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    x = torch.stack([segment, torch.arange(len(segment))], dim=1)

    buckets = make_buckets(lengths, CPU)

    back = [bucket.unpad(bucket.pad(x.float())) for bucket in buckets]
    assert torch.equal(torch.cat(back), x.float()) if lengths else not buckets
    assert sum(bucket.count for bucket in buckets) == len(lengths)
    first = 0
    for bucket in buckets:
        sizes = torch.tensor(lengths[first : first + bucket.count])
        padded = bucket.pad(x.float())
        assert padded.shape == (bucket.count, bucket.longest, 2)
        own = torch.arange(first, first + bucket.count)[:, None].expand(-1, bucket.longest)
        assert torch.equal(padded[..., 0], own.float())
        expected = torch.arange(bucket.longest) >= sizes[:, None]
        if bucket.padding is None:
            assert not expected.any()
        else:
            assert torch.equal(bucket.padding.is_padding, expected)
        first += bucket.count


@given(lengths=LENGTHS)
def test_places_are_at_most_twice_the_tokens_in_a_bucket_for_each_doubling(
    lengths: list[int],
) -> None:
    lengths.sort()
    buckets = make_buckets(lengths, CPU)
    for bucket in buckets:
        assert bucket.count * bucket.longest <= MAX_STRETCH * bucket.num_tokens
    assert len(buckets) <= max(lengths, default=0).bit_length()
