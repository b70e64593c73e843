"""`navit.train.ema`: the average is the weighted mean of the parameters seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from navit.train.ema import Ema


def model_with(value: float) -> nn.Module:
    model = nn.Linear(2, 1, dtype=torch.float64)
    set_to(model, value)
    return model


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(-9, 9), min_size=1, max_size=12), decay=st.sampled_from([0, 0.5, 0.9])
)
def test_average_is_the_decayed_mean_without_the_initial_weights(
    values: list[float], decay: float
) -> None:
    model = model_with(1e6)
    ema = Ema(model, float(decay))
    for value in values:
        set_to(model, value)
        ema.update(model)

    weights = [decay ** (len(values) - 1 - k) for k in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    for average in ema.average.values():
        assert average.flatten().tolist() == pytest.approx([expected] * average.numel(), abs=1e-9)


def test_first_two_updates_literally() -> None:
    model = model_with(7.0)
    ema = Ema(model, 0.5)
    set_to(model, 3.0)
    ema.update(model)
    assert ema.average["bias"].item() == 3.0
    set_to(model, 6.0)
    ema.update(model)
    assert ema.average["bias"].item() == pytest.approx((0.5 * 3 + 6) / 1.5)


def test_before_any_update_the_average_is_the_model() -> None:
    model = model_with(4.0)
    ema = Ema(model)
    set_to(model, 0.0)
    ema.copy_to(model)
    assert model.bias.item() == 4.0


def test_swap_gives_the_average_inside_and_the_own_weights_after_also_on_an_error() -> None:
    model = model_with(4.0)
    ema = Ema(model)
    set_to(model, 1.0)
    parameter = model.bias

    def evaluate() -> None:
        with ema.swap(model):
            assert model.bias.item() == 4.0
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        evaluate()

    assert model.bias is parameter
    assert model.bias.item() == 1.0
    assert ema.average["bias"].item() == 4.0


def test_resumed_average_is_bit_identical() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    ema = Ema(model, 0.9)
    resumed = Ema(nn.Linear(3, 3), 0.9)
    for step in range(6):
        if step == 3:
            resumed.load_tensors({k: v.clone() for k, v in ema.tensors().items()})
        nn.init.normal_(model.weight)
        ema.update(model)
        if step >= 3:
            resumed.update(model)

    assert resumed.num_updates == ema.num_updates == 6
    for name, value in ema.tensors().items():
        assert torch.equal(resumed.tensors()[name], value)


def test_averages_of_another_model_are_refused() -> None:
    ema = Ema(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="average/weight"):
        ema.load_tensors(Ema(nn.Linear(3, 2)).tensors())
    with pytest.raises(ValueError, match="average/bias"):
        ema.load_tensors(Ema(nn.Linear(3, 3, bias=False)).tensors())
    with pytest.raises(ValueError, match="got another set"):
        ema.update(nn.Linear(3, 3, bias=False))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be"):
        Ema(nn.Linear(1, 1), decay)
