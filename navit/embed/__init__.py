"""Embedding at scale: `navit embed`, and `navit.embed_images` from Python."""

from navit.embed.config import EmbedConfig
from navit.embed.embedder import Embedder
from navit.embed.images import embed_images
from navit.embed.parts import Failure
from navit.embed.results import Embeddings

__all__ = ["EmbedConfig", "Embedder", "Embeddings", "Failure", "embed_images"]
