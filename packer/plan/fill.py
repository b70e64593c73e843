"""Filling a sequence's leftover places with tokens that one of its images would have dropped."""

from packer.plan.types import SequencePlan


def fill_leftover(sequence: SequencePlan, seq_len: int) -> SequencePlan:
    """Keep more tokens of one image, so that its sequence is full, or as full as one can make it.

    Of the images whose dropped tokens fill the room the largest is taken, since its drop rate
    changes least; where none does, the one that fills most. The tokens kept are those of before
    and more (`packer.plan.drop.kept_indices` keeps a superset for a larger count).

    Args:
        sequence: Plans of the images that share the sequence.
        seq_len: L, token places of the sequence.

    Returns:
        The sequence; at most one plan has a larger ``num_kept``.

    Source: NaViT (arXiv:2307.06304), section 2.3 suggests adapting the last image. It changes the
    distribution of drop rates, hence it is off by default (`PackerConfig.fill_leftover`).
    """
    room = seq_len - sum(image.num_kept for image in sequence)
    if room <= 0 or not sequence:
        return sequence
    gains = [min(image.grid.num_tokens - image.num_kept, room) for image in sequence]
    chosen = max(range(len(sequence)), key=lambda i: (gains[i], sequence[i].grid.num_tokens, -i))
    if not gains[chosen]:
        return sequence
    image = sequence[chosen]
    filled = image._replace(num_kept=image.num_kept + gains[chosen])
    return (*sequence[:chosen], filled, *sequence[chosen + 1 :])
