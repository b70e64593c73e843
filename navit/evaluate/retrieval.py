"""Image-to-text and text-to-image recall, in row chunks so that no N x M matrix is ever held."""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

NOT_FOUND = torch.iinfo(torch.int64).max
"""Rank of a query none of whose hits has a finite similarity."""


def retrieval_metrics(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "M D"],
    image_of_text: Int64[Tensor, " M"],
    texts: Sequence[Hashable] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 512,
) -> dict[str, float]:
    """Recall@k of both directions.

    Identical captions all count as hits: a caption finds its image in every image that has the
    same caption, and an image finds its caption in every text equal to one of its captions. The
    rank of a query is the number of wrong entries at least as similar as its best hit, so a tie
    counts against the model: equal vectors everywhere score 0 and not chance. An entry whose
    similarity is not finite is never found.

    Args:
        image: One vector per image; normalise first for cosine similarity.
        text: One vector per caption.
        image_of_text: Index of the image each caption belongs to. An image without a caption is
            no query, but competes with the others.
        texts: The M captions, or any ids that are equal where captions are; None means that all
            captions differ.
        ks: Ranks to report.
        chunk_size: Queries compared with the whole gallery at a time; memory is a few times
            ``chunk_size * max(N, M)`` floats.

    Returns:
        ``"image_to_text/recall@k"`` and ``"text_to_image/recall@k"`` for each k, in [0, 1];
        0 where there is no query. Similarities are float32, or float64 where the vectors are.

    Raises:
        ValueError: If the counts disagree or an index names no image.
    """
    image_caption, caption = _relation(len(image), image_of_text, texts)
    if len(text) != len(caption):
        raise ValueError(
            f"image_of_text must name one image per text vector; got {len(caption)} entries for "
            f"{len(text)} vectors."
        )
    image_caption, caption = image_caption.to(image.device), caption.to(image.device)
    images = torch.arange(len(image), device=image.device)
    with_caption = torch.unique(image_caption[0])
    ranks = {
        "image_to_text": first_hit_ranks(
            image[with_caption], text, with_caption, caption, image_caption, chunk_size=chunk_size
        ),
        "text_to_image": first_hit_ranks(
            text, image, caption, images, image_caption.flip(0), chunk_size=chunk_size
        ),
    }
    return {
        f"{direction}/recall@{k}": (rank < k).double().mean().item() if len(rank) else 0.0
        for direction, rank in ranks.items()
        for k in ks
    }


def retrieval_chance(
    num_images: int,
    image_of_text: Int64[Tensor, " M"],
    texts: Sequence[Hashable] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k expected of a random ranking, with the hits of `retrieval_metrics`.

    A query with h hits among G entries is found among k random ones with probability
    ``1 - C(G - h, k) / C(G, k)``.

    Args:
        num_images: N, the number of images.
        image_of_text: Index of the image each caption belongs to.
        texts: As in `retrieval_metrics`.
        ks: Ranks to report.

    Returns:
        The keys of `retrieval_metrics`.

    Raises:
        ValueError: If the counts disagree or an index names no image.
    """
    image_caption, caption = _relation(num_images, image_of_text, texts)
    num_captions = int(caption.max()) + 1 if len(caption) else 0
    texts_per_caption = torch.bincount(caption, minlength=num_captions)
    images_per_caption = torch.bincount(image_caption[1], minlength=num_captions)
    hits_of_image = torch.zeros(num_images, dtype=torch.int64)
    hits_of_image.index_add_(0, image_caption[0], texts_per_caption[image_caption[1]])
    directions = {
        "image_to_text": (hits_of_image[torch.unique(image_caption[0])], len(caption)),
        "text_to_image": (images_per_caption[caption], num_images),
    }
    return {
        f"{direction}/recall@{k}": _random_recall(hits, gallery, k)
        for direction, (hits, gallery) in directions.items()
        for k in ks
    }


@torch.no_grad()
def first_hit_ranks(
    query: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    query_group: Int64[Tensor, " Q"],
    gallery_item: Int64[Tensor, " G"],
    hits: Int64[Tensor, "2 R"],
    *,
    chunk_size: int = 512,
) -> Int64[Tensor, " Q"]:
    """Count, per query, the wrong entries at least as similar as its best hit.

    Args:
        query: Vectors that search.
        gallery: Vectors searched.
        query_group: What a query looks for, as a non-negative number.
        gallery_item: What an entry is, as a non-negative number.
        hits: Pairs (group, item): an entry is a hit of a query where its item is paired with
            the query's group.
        chunk_size: Queries compared with the whole gallery at a time.

    Returns:
        Ranks from 0, so that a hit lies among the first k where ``rank < k``; `NOT_FOUND`
        without a hit of finite similarity. Entries that are not finite rank last.
    """
    wide = torch.float64 in (query.dtype, gallery.dtype)
    dtype = torch.float64 if wide else torch.float32
    gallery = gallery.to(dtype)
    ranks = query_group.new_full((len(query),), NOT_FOUND)
    if not len(query) or not len(gallery):
        return ranks
    num_groups = int(torch.cat([query_group, hits[0]]).max()) + 1
    num_items = int(torch.cat([gallery_item, hits[1]]).max()) + 1
    row_of_group = query_group.new_empty(num_groups)
    # Autocast would turn the product into bfloat16, where different vectors tie.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), chunk_size):
            chunk = slice(start, start + chunk_size)
            groups, row = torch.unique(query_group[chunk], return_inverse=True)
            row_of_group.fill_(-1)
            row_of_group[groups] = torch.arange(len(groups), device=groups.device)
            here = row_of_group[hits[0]] >= 0
            is_hit_item = torch.zeros(len(groups), num_items, dtype=torch.bool, device=query.device)
            is_hit_item[row_of_group[hits[0, here]], hits[1, here]] = True
            is_hit = is_hit_item[row].index_select(1, gallery_item)
            score = query[chunk].to(dtype) @ gallery.T
            score.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            best = torch.where(is_hit, score, -torch.inf).amax(1, keepdim=True)
            wrong = (score >= best).logical_and_(~is_hit).sum(1, dtype=torch.int32)
            ranks[chunk] = torch.where(best[:, 0] > -torch.inf, wrong.long(), NOT_FOUND)
    return ranks


def _relation(
    num_images: int, image_of_text: Int64[Tensor, " M"], texts: Sequence[Hashable] | None
) -> tuple[Int64[Tensor, "2 R"], Int64[Tensor, " M"]]:
    """Number the different captions; pair each image with the captions it has."""
    image_of_text = image_of_text.cpu()
    if len(image_of_text) and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < (
        num_images
    ):
        raise ValueError(
            f"image_of_text must hold image indices from 0 to {num_images - 1}; got "
            f"{int(image_of_text.min())} to {int(image_of_text.max())}."
        )
    if texts is None:
        caption = torch.arange(len(image_of_text))
    else:
        if len(texts) != len(image_of_text):
            raise ValueError(
                f"texts must hold one caption per entry of image_of_text "
                f"({len(image_of_text)}); got {len(texts)}."
            )
        number: dict[Hashable, int] = {}
        caption = torch.tensor(
            [number.setdefault(item, len(number)) for item in texts], dtype=torch.int64
        )
    return torch.unique(torch.stack([image_of_text, caption]), dim=1), caption


def _random_recall(hits: Int64[Tensor, " Q"], gallery: int, k: int) -> float:
    """Mean chance that k of `gallery` entries, drawn without return, hold one of `hits`."""
    if not len(hits):
        return 0.0
    draw = torch.arange(min(k, gallery), dtype=torch.float64)
    left = (gallery - hits[:, None]).double()
    missed = ((left - draw).clamp(min=0) / (gallery - draw)).prod(1)
    return float((1 - missed).mean())
