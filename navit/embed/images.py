"""`embed_images`: one call from images to vectors."""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from torch import Tensor, nn

from navit.embed.config import EmbedConfig
from navit.embed.embedder import Embedder
from navit.embed.parts import OnError


def embed_images(
    model: nn.Module | str | Path,
    images: Iterable[Any],
    *,
    config: EmbedConfig | None = None,
    on_error: OnError = "raise",
    **settings: Any,
) -> Float32[Tensor, "N D"]:
    """Embed images: one vector each, in the order of the input.

    Images are packed, and each gets the vector it gets alone (within 1e-5 in float32).

    Args:
        model: A `NaViT`, a `CLIP`, or the path of a checkpoint; see `Embedder`, which is worth
            keeping where there is more than one call with a path.
        images: PIL images, uint8 arrays or tensors (H, W, 3) or (H, W), encoded bytes, paths; or
            samples and pairs as datasets give them, of which the image is used. A generator is read
            as it is needed, so its images need not fit in memory.
        config: How images become vectors.
        on_error: What happens where an image cannot be read. The default raises: a list made in
            Python is meant to be whole, and a row that is silently no vector spoils every mean and
            every index made of them. "nan" gives such a row NaN and goes on, logging each;
            `Embedder.embed` lists them.
        settings: Fields of `EmbedConfig` to change, such as ``max_tokens=256``.

    Returns:
        float32 (N, D) on the CPU.

    Raises:
        ValueError: If an image cannot be read (with ``on_error="raise"``), an item is nothing an
            image can be, or a setting is wrong.
    """
    known = {item.name for item in fields(EmbedConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"embed_images has the settings {sorted(known)}; got {unknown}.")
    embedder = Embedder(model, replace(config or EmbedConfig(), **settings))
    return embedder.embed(images, on_error=on_error).vectors
