import json
import pickle
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from packer.captions import CaptionTokenizer, pack_text

CAPTIONS = [
    f"{start} {size} {colour} {shape}"
    for start in ("a photo of a", "A picture of a", "this is a")
    for size in ("large", "small")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "triangle")
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=400)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(max_size=40), max_size=4), max_tokens=st.integers(1, 12))
def test_every_caption_ends_with_the_end_token_within_its_budget(
    tokenizer: CaptionTokenizer, texts: list[str], max_tokens: int
) -> None:
    vocab_size = tokenizer.vocab_size
    whole = tokenizer.encode(texts, 10_000)
    cut = tokenizer.encode(texts, max_tokens)

    assert len(whole) == len(cut) == len(texts)
    for long, short in zip(whole, cut, strict=True):
        assert long[-1] == short[-1] == tokenizer.end_id
        assert tokenizer.end_id not in long[:-1]
        assert short[:-1] == long[: min(len(long), max_tokens) - 1]
        assert all(0 <= token < vocab_size for token in long)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_nothing_but_case_form_and_white_space_is_lost(
    tokenizer: CaptionTokenizer, text: str
) -> None:
    """Every byte is in the vocabulary, so no script and no emoji is unknown."""
    decoded = tokenizer.decode(tokenizer.encode([text], 10_000)[0])

    def plain(value: str) -> str:
        value = "".join(character.lower() for character in value)
        return "".join(unicodedata.normalize("NFC", value).split())

    assert plain(decoded) == plain(text)


def test_case_form_and_white_space_make_no_difference(tokenizer: CaptionTokenizer) -> None:
    same = ["a café", "A  CAFÉ", " a cafe\u0301\n", "a\tcafé"]

    assert len({tuple(ids) for ids in tokenizer.encode(same, 24)}) == 1


def test_accents_are_composed_after_lower_casing(tokenizer: CaptionTokenizer) -> None:
    """Unicode has a composed small t with diaeresis and no capital one."""
    assert tokenizer.encode(["T\u0308"], 24) == tokenizer.encode(["\u1e97"], 24)


def test_a_word_is_the_same_first_and_later(tokenizer: CaptionTokenizer) -> None:
    [alone], [*_, last] = (ids[:-1] for ids in tokenizer.encode(["square", "a red square"], 24))

    assert alone == last


def test_an_empty_caption_is_the_end_token(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.encode(["", "  "], 24) == [[tokenizer.end_id]] * 2
    assert tokenizer.encode([], 24) == []


def test_the_name_of_the_end_token_in_a_caption_is_text(tokenizer: CaptionTokenizer) -> None:
    text = "a red <|endoftext|> circle"

    [ids] = tokenizer.encode([text], 100)

    assert ids.count(tokenizer.end_id) == 1
    assert tokenizer.decode(ids).strip() == text


def test_a_lone_surrogate_is_replaced(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.encode(["a \udcff"], 24) == tokenizer.encode(["a ?"], 24)
    assert CaptionTokenizer.train(["a \udcff"], 300).vocab_size >= 257


def test_max_tokens_must_hold_the_end_token(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        tokenizer.encode(["a"], 0)


def test_the_vocabulary_is_bounded() -> None:
    assert CaptionTokenizer.train(CAPTIONS, vocab_size=270).vocab_size == 270
    assert 257 < CaptionTokenizer.train(CAPTIONS).vocab_size < 8192
    assert CaptionTokenizer.train([], vocab_size=257).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=256)


def test_training_is_the_same_in_every_process(tokenizer: CaptionTokenizer) -> None:
    script = (
        "import json, sys; from packer.captions import CaptionTokenizer; "
        "print(CaptionTokenizer.train(json.load(sys.stdin), vocab_size=400).hash)"
    )

    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    )

    assert result.stdout.strip() == tokenizer.hash
    assert CaptionTokenizer.train(iter(CAPTIONS), vocab_size=400).hash == tokenizer.hash
    assert CaptionTokenizer.train(CAPTIONS[:-1], vocab_size=400).hash != tokenizer.hash


def test_a_saved_or_pickled_tokenizer_is_the_same(
    tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")

    for copy in (
        CaptionTokenizer.from_file(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        texts = [*CAPTIONS, "<|endoftext|> x", ""]
        assert copy.encode(texts, 9) == tokenizer.encode(texts, 9)
        assert (copy.hash, copy.vocab_size, copy.end_id) == (
            tokenizer.hash,
            tokenizer.vocab_size,
            tokenizer.end_id,
        )
        assert repr(copy) == repr(tokenizer)
    assert len(tokenizer.hash) == 16
    assert int(tokenizer.hash, 16) >= 0


WORKERS = """
import torch
from torch.utils.data import DataLoader
from packer.captions import CaptionTokenizer

captions = ["a red circle", "a blue square", "a green triangle"] * 50
tokenizer = CaptionTokenizer.train(captions, vocab_size=300)
expected = tokenizer.encode(captions, 8)

def collate(texts):
    return tokenizer.encode(texts, 8)

if __name__ == "__main__":
    loader = DataLoader(
        captions, batch_size=10, num_workers=2, collate_fn=collate, multiprocessing_context="fork"
    )
    found = [ids for batch in loader for ids in batch]
    assert found == expected
    print("done")
"""


def test_forked_workers_encode_without_a_warning(tmp_path: Path) -> None:
    """Hugging Face tokenizers warn in every fork of a process that used their threads."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)

    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1"},
    )

    assert (result.stdout, result.stderr) == ("done\n", "")


def word_tokenizer(vocab: list[str], special: list[str]) -> Tokenizer:
    """Another model's tokenizer: whole words, ids in the order given."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "[SEP]", "<eos>"])
def test_another_models_end_token_is_found(name: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["[UNK]", "a", "dog"], [name])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    captions = CaptionTokenizer.from_file(tmp_path / "tokenizer.json")

    assert captions.end_id == 3
    assert captions.vocab_size == 4
    assert captions.encode(["a dog a dog", "zebra"], 4) == [[1, 2, 1, 3], [0, 3]]


def test_a_special_token_goes_before_an_ordinary_one() -> None:
    """Gemma's vocabulary has "</s>" as an HTML tag; its end token is "<eos>"."""
    assert CaptionTokenizer(word_tokenizer(["[UNK]", "</s>"], ["<eos>"])).end_id == 2
    assert CaptionTokenizer(word_tokenizer(["[UNK]", "</s>"], [])).end_id == 1


def test_tokens_of_a_post_processor_are_kept_and_the_end_is_written_once() -> None:
    tokenizer = word_tokenizer(["[UNK]", "a", "dog"], ["[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )

    captions = CaptionTokenizer(tokenizer)

    assert captions.encode(["a dog", ""], 24) == [[3, 1, 2, 4], [3, 4]]
    assert captions.encode(["a dog"], 3) == [[3, 1, 4]]


def test_a_file_without_an_end_token_is_explained(tmp_path: Path) -> None:
    word_tokenizer(["[UNK]", "a"], []).save(str(tmp_path / "words.json"))
    (tmp_path / "no.json").write_text("{}")

    with pytest.raises(ValueError, match=r"words\.json: a tokenizer must have an end token"):
        CaptionTokenizer.from_file(tmp_path / "words.json")
    with pytest.raises(ValueError, match=r"no\.json must be a tokenizer\.json"):
        CaptionTokenizer.from_file(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError):
        CaptionTokenizer.from_file(tmp_path / "absent.json")


@settings(deadline=None, max_examples=40)
@given(ids=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=6))
def test_packed_captions_unpack_to_themselves(ids: list[list[int]]) -> None:
    packed = pack_text(ids)

    bounds = packed.cu_seqlens.tolist()
    assert [packed.ids[a:b].tolist() for a, b in pairwise(bounds)] == ids
    assert bounds[0] == 0
    assert bounds[-1] == len(packed.ids)
    assert packed.segment_lengths == tuple(map(len, ids))
    assert packed.image_index.tolist() == list(range(len(ids)))
    assert (packed.ids.dtype, packed.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_captions_can_belong_to_any_images() -> None:
    assert pack_text([[1], [2, 3]], [4, 4]).image_index.tolist() == [4, 4]


def test_packing_refuses_an_empty_caption_and_a_short_index() -> None:
    with pytest.raises(ValueError, match="got none in caption 1"):
        pack_text([[1], []])
    with pytest.raises(ValueError, match=r"one entry per caption \(2\); got 1"):
        pack_text([[1], [2]], [0])
