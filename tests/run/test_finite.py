"""Numbers, weights and trainings that are not finite, at every door they could pass."""

import math

import pytest
import torch
from torch import nn

from tasks.run.finite import check_numbers, check_tensors, check_weights

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"loss": NAN}, "loss is nan"),
        ({"a": 1.0, "b": {"c": [0, "nan", None, True, [-INF]]}}, r"b\.c\[4\]\[0\] is -inf"),
        ([{"x": 1}, {"x": INF}], r"\[1\]\.x is inf"),
        (torch.tensor(NAN).double().numpy()[()], " is nan"),
    ],
)
def test_a_number_is_named_by_its_place(values, place):
    with pytest.raises(ValueError, match=f"^card(: )?{place}$"):
        check_numbers("card", values)


def test_finite_numbers_and_other_things_pass():
    check_numbers("card", {"a": 1e308, "b": ["nan", None, 3, {"c": False}], "d": "inf"})


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_tensor_is_named(dtype, bad):
    tensor = torch.zeros(3, 5)
    tensor[1, 4] = bad
    with pytest.raises(ValueError, match=r"^m: b holds a number that is not finite$"):
        check_tensors("m", {"a": torch.zeros(2, dtype=dtype), "b": tensor.to(dtype)})


@pytest.mark.parametrize("dtype", FLOATS[:-1])  # the largest of eight bits rounds to infinity on its way
def test_sums_that_overflow_condemn_nothing(dtype):
    most = torch.finfo(dtype).max
    check_tensors("m", {"a": torch.full((4096,), most, dtype=torch.float64).to(dtype)})
    check_tensors("m", {"both": torch.tensor([INF, -INF]).nan_to_num().to(dtype).clamp(-most, most)})


def test_what_holds_no_floating_point_numbers_passes():
    check_tensors("m", {"a": torch.arange(3), "b": torch.empty(2, device="meta"), "c": torch.empty(0)})


def test_of_a_model_parameters_are_looked_at_and_masks_are_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("mask", torch.full((2,), -INF))
    check_weights("model", model)
    model[1].bias.data[0] = NAN
    with pytest.raises(ValueError, match=r"^model: 1\.bias holds"):
        check_weights("model", model)
