"""Captions to token ids: a byte-level BPE of our own, or any `tokenizer.json`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from packer.batch import PackedText

END_TOKENS = ("</s>", "<|endoftext|>", "[SEP]", "<eos>")
"""Names looked for, in this order: those of T5 and LLaMA; GPT-2 and CLIP; BERT; SigLIP 2."""

_NUM_BYTES = 256


class CaptionTokenizer:
    """A Hugging Face tokenizer whose every caption ends with the end token and is never empty.

    It can be pickled and used in forked DataLoader workers. The text of a special token inside a
    caption is ordinary text: no caption can end itself early.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer, whose own truncation and padding are switched off.

        Raises:
            ValueError: If it has no end token of a known name (`END_TOKENS`).
        """
        # A copy: the settings below are not to change the caller's object.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.end_id: int = _find_end(self._tokenizer)
        """Id of the end token."""

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 8192) -> "CaptionTokenizer":
        """Learn a byte-level BPE; the same captions give the same tokenizer in every process.

        Text is lower-cased, brought to Unicode NFC, and its runs of white space become one
        space: "A Dog" and "a dog" share their tokens, which counts where captions are few. Every
        byte is in the vocabulary, so no text in any language is unknown. A piece must occur
        twice to become a token.

        Args:
            captions: Texts to learn from.
            vocab_size: Largest number of tokens, the 256 bytes and the end token included.

        Returns:
            The tokenizer; its vocabulary is smaller where the captions hold fewer pieces.

        Raises:
            ValueError: If `vocab_size` has no room for the bytes and the end token.
        """
        if vocab_size <= _NUM_BYTES:
            raise ValueError(
                f"vocab_size must be at least {_NUM_BYTES + 1}, the bytes and the end token; got "
                f"{vocab_size}."
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Lowercase(),
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # The space in front makes a word at the start of a caption the same as one within.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with _single_threaded():
            tokenizer.train_from_iterator(map(_encodable, captions), trainer)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path) -> "CaptionTokenizer":
        """Read a `tokenizer.json`, ours or another model's.

        Args:
            path: The file. Tokens its post-processor adds, as CLIP's start token, are kept.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no tokenizer, or has no end token of a known name.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"{path} must be a tokenizer.json of Hugging Face tokenizers; {error}."
            ) from error
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `from_file` and transformers read."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the tokenizer's canonical json."""
        canonical = json.dumps(
            json.loads(self._tokenizer.to_str()), sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: rows an embedding table needs."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn captions into token ids.

        Args:
            texts: Captions; may be empty.
            max_tokens: Most tokens of one caption, the end token included.

        Returns:
            Per caption its first tokens and then the end token, 1 to `max_tokens` ids.

        Raises:
            ValueError: If `max_tokens` is not positive.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, for the end token; got {max_tokens}.")
        encoded = []
        for text in texts:
            # One at a time: the batch call starts threads, which do not survive a fork.
            ids: list[int] = self._tokenizer.encode(_encodable(text)).ids
            while ids and ids[-1] == self.end_id:
                ids.pop()
            encoded.append([*ids[: max_tokens - 1], self.end_id])
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids back into text, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def __reduce__(self) -> tuple[Callable[[str], "CaptionTokenizer"], tuple[str]]:
        """Pickle as json: tokenizers' own pickle loses the treatment of special tokens."""
        return _from_json, (self._tokenizer.to_str(),)

    def __repr__(self) -> str:
        return f"CaptionTokenizer(vocab_size={self.vocab_size}, hash={self.hash!r})"


def pack_text(ids: Sequence[Sequence[int]], image_index: Sequence[int] | None = None) -> PackedText:
    """Join captions to one run of tokens, without padding.

    Args:
        ids: Token ids of each caption, at least one each (`CaptionTokenizer.encode`). No caption
            at all is legal.
        image_index: Which image each caption belongs to; None: caption i to image i.

    Returns:
        The captions in their order.

    Raises:
        ValueError: If a caption has no token, or `image_index` is not as long as `ids`.
    """
    lengths = tuple(len(caption) for caption in ids)
    if 0 in lengths:
        raise ValueError(
            f"every caption must have at least the end token; got none in caption "
            f"{lengths.index(0)}. Encode it with CaptionTokenizer.encode."
        )
    if image_index is None:
        image_index = range(len(lengths))
    if len(image_index) != len(lengths):
        raise ValueError(
            f"image_index must have one entry per caption ({len(lengths)}); got {len(image_index)}."
        )
    return PackedText(
        ids=torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        segment_lengths=lengths,
        image_index=torch.tensor(list(image_index), dtype=torch.int64),
    )


def _from_json(text: str) -> CaptionTokenizer:
    return CaptionTokenizer(Tokenizer.from_str(text))


def _encodable(text: str) -> str:
    """Replace lone surrogates, which a caption decoded with `surrogateescape` may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _find_end(tokenizer: Tokenizer) -> int:
    """Find the end token, first among the special ones: Gemma's "</s>" is an HTML tag."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    for names in (special, vocab):
        for name in END_TOKENS:
            if name in names:
                return int(vocab[name])
    raise ValueError(
        f"a tokenizer must have an end token named one of {', '.join(END_TOKENS)}; got "
        f"{len(vocab)} tokens with none of them. Add one to its vocabulary as a special token."
    )


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keep tokenizers from its thread pool: once used, every later fork warns on stderr."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
