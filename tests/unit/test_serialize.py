import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from navit.serialize import from_plain, to_plain
from navit.train.config import PRESETS, TrainConfig
from packer import BetaDrop, NormalSide, PackerConfig, Placement, RandomCrop


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_named_run_survives_json(name: str) -> None:
    config = PRESETS[name]()

    assert from_plain(TrainConfig, json.loads(json.dumps(to_plain(config)))) == config


def test_unions_tuples_and_paths_survive_json() -> None:
    config = TrainConfig(
        shards=("a.tar", "b.tar"),
        run=Path("runs/x"),
        packer=PackerConfig(
            resolution=NormalSide(32, 64),
            crop=RandomCrop(0.5, 1.5),
            token_drop=BetaDrop(0.2, 0.3),
            placement=Placement("first_fit", open_sequences=3),
            max_aspect_ratio=4,
        ),
    )

    again = from_plain(TrainConfig, json.loads(json.dumps(to_plain(config))))

    assert again == config
    assert isinstance(again.run, Path)
    assert isinstance(again.shards, tuple)


def test_an_unknown_setting_or_type_names_itself_and_the_choices() -> None:
    plain = to_plain(PackerConfig())

    with pytest.raises(ValueError, match=r"got the unknown \['seq_length'\]"):
        from_plain(PackerConfig, {**plain, "seq_length": 3})
    with pytest.raises(ValueError, match=r"type must be one of .*'FixedSide'.*; got 'Square'"):
        from_plain(PackerConfig, {**plain, "resolution": {"type": "Square"}})


def test_checks_of_the_class_run_again() -> None:
    plain = to_plain(PackerConfig())

    with pytest.raises(ValueError, match="seq_len must be a positive integer"):
        from_plain(PackerConfig, {**plain, "seq_len": 0})


@dataclass(frozen=True)
class _Numbers:
    share: float
    count: int
    either: int | float | None = None


def test_whole_numbers_stay_floats_where_floats_are_meant() -> None:
    again = from_plain(_Numbers, json.loads('{"share": 1, "count": 2, "either": 2.5}'))

    assert isinstance(again.share, float)
    assert isinstance(again.count, int)
    assert again.either == 2.5
