"""Rows as users have them: their tokens, what is learnt of them, and what is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
from datasets import Dataset

from tasks.sft.documents import Document, Reader, pack, read_document
from tasks.sft.records import PackedRow, collate

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "What is 1 + 2?"}]
SAID = [{"role": "assistant", "content": "It is 3."}]


def chatty(template: str = TEMPLATE):
    tokenizer = deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def learnt_text(document: Document, loss_on: str) -> str:
    """What of a document a batch really learns."""
    (row,) = pack([document], 512)
    return tiny.tokenizer().decode(collate([row], loss_on)["labels"])


def reader(**keys) -> Reader:
    return Reader(**{"tokenizer": chatty(), "vocabulary": 400, "row_tokens": 64, **keys})


def test_a_text_ends_with_eos_once():
    ids = tiny.tokenizer()("It is 3.")["input_ids"]
    assert read_document({"text": "It is 3."}, tiny.tokenizer()) == Document((*ids, tiny.EOS), 0)
    spelled = read_document({"text": "It is 3.<|eos|>"}, tiny.tokenizer()).tokens
    assert spelled[: len(ids)] == tuple(ids) and spelled.count(tiny.EOS) == 1, "a text's letters end nothing"


def test_the_completion_begins_where_the_prompt_ends():
    found = read_document({"prompt": "What is 1 + 2?", "completion": " It is 3."}, tiny.tokenizer())
    assert learnt_text(found, "response") == " It is 3.<|eos|>"
    assert learnt_text(found, "all").endswith("at is 1 + 2? It is 3.<|eos|>")


def test_a_merged_seam_moves_the_border_back():
    """`is` is one token: the prompt's last token is not the document's, so it is learnt."""
    ids = tiny.tokenizer()("This is")["input_ids"]
    assert ids[:-1] != tiny.tokenizer()("This i")["input_ids"][: len(ids)]
    found = read_document({"prompt": "This i", "completion": "s"}, tiny.tokenizer())
    assert found.tokens[: len(ids)] == tuple(ids) and found.prompt == len(ids) - 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": SAID},
        {"messages": ASKED + SAID},
        {"messages": ASKED + SAID, "tools": None},
    ],
)
def test_conversations_follow_their_template(row):
    found = read_document(row, chatty())
    assert tiny.tokenizer().decode(found.tokens) == "<user>What is 1 + 2?<assistant>It is 3.<|eos|>"
    assert learnt_text(found, "response") == "It is 3.<|eos|>"


def test_only_what_the_assistant_said():
    row = {
        "messages": [
            *ASKED,
            *SAID,
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    found = read_document(row, chatty(), assistant_only=True)
    for loss_on in ("all", "response"):
        assert learnt_text(found, loss_on) == "It is 3.<|eos|>Yes.<|eos|>"
    assert learnt_text(read_document(row, chatty()), "response") == "Yes.<|eos|>"


def test_token_ids_by_hand():
    assert read_document({"input_ids": [5, 6, 7]}, None) == Document((5, 6, 7), 0)
    assert read_document({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, None) == Document(
        (5, 6, 7, 8), 0, (0, 2)
    )
    masked = read_document({"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 0, 1]}, None)
    assert masked == Document((5, 6, 7, 8, 9), 2, (3,))


def test_packing_by_hand():
    """Longest first into the fullest row; in a row the documents keep their order, and what they ignore."""
    documents = [Document((5, 6), 1), Document((7, 8, 9, 10, 11), 0, (1, 4)), Document((12, 13, 14), 2, (2,))]
    assert pack(documents, 5) == [
        PackedRow((7, 8, 9, 10, 11), (5,), (0,), (1, 4)),
        PackedRow((5, 6, 12, 13, 14), (2, 3), (1, 2), (4,)),
    ]
    assert pack([Document((5, 6, 7), 0)], 2) == [PackedRow((5, 6, 7), (3,), (0,))]


def test_neighbours_with_one_prompt_stay_together():
    """A row of 24 tokens takes bundles of at most 3: the first two; the third begins alike and is alone."""
    prompt = (5,)
    documents = [
        Document((*prompt, 6), 1, (1,)), Document((*prompt,), 1), Document((*prompt, 7), 1, (0,)),
        Document(tuple(range(5, 26)), 0), Document((5, 9, 9), 0),
    ]  # fmt: skip
    assert pack(documents, 24) == [
        PackedRow((5, 6, 5, *range(5, 26)), (2, 1, 21), (1, 1, 0), (1,)),
        PackedRow((5, 7, 5, 9, 9), (2, 3), (1, 0), (0,)),
    ]


def test_neighbours_with_prompts_of_one_length_do_not():
    documents = [Document((5,), 1), Document((7, 8), 1), Document((9,) * 22, 0)]
    assert [row.lengths for row in pack(documents, 24)] == [(2, 22), (1,)]


def test_completions_of_one_prompt_are_read_once():
    rows = [{"prompt": f"What is {n} + 2?", "completion": f" {n}{m}."} for n in range(9) for m in "abc"]
    found = reader(row_tokens=512)(rows, "train_dataset")
    tokens = len(collate(found)["forest"].tokens)
    assert tokens < 0.6 * sum(len(row.tokens) for row in found)


def test_what_a_row_ignores_is_not_learnt():
    """Each document of a shared prompt ignores its own."""
    row = PackedRow((5, 6, 7, 8, 5, 6, 9, 1), (4, 4), (2, 2), (2, 5))
    found = collate([row])
    assert len(found["forest"].tokens) == 6, "the prompt is there once"
    assert found["labels"].tolist() == [6, 8, 9, 1]
    assert found["forest"].tokens[found["predicts"]].tolist() == [5, 7, 6, 9]


def test_a_dataset_and_a_list_are_read_alike():
    rows = [{"text": f"{n} is a number." * (1 + n % 3)} for n in range(9)]
    found = reader()(rows, "train_dataset")
    assert found == reader()(Dataset.from_list(rows), "train_dataset")
    assert sum(len(row.lengths) for row in found) == 9 and all(sum(row.lengths) <= 64 for row in found)
    assert reader()(found, "train_dataset") == found


def test_long_documents_are_cut():
    (row,) = reader(max_length=5)([{"text": "What is 1 + 2? It is 3."}], "train_dataset")
    assert row.lengths == (5,) and tiny.EOS not in row.tokens
    (row,) = reader(max_length=3)(
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]}], "train_dataset"
    )
    assert row == PackedRow((5, 6, 7), (3,), (0,), (0,))
    (row,) = reader(max_length=3)([{"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 0, 0, 1]}], "x")
    assert row == PackedRow((5, 6, 7), (3,), (3,))


GOOD = {"text": "It is 3."}


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"text": ""}, {}, r"row 1: text: text is wanted"),
        ({"text": 3}, {}, r"row 1: text: text is wanted"),
        ({"prompt": "a", "completion": SAID}, {}, r"row 1: prompt and completion: text is wanted"),
        ({"prompt": ASKED, "completion": "b"}, {}, r"row 1: prompt and completion: conversation is wanted"),
        ({"messages": "a"}, {}, r"row 1: messages: conversation is wanted"),
        ({"texts": "a"}, {}, r"row 1: it has \['texts'\]; \{text\}"),
        ({"text": "a", "messages": SAID}, {}, r"row 1: it has \['messages', 'text'\]"),
        ({"messages": SAID}, {"tokenizer": tiny.tokenizer()}, r"row 1: a conversation, and the tokeni"),
        ({"messages": SAID}, {"assistant_only": True, "tokenizer": chatty("{{ messages[0].content }}")},
         r"row 1: the chat template marks no token"),
        ({"input_ids": [5, 6], "labels": [5]}, {}, r"row 1: 1 labels for 2 input_ids"),
        ({"input_ids": [5, 6], "labels": [6, 6]}, {}, r"row 1: label 0 is neither its token nor -100"),
        ({"input_ids": [5]}, {}, r"row 1: of 1 tokens \(of 1\) none is left to learn"),
        ({"input_ids": [5, 6], "completion_mask": [0, 0]}, {"loss_on": "response"}, r"row 1: of 2 tokens"),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, {"loss_on": "response", "max_length": 2},
         r"row 1: of 2 tokens \(of 3\) none is left to learn"),
        ({"input_ids": [5, 400]}, {}, r"row 1: token 400 is none of the model's 400"),
        ({"input_ids": [5] * 9}, {"positions": 8}, r"row 1: 9 tokens, the model has room for 8; set"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row, keys, message):
    good = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}
    with pytest.raises(ValueError, match=r"^eval_dataset, " + message):
        reader(**keys)([good, row], "eval_dataset")


def test_bad_rows_are_left_out_by_choice(caplog):
    rows = [GOOD, {"text": ""}, {"input_ids": [5]}, GOOD]
    found = reader(drops=True)(rows, "train_dataset")
    assert found == reader()([GOOD, GOOD], "train_dataset")
    assert "2 of 4 rows left out: train_dataset, row 1: text: text is wanted" in caplog.text
    with pytest.raises(ValueError, match=r"^train_dataset holds no row to learn from; train_dataset, row 0"):
        reader(drops=True)([{"text": ""}], "train_dataset")


def test_a_tokenizer_without_eos():
    tokenizer = chatty()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"row 0: the tokenizer has no eos token to end a text with; set"):
        reader(tokenizer=tokenizer)([GOOD], "train_dataset")
    assert reader(tokenizer=tokenizer)([{"input_ids": [5, 6]}], "train_dataset")


def test_nothing_to_learn_from_and_no_tokenizer():
    with pytest.raises(ValueError, match=r"train_dataset holds no row"):
        reader()([], "train_dataset")
    with pytest.raises(ValueError, match=r"row 0: it holds text; processing_class, a tokenizer, is wanted"):
        reader(tokenizer=None)([GOOD], "train_dataset")
