"""The row cache: each token sees its own row's tokens, whatever lies beside them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tasks.lm.attention import kv_cache
from tasks.lm.attention.kv_cache import RowCache, cut

PROMPTS = [5, 5, 3, 3, 1]  # tokens; rows 0 and 1 share a prompt, 2 and 3 do not


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def filled(layers=2, dtype=None):
    """A cache whose prompts lie in one row: of 5 | 3 | 3 | 1 tokens; and keys and values of each row."""
    made = RowCache(PROMPTS, 4, "cpu", dtype)
    rows = [[] for _ in PROMPTS]
    for first, starts, tokens in ((0, [0, 0, 5], 8), (3, [0, 3], 4)):
        made.lay(first, starts)
        for layer in range(layers):
            keys, values = drawn(1, 2, tokens, 6) + layer, drawn(1, 2, tokens, 4) - layer
            back = made.update(keys, values, layer)
            assert back[0] is keys and back[1] is values, "the prompts attend to one another elsewhere"
            for row, start in enumerate(starts, first):
                own = slice(start, start + PROMPTS[row])
                rows[row].append((keys[0, :, own], values[0, :, own]))
    made.begin()
    return made, rows


def step(made, rows, at, window=None):
    """One token a row in every layer: what is attended, and what should be."""
    for layer in range(2):
        new = drawn(len(rows), 2, 1, 6) + at, drawn(len(rows), 2, 1, 4) - at
        query = drawn(len(rows), 4, 1, 6) - at
        back = made.update(*new, layer)
        found = made.attend(query, *back, 0.3, window)
        wanted = []
        for i, row in enumerate(rows):
            row[layer] = tuple(torch.cat([old, x[i]], 1) for old, x in zip(row[layer], new, strict=True))
            keys, values = (x[:, -(window or 99) :].repeat_interleave(2, 0) for x in row[layer])
            wanted.append(scaled_dot_product_attention(query[i], keys, values, scale=0.3).transpose(0, 1))
        assert found.shape == (len(rows), 1, 4, 4)
        torch.testing.assert_close(found, torch.stack(wanted))
    made.column += 1


@pytest.mark.parametrize("worth", [1, 2**30], ids=["many groups", "one group"])
@pytest.mark.parametrize("window", [None, 2, 4, 8])
def test_every_row_sees_itself(worth, window, monkeypatch):
    monkeypatch.setitem(kv_cache.WORTH_A_CALL, "cpu", worth)
    made, rows = filled()
    assert len(made.groups) == (3 if worth == 1 else 1)
    assert made.get_seq_length() == 5
    step(made, rows, 0, window)
    step(made, rows, 1, window)
    made.select(torch.tensor([0, 2, 4]))
    rows = [rows[i] for i in (0, 2, 4)]
    step(made, rows, 2, window)
    made.select(torch.tensor([2]))
    step(made, rows[2:], 3, window)
    assert made.get_seq_length() == 9


def test_junk_in_columns_that_are_not_seen_changes_nothing(monkeypatch):
    monkeypatch.setitem(kv_cache.WORTH_A_CALL, "cpu", 2**30)
    made, rows = filled()
    for buffers in made.buffers.values():
        for buffer in buffers:
            buffer[2:4, :, :2], buffer[4, :, :4], buffer[:, :, 6:] = 1e9, -1e9, torch.nan
    step(made, rows, 0)


def test_what_is_kept_may_be_of_another_dtype():
    made, _ = filled(dtype=torch.bfloat16)
    assert {buffer.dtype for both in made.buffers.values() for buffer in both} == {torch.bfloat16}
    before = made.buffers[0][0].data_ptr()
    back = made.update(drawn(5, 2, 1, 6), drawn(5, 2, 1, 4), 0)
    assert back[0].dtype == torch.bfloat16 and back[0].data_ptr() == before, "written in place"


def test_cuts_by_hand():
    assert cut([9, 9, 5, 4], 8) == [0, 2, 4]
    assert cut([9, 9, 5, 4], 9) == [0, 4]
    assert cut([9, 9, 5, 4], 1) == [0, 2, 3, 4]
    assert cut([7, 7, 7], 0.5) == [0, 3] == cut([7, 7, 7], float("inf"))


def test_no_cut_is_made_where_calls_are_dear(monkeypatch):
    monkeypatch.setattr(kv_cache, "WORTH_A_CALL", {})
    assert len(filled()[0].groups) == 1
