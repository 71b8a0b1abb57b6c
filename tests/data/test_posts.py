import pytest

from tasks.data.posts import integers, posts_of
from tasks.data.shelf import POSTS


@pytest.fixture
def read(tmp_path, xml, assembled):
    def function(rows, min_answers=2):
        path = tmp_path / "unix.example.Posts.xml"
        path.write_bytes(xml(rows))
        return assembled(path, min_answers)

    return function


def post_of(row) -> dict[str, object]:
    (post,) = posts_of([{key: str(value) for key, value in row.items()}], "unix.example").to_pylist()
    assert list(post) == POSTS.names
    return post


def test_a_whole_question(question):
    row = question(6, Score=-2, AcceptedAnswerId=9, Tags="<a><c++>", OwnerUserId=5, Title=" List\n files ")
    assert post_of(row | {"ContentLicense": "CC BY-SA 3.0"}) == {
        "site": "unix.example", "id": 6, "what": "question", "parent_id": None, "accepted_id": 9, "votes": -2,
        "score": None, "title": "List files", "text": "<p>Tell me about 6, please.</p>", "is_html": True,
        "tags": ["a", "c++"], "created": "2020-01-02T03:04:05.000", "owner_id": 5, "licence": "CC BY-SA 3.0",
    }  # fmt: skip


def test_a_whole_answer(answer):
    assert post_of(answer(7, 6, Score=5, AcceptedAnswerId=1)) == {
        "site": "unix.example", "id": 7, "what": "answer", "parent_id": 6, "accepted_id": None, "votes": 5,
        "score": None, "title": "", "text": "<p>Answer 7.</p>", "is_html": True, "tags": [],
        "created": "2020-01-02T03:04:05.000", "owner_id": None, "licence": "CC BY-SA 4.0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("written", "tags"),
    [("<a><b-c>", ["a", "b-c"]), ("|a|b-c|", ["a", "b-c"]), ("", []), ("<.net>", [".net"])],
)
def test_both_formats_of_tags(question, written, tags):
    assert post_of(question(1, Tags=written))["tags"] == tags


@pytest.mark.parametrize(
    ("created", "licence"),
    [
        ("2011-04-07T23:59:59.999", "CC BY-SA 2.5"),
        ("2011-04-08T00:00:00.000", "CC BY-SA 3.0"),
        ("2018-05-01T23:59:59.999", "CC BY-SA 3.0"),
        ("2018-05-02T00:00:00.000", "CC BY-SA 4.0"),
    ],
)
def test_licence_by_date(answer, created, licence):
    assert post_of(answer(1, 2, CreationDate=created))["licence"] == licence


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12), ("-1", -1), ("1_0", None), (" 1", None), ("٣", None), ("", None), (None, None),
        ("1.0", None), ("9" * 18, 10**18 - 1), ("9" * 19, None), ("007", 7), ("-0", 0), ("1\n", None),
    ],
)  # fmt: skip
def test_integer(text, number):
    assert integers([text]).to_pylist() == [number]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"Id": ""}, "row_without_id"),
        ({"Id": "x"}, "row_without_id"),
        ({"Id": "1"}, "duplicate_id"),
        *(({"PostTypeId": kind}, "other_post_type") for kind in (3, 4, 5, 6, 7, 8, "", "two")),
        ({"Score": "many"}, "unreadable_row"),
        ({"Score": 2**31}, "unreadable_row"),
        ({"CreationDate": "yesterday"}, "unreadable_row"),
        ({"ParentId": ""}, "unreadable_row"),
        ({"ParentId": 999}, "orphan_answer"),
        ({"ParentId": 2}, "orphan_answer"),
        ({"Body": ""}, "empty_answer"),
        ({"Body": '<p><a href="x"><img src="ad.png" alt="ad"></a></p>'}, "empty_answer"),
        ({"Body": "<p>Answer 2.</p>\n"}, "identical_answer"),
        ({"Body": "<div>" * 5000}, "unreadable_html"),
    ],
)
def test_a_damaged_answer_is_counted_once_and_left_out(read, site, answer, damage, reason):
    found = read([*site(1), answer(50, 1) | damage])
    (kept,) = found.questions
    assert found.drops == {reason: 1}
    assert [a.id for a in kept.answers] == [2, 3]


@pytest.mark.parametrize(
    ("damage", "drops"),
    [
        ({"Title": "?", "Body": "<p>!</p>"}, {"empty_question": 1, "answer_of_dropped_question": 2}),
        ({"Body": "<div>" * 5000}, {"unreadable_html": 1, "answer_of_dropped_question": 2}),
        ({"PostTypeId": 5}, {"other_post_type": 1, "orphan_answer": 2}),
        ({"Id": ""}, {"row_without_id": 1, "orphan_answer": 2}),
        ({"CreationDate": ""}, {"unreadable_row": 1, "orphan_answer": 2}),
    ],
)
def test_a_damaged_question_goes_with_its_answers(read, site, question, answer, damage, drops):
    found = read([*site(1), question(50) | damage, answer(51, 50), answer(52, 50)])
    assert [kept.id for kept in found.questions] == [1]
    assert found.drops == drops


def test_few_answers_before_and_after_their_texts_are_read(read, question, answer):
    hostile = "<div>" * 5000  # never looked at: its question is out already
    rows = [question(1), answer(2, 1), question(3), answer(4, 3), answer(5, 3, Body="")]
    rows.append(question(6, Body=hostile))
    found = read(rows)
    assert found.questions == []
    assert found.drops == {"question_with_few_answers": 3, "answer_of_dropped_question": 2, "empty_answer": 1}
    assert found.rows == found.drops.total()
    found = read(rows, min_answers=1)
    assert [kept.id for kept in found.questions] == [1, 3]
    assert found.drops == {"question_with_few_answers": 1, "empty_answer": 1}


def test_question_and_answers_come_out_whole(read, question, answer):
    rows = [
        answer(9, 6, Score=-3),  # before its question, as after a merge
        question(6, Title="List files", Body="<p>How?</p>", AcceptedAnswerId=7, Tags="|ls|", OwnerUserId=3),
        answer(8, 6, Score=7, OwnerUserId=4),
        answer(7, 6, Score=5, Body="<p>Use <code>ls</code>.</p>", ContentLicense="CC BY-SA 2.5"),
    ]
    (kept,) = read(rows).questions
    assert (kept.site, kept.id, kept.title) == ("unix.example", 6, "List files")
    assert kept.text == "List files\n\nHow?"
    assert (kept.tags, kept.owner_id, kept.licence) == (["ls"], 3, "CC BY-SA 4.0")
    facts = [(a.id, a.score, a.votes, a.accepted, a.owner_id, a.licence) for a in kept.answers]
    assert facts == [
        (7, 4, 5, True, None, "CC BY-SA 2.5"),
        (8, 3, 7, False, 4, "CC BY-SA 4.0"),
        (9, -1, -3, False, None, "CC BY-SA 4.0"),
    ]
    assert kept.answers[0].text == "Use `ls`."
    assert kept.pairs == 3


def test_nobody_accepted_an_answer_whose_id_is_minus_one(read, question, answer):
    (kept,) = read([question(6), answer(-1, 6, Score=3), answer(7, 6)]).questions
    assert [(a.id, a.accepted, a.score) for a in kept.answers] == [(-1, False, 2), (7, False, 1)]


def test_rows_in_any_order(read, site):
    (first, second) = (read(rows).questions for rows in (site(5), site(5)[::-1]))
    assert first == second
    assert [question.id for question in first] == [1, 4, 7, 10, 13]


def test_pairs_leave_ties_out(read, question, answer):
    rows = [question(1), *(answer(n, 1, Score=votes) for n, votes in ((2, 0), (3, 2), (4, 3), (5, 3)))]
    (kept,) = read(rows).questions
    assert [a.score for a in kept.answers] == [0, 2, 2, 2]
    assert kept.pairs == 3
