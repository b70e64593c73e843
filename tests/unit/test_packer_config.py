import pytest

from packer import ConstantDrop, PackerConfig, UniformSide


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 2048}, "max_tokens must be at most seq_len"),
        ({"patch_size": 0}, "patch_size must be a positive integer; got 0"),
        ({"seq_len": 12.5}, "seq_len must be a positive integer"),
        ({"max_images_per_seq": 0}, "max_images_per_seq"),
        ({"max_text_tokens": 0}, "max_text_tokens"),
        (
            {"resize": "squash"},
            "resize must be one of 'shrink_only', 'allow_enlarge', 'fill_budget'; got 'squash'",
        ),
        ({"decode": "fast"}, "decode must be one of"),
        ({"missing_caption": "ignore"}, "missing_caption must be one of"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio must be at least 1"),
        ({"token_drop": 0.5}, "token_drop must be one of NoDrop, ConstantDrop, BetaDrop"),
        ({"resolution": "native"}, "resolution must be one of Native"),
        ({"placement": "exact"}, "placement must be a Placement"),
    ],
)
def test_a_wrong_setting_says_what_must_hold_and_what_was_found(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackerConfig(**changes)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError, match="sequence_length"):
        PackerConfig(sequence_length=12)  # type: ignore[call-arg]


def test_the_image_budget_is_the_sequence_unless_set() -> None:
    assert PackerConfig(seq_len=512).image_budget == 512
    assert PackerConfig(seq_len=512, max_tokens=100).image_budget == 100


def test_configurations_are_values() -> None:
    make = lambda: PackerConfig(resolution=UniformSide(64, 96), token_drop=ConstantDrop(0.5))  # noqa: E731

    assert make() == make()
    assert hash(make()) == hash(make())
