"""`navit.train.tasks`: how the scores of a CLIP start, and which captions are equal."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from navit.model.config import CLIPConfig
from navit.train.config import TrainConfig
from navit.train.contrastive import text_ids
from navit.train.start import start_of_scores
from tests.helpers.splits import Case, make_batch, make_task


@given(texts=st.lists(st.text(max_size=3)), cut=st.integers(0, 9))
def test_equal_captions_share_a_number_wherever_they_are(texts: list[str], cut: int) -> None:
    """Ranks and batches number their own captions alone."""
    numbers = text_ids(texts)

    assert numbers.dtype == torch.int64
    assert torch.equal(numbers, torch.cat([text_ids(texts[:cut]), text_ids(texts[cut:])]))
    for i, text in enumerate(texts):
        assert (numbers == numbers[i]).tolist() == [other == text for other in texts]


def test_a_caption_that_is_no_unicode_has_a_number() -> None:
    assert len(text_ids(["\ud800", "é"])) == 2


def test_a_sigmoid_run_starts_as_siglip_unless_the_model_says_otherwise() -> None:
    """SigLIP (arXiv:2303.15343), section 3.2."""
    siglip = start_of_scores(TrainConfig(contrastive_loss="sigmoid"))
    assert (siglip.init_logit_scale, siglip.init_logit_bias) == (10.0, -10.0)
    assert siglip.max_logit_scale is None

    own = CLIPConfig(init_logit_scale=5.0, init_logit_bias=-4.0)
    assert start_of_scores(TrainConfig(contrastive_loss="sigmoid", model=own)) == own
    assert start_of_scores(TrainConfig(model=own)) == own
    assert start_of_scores(TrainConfig()) == CLIPConfig()


def test_the_readings_name_what_the_loss_learns() -> None:
    sigmoid, softmax = make_task(Case("sigmoid", ())), make_task(Case("softmax", ()))
    assert sigmoid.readings() == {
        "logit_scale": pytest.approx(4.4817, rel=1e-4),
        "logit_bias": -10.0,
    }
    assert softmax.readings().keys() == {"logit_scale"}
    assert make_task(Case("labels", ())).readings() == {}


def test_a_task_reads_captions_and_labels_of_all_its_batches() -> None:
    """A joined output belongs to the batches in their order."""
    for kind in ("softmax", "labels"):
        task = make_task(Case(kind, ()))
        batches = [make_batch(range(3)), make_batch([]), make_batch(range(3, 7))]
        whole = task.model(make_batch(range(7)))
        parts = [task.model(batch) for batch in batches]
        if kind == "labels":
            joined = torch.cat(parts)
        else:
            image, text = (torch.cat([getattr(p, n) for p in parts]) for n in ("image", "text"))
            joined = replace(whole, image=image, text=text)
        found = task.loss(joined, batches, None)
        torch.testing.assert_close(found, task.loss(whole, [make_batch(range(7))], None))
