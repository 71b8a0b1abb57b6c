"""Rows as users have them: the forms of TRL and good-or-bad answers; a bad row is named."""

from __future__ import annotations

import logging
import math

import pytest
import tiny
from datasets import Dataset
from made_rewards import chat_tokenizer

from tasks.reward import NOTHING, GroupedAnswers
from tasks.reward.rows import Reader, read_row

EOS = tiny.EOS


def ids(text: str, **keys) -> list[int]:
    return tiny.tokenizer()(text, **keys)["input_ids"]


def whole(group: GroupedAnswers) -> list[list[int]]:
    return [[*group.prompt, *response] for response in group.responses]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def reader(**keys) -> Reader:
    return Reader(**{"tokenizer": tiny.tokenizer(), "vocabulary": 330, "positions": None, **keys})


def test_texts():
    """Prompt and answer are tokenised in one go and end with eos; what a text spells are letters."""
    row = {"prompt": "What is 1 + 2?", "chosen": " It is 3.", "rejected": " It is 4.<|eos|>"}
    group = read_row(row, tiny.tokenizer())
    spelled = ids("What is 1 + 2? It is 4.<|eos|>", split_special_tokens=True)
    assert whole(group) == [[*ids("What is 1 + 2? It is 3."), EOS], [*spelled, EOS]]
    assert group.pairs == ((0, 1),) and group.weights == () == group.gaps
    first, second = group.responses
    assert len(group.prompt) > 3 and first[0] != second[0], "all they share is the prompt"
    joined = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert read_row(joined, tiny.tokenizer()) == group
    assert read_row({**joined, "prompt": None}, tiny.tokenizer()) == group


def test_conversations():
    row = {"prompt": turns("What is 1 + 2?"), "chosen": turns("", "3.")[1:], "rejected": turns("", "4.")[1:]}
    group = read_row(row, chat_tokenizer())
    wanted = [ids(f"<user>What is 1 + 2?\n<assistant>{n}.\n") for n in (3, 4)]
    assert whole(group) == wanted, "the template alone says what ends a conversation"
    joined = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert read_row(joined, chat_tokenizer()) == group


def test_a_template_is_given_its_arguments():
    tokenizer = chat_tokenizer()
    row = {"chosen": turns("a", "b"), "rejected": turns("a", "c"), "tools": '[{"x": 1}]'}
    template = "{{ tools[0].x }}{{ messages[1].content }}{{ word }}"
    row["chat_template_kwargs"] = {"chat_template": template, "word": "!"}
    assert whole(read_row(row, tokenizer)) == [ids("1b!"), ids("1c!")]


def test_token_ids():
    row = {"chosen_ids": [5, 6, 7, 1], "rejected_ids": [5, 6, 8, 9], "weight": 0.5, "margin": 2}
    assert read_row(row, None) == GroupedAnswers((5, 6), ((7, 1), (8, 9)), ((0, 1),), (0.5,), (2.0,))
    row = {"chosen_ids": [5, 6], "rejected_ids": [5, 6, 8]}
    assert read_row(row, None) == GroupedAnswers((5,), ((6,), (6, 8)), ((0, 1),))
    assert read_row({"chosen_ids": [5], "rejected_ids": [6]}, None).prompt == ()


@pytest.mark.parametrize(("label", "is_good"), [(True, 1), (1, 1), (1.0, 1), (False, 0), (0, 0)])
def test_good_or_bad(label, is_good):
    group = read_row({"prompt": "1 + 2 =", "response": " 3", "label": label}, tiny.tokenizer())
    assert whole(group) == [[*ids("1 + 2 = 3"), EOS]]
    assert group.pairs == (((0, NOTHING) if is_good else (NOTHING, 0)),)


def test_an_empty_answer_is_an_answer():
    """What an answer that ends at once deserves is worth knowing; a blank prompt is none."""
    group = read_row({"prompt": "1 + 2 =", "chosen": " 3", "rejected": ""}, tiny.tokenizer())
    assert whole(group)[1] == [*ids("1 + 2 ="), EOS]
    assert whole(read_row({**PAIR, "prompt": ""}, tiny.tokenizer()))[0] == [*ids(" 3"), EOS]


def test_an_encoder_closes_its_documents_itself():
    known = tiny.encoder_tokenizer()
    group = read_row({"prompt": "ab", "chosen": "c", "rejected": "d"}, known)
    letters = known.convert_tokens_to_ids
    assert whole(group) == [letters(["[CLS]", *"ab", c, "[SEP]"]) for c in "cd"]


PAIR = {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 4"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, r"it has \['chosen', 'id', 'prompt'\]; .* is wanted"),
        ({**PAIR, "chosen": " 4"}, "responses 0 and 1 of a pair are the same tokens"),
        ({"chosen_ids": [3, 4], "rejected_ids": [3, 4]}, "same tokens"),
        ({"chosen_ids": [], "rejected_ids": [3, 4]}, "response 0 is empty"),
        ({**PAIR, "rejected": None}, "texts or conversations, not NoneType"),
        ({**PAIR, "prompt": 7}, "texts or conversations, not int"),
        ({**PAIR, "prompt": "", "chosen": ""}, "chosen is empty, and so is its prompt"),
        ({"chosen": [], "rejected": turns("a")}, "chosen is empty"),
        ({"chosen": turns("a"), "rejected": turns("b")}, "the tokenizer has no chat template"),
        ({**PAIR, "prompt": turns("a")}, "both texts or both conversations"),
        ({"prompt": "a", "response": "b", "label": None}, "label None: 0 or 1 is wanted"),
        ({"prompt": "a", "response": "b", "label": math.nan}, "label nan: 0 or 1"),
        ({"prompt": "a", "response": "b", "label": 2}, "label 2: 0 or 1"),
        ({**PAIR, "weight": math.nan}, "weights .*finite"),
        ({**PAIR, "margin": 1.0}, r"a margin, which nothing uses; set margin \(1: as TRL\) or gap_weight"),
        (GroupedAnswers((5,), ((7,),), ()), "one answer, or only ties"),
        ({"chosen_ids": [3, 330], "rejected_ids": [3, 4]}, "token 330 is none of the model's 330"),
    ],
)
def test_a_bad_row_is_refused_by_its_name(row, says):
    named = row if isinstance(row, GroupedAnswers) else {**row, "id": "q/9"}
    name = "row 1" if isinstance(row, GroupedAnswers) else "q/9"
    with pytest.raises(ValueError, match=rf"^train_dataset, {name}: .*{says}"):
        reader()([PAIR, named], "train_dataset")


def test_a_group_keeps_its_name():
    named = GroupedAnswers((5,), ((7,), (8,)), ((0, 1),), name="s/7")
    assert [g.name for g in reader()([named, PAIR, {**PAIR, "id": 12}], "x")] == ["s/7", "row 1", "12"]


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="processing_class"):
        reader(tokenizer=None)([PAIR], "x")


def test_a_margin_is_a_gap():
    assert reader(uses_gaps=True)([{**PAIR, "margin": 2}], "x")[0].gaps == (2.0,)


def test_long_documents():
    """Cut, before the closing token for an encoder; refused if the two come out the same."""
    row = {"chosen_ids": [3, 4, 5, 6, 7], "rejected_ids": [3, 4, 8, 9, 7], "id": "q/1"}
    assert reader(max_length=4)([row], "x")[0].responses == ((5, 6), (8, 9))
    assert reader(max_length=4, is_causal=False)([row], "x")[0].responses == ((5, 7), (8, 7))
    with pytest.raises(ValueError, match=r"x, q/1: the prompt's 2 tokens leave no room within 2"):
        reader(max_length=2)([row], "x")
    late = GroupedAnswers((3,), ((4, 5, 6), (4, 5, 7)), ((0, 1),))
    with pytest.raises(ValueError, match=r"x, row 0: responses 0 and 1 of a pair are the same tokens"):
        reader(max_length=3)([late], "x")
    with pytest.raises(ValueError, match=r"q/1: response 0 ends at token 5, the model has room for 4"):
        reader(positions=4)([row], "x")


def test_bad_rows_may_be_left_out(caplog):
    rows = [PAIR, {**PAIR, "chosen": " 4", "id": "q/9"}, {**PAIR, "chosen": " 5"}]
    with caplog.at_level(logging.WARNING):
        found = reader(drops=True)(rows, "eval_dataset")
    assert [g.name for g in found] == ["row 0", "row 2"]
    assert "1 of 3 rows left out: eval_dataset, q/9: responses 0 and 1" in caplog.text
    with pytest.raises(ValueError, match="x holds no row to learn from; x, q/9: "):
        reader(drops=True)(rows[1:2], "x")
    with pytest.raises(ValueError, match=r"x holds no row to learn from$"):
        reader()([], "x")


def test_a_dataset_is_a_list_of_rows():
    rows = [PAIR, {**PAIR, "chosen": " 5"}]
    assert reader()(Dataset.from_list(rows), "x") == reader()(rows, "x")
    chats = [{"chosen": turns("a", "b"), "rejected": turns("a", "c")}]
    one = reader(tokenizer=chat_tokenizer())
    assert one(Dataset.from_list(chats), "x") == one(chats, "x")
