"""Statistics over part of a tensor: as if the rest did not exist."""

from __future__ import annotations

import pytest
import tiny
import torch

from tasks.lm.numerics.masked import masked_mean, masked_var, whiten

T, F = True, False
VALUES = torch.tensor([[1.0, 2.0, 99.0], [6.0, -50.0, 7.0]])
MASK = torch.tensor([[T, T, F], [T, F, F]])  # 1, 2, 6


def test_by_hand():
    """Mean of 1, 2, 6 is 3; the squares of −2, −1, 3 sum to 14, over one less than three."""
    assert masked_mean(VALUES, MASK).item() == 3
    assert masked_var(VALUES, MASK).item() == pytest.approx(7)
    scale = 7**0.5
    wanted = [[-2 / scale, -1 / scale, 0], [3 / scale, 0, 0]]
    assert tiny.far(whiten(VALUES, MASK), wanted) < 1e-6


def test_whitened_values_have_mean_zero_and_variance_one():
    draw = torch.Generator().manual_seed(0)
    values, mask = torch.randn(8, 9, generator=draw) * 7 + 30, torch.rand(8, 9, generator=draw) > 0.4
    found = whiten(values, mask)
    assert masked_mean(found, mask).abs() < 1e-5 and (masked_var(found, mask) - 1).abs() < 1e-4
    assert not found[~mask].any()
    kept = values[mask]
    assert tiny.far(found[mask], (kept - kept.mean()) / kept.std()) < 1e-5


@pytest.mark.parametrize("function", [masked_mean, masked_var, whiten])
def test_columns_of_junk_change_nothing(function):
    junk = torch.tensor([[1e6, -3.0], [4.0, 1e6]])
    wide = function(torch.cat([VALUES, junk], 1), torch.cat([MASK, torch.zeros(2, 2, dtype=torch.bool)], 1))
    wanted = function(VALUES, MASK)
    assert torch.equal(wide if wide.ndim == 0 else wide[:, :3], wanted)


def test_without_a_shift_the_mean_stays():
    found = whiten(VALUES, MASK, shift_mean=False)
    assert tiny.far(found, whiten(VALUES, MASK) + 3 * MASK) < 1e-6


def test_parts_of_several_processes_make_one_whole():
    """Each process holds a row, and sums over both."""
    rows = [(VALUES[i : i + 1], MASK[i : i + 1]) for i in (0, 1)]

    def on_both(function):
        """Runs a function of (values, mask, total) for both rows until no sum is missing."""
        found: list[list[torch.Tensor]] = []  # sums over processes, in the order of the calls
        while True:
            said = [[], []]

            def total(x, rank, said=said):
                said[rank].append(x)
                return found[len(said[rank]) - 1] if len(said[rank]) <= len(found) else x

            out = [function(*row, lambda x, rank=rank: total(x, rank)) for rank, row in enumerate(rows)]
            if len(said[0]) == len(found):
                return out
            found.append(said[0][len(found)] + said[1][len(found)])

    for function in (masked_mean, masked_var):
        assert all(torch.allclose(x, function(VALUES, MASK)) for x in on_both(function))
    assert torch.allclose(torch.cat(on_both(whiten)), whiten(VALUES, MASK))


def test_one_element_is_finite():
    one = torch.tensor([[T, F, F], [F, F, F]])
    assert masked_mean(VALUES, one) == 1 and masked_var(VALUES, one) == 0
    assert whiten(VALUES, one).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_nothing_is_zero():
    none = torch.zeros_like(MASK)
    assert masked_mean(VALUES, none) == 0 and masked_var(VALUES, none) == 0 and not whiten(VALUES, none).any()
