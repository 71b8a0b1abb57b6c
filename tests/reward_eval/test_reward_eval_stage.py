"""The stage on files: scores, gate, artifacts, the same bytes twice, and input that cannot be judged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from tasks import pack
from tasks.lm.model.loading import load_tokenizer
from tasks.pack.records import GROUPS
from tasks.reward_eval import run, stage


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed data and a reward model that knows nothing."""
    layout = tiny.project(tmp_path_factory.mktemp("reward_eval"), tiny.splits())
    pack.run(tiny.params(), layout)
    save(tiny.scorer(vocab_size=len(tiny.tokenizer())), layout)
    return layout


def save(model, layout):
    """A reward model with pack's tokenizer; another one is its judge."""
    known = load_tokenizer(layout.artifact("pack", "tokenizer"))
    tiny.save(model, layout.artifact("reward", "model"), known)
    tiny.save(
        tiny.scorer(seed=1, vocab_size=len(tiny.tokenizer())), layout.artifact("reward", "judge"), known
    )


def copied(packed, folder, model=None):
    """The same project again, with groups of its own to change, and with another model if one is given."""
    layout = tiny.project(folder)
    for part in ("groups", "tokenizer"):
        shutil.copytree(packed.artifact("pack", part), layout.artifact("pack", part))
    if model is None:
        layout.artifact("reward").mkdir()
        for name in ("model", "judge"):
            layout.artifact("reward", name).symlink_to(packed.artifact("reward", name))
    else:
        save(model, layout)
    return layout


def rewrite(layout, name, change):
    """Change the rows of a file of groups."""
    path = layout.artifact("pack", "groups", f"{name}.parquet")
    table = parquet.read_table(path)
    parquet.write_table(change(table), path)


def outs(layout):
    folder = layout.artifact("reward_eval")
    return json.loads((folder / "card.json").read_text()), json.loads((folder / "gate.json").read_text())


def own_accuracy(layout, name="model", without_eos=False) -> float:
    """From the files alone, with plain transformers."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(layout.artifact("reward", name))
    right = []
    for group in parquet.read_table(layout.artifact("pack", "groups", "eval.parquet")).to_pylist():
        with torch.no_grad():
            responses = [a["tokens"] for a in group["answers"]]
            if without_eos:
                responses = [r[:-1] if r[-1] == tiny.tokenizer().eos_token_id else r for r in responses]
            rows = [torch.tensor([group["prompt"] + r]) for r in responses]
            scores = [model(row).logits.item() for row in rows]
        right += [scores[better] > scores[worse] for better, worse in group["pairs"]]
    return sum(right) / len(right)


@pytest.mark.parametrize("enforce", [True, False])
def test_the_stage_and_its_gate(packed, enforce):
    """A model that knows nothing fails; without enforcement the verdict stands and the gate is open."""
    params = tiny.params(reward_eval={"enforce": enforce})
    metrics = run(params, packed).metrics
    card, gate = outs(packed)
    assert gate == {"passed": not enforce} and card["verdict"] != "passed"
    assert metrics["gate_passed"] == 0.0 and metrics["accuracy"] == card["rules"]["reward_model"]["accuracy"]
    assert card["rules"]["reward_model"]["accuracy"] == pytest.approx(own_accuracy(packed))
    assert 0 < metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"] < 1
    groups = parquet.read_table(packed.artifact("pack", "groups", "eval.parquet")).to_pylist()
    assert metrics["pairs"] == sum(len(g["pairs"]) for g in groups)
    picture = packed.home / "reports/reward_eval/reliability.png"
    before, drawn = tiny.digests(packed.artifact("reward_eval")), picture.read_bytes()
    assert run(params, packed).metrics == metrics and tiny.digests(packed.artifact("reward_eval")) == before
    assert picture.read_bytes() == drawn and set(before) == {"card.json", "card.md", "gate.json"}


def test_low_bars_open_the_gate(packed):
    bars = {"enforce": True, "min_accuracy": 0, "min_margin": -1}
    metrics = run(tiny.params(reward_eval=bars), packed).metrics
    card, gate = outs(packed)
    assert gate == {"passed": True} and card["verdict"] == "passed" and metrics["gate_passed"] == 1.0


def test_what_mlflow_keeps(packed, monkeypatch):
    kept = []
    monkeypatch.setattr(stage, "log_artifact", kept.append)
    run(tiny.params(), packed)
    assert [path.name for path in kept] == ["card.md", "card.json", "reliability.png"]
    assert all(path.is_file() for path in kept)


def test_the_order_of_the_rows_does_not_matter(packed, tmp_path):
    layout = copied(packed, tmp_path)
    rewrite(layout, "eval", lambda table: table.take(np.random.default_rng(0).permutation(len(table))))
    assert run(tiny.params(), layout).metrics == run(tiny.params(), packed).metrics
    assert tiny.digests(layout.artifact("reward_eval")) == tiny.digests(packed.artifact("reward_eval"))


def test_the_logistic_rule_sees_the_training_groups_only(packed, tmp_path):
    run(tiny.params(), packed)
    own = outs(packed)[0]["logistic_rule"]
    groups = parquet.read_table(packed.artifact("pack", "groups", "reward.parquet")).to_pylist()
    assert own["questions"] == len(groups) and own["pairs"] == sum(len(g["pairs"]) for g in groups)
    assert any(own["coefficients"].values())
    layout = copied(packed, tmp_path)
    rewrite(layout, "eval", lambda table: table.slice(3))
    run(tiny.params(), layout)
    card = outs(layout)[0]
    assert card["logistic_rule"] == own and card["pairs"] != outs(packed)[0]["pairs"]
    rewrite(layout, "reward", lambda table: table.slice(10))
    run(tiny.params(), layout)
    assert outs(layout)[0]["logistic_rule"] != own


def test_a_model_that_says_the_same_of_all_is_never_right(packed, tmp_path):
    model = tiny.scorer(vocab_size=len(tiny.tokenizer()))
    torch.nn.init.zeros_(model.score.weight)
    metrics = run(tiny.params(), copied(packed, tmp_path, model)).metrics
    assert (metrics["accuracy"], metrics["ties"], metrics["gate_passed"]) == (0, 1, 0)


@pytest.mark.parametrize("name", ["eval", "reward"])
@pytest.mark.parametrize("rows", ["none", "ties"])
def test_no_pair_is_an_error_that_names_the_file(packed, tmp_path, name, rows):
    layout = copied(packed, tmp_path)

    def emptied(table):
        ties = [row | {"pairs": [], "weights": []} for row in table.to_pylist()]
        return GROUPS.empty_table() if rows == "none" else table.from_pylist(ties, schema=GROUPS)

    rewrite(layout, name, emptied)
    layout.artifact("reward", "model").unlink()  # it is not even looked at
    with pytest.raises(ValueError, match=rf"pack/groups/{name}\.parquet holds no pair"):
        run(tiny.params(), layout)


def test_a_group_of_ties_among_others_counts_for_nothing(packed, tmp_path):
    layout = copied(packed, tmp_path)

    def with_ties(table):
        rows = table.to_pylist()
        return table.from_pylist(
            [rows[0] | {"pairs": [], "weights": [], "question_id": 1}, *rows], schema=GROUPS
        )

    rewrite(layout, "eval", with_ties)
    rewrite(layout, "reward", with_ties)
    assert run(tiny.params(), layout).metrics == run(tiny.params(), packed).metrics


def test_a_score_that_is_not_finite_names_the_question(packed, tmp_path, monkeypatch):
    layout = copied(packed, tmp_path)
    groups = stage.held_out_groups(layout.artifact("pack", "groups", "eval.parquet"))
    first = sum(len(group["answers"]) for group in groups[:2])

    def broken(model, prompts, responses, rows):
        scores = torch.zeros(len(responses))
        scores[first], scores[first + 5] = torch.inf, torch.nan
        return scores

    monkeypatch.setattr(stage.RewardModel, "score", broken)
    with pytest.raises(
        ValueError, match=rf"not finite to an answer to s\.example/{groups[2]['question_id']}$"
    ):
        run(tiny.params(), layout)
    assert not layout.artifact("reward_eval").exists()


def test_a_broken_model_is_an_error(packed, tmp_path):
    layout = copied(packed, tmp_path, tiny.scorer(vocab_size=len(tiny.tokenizer())))
    path = layout.artifact("reward", "model", "model.safetensors")
    tensors = load_file(path)
    tensors["score.weight"].fill_(torch.nan)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: score\.weight holds a number that is not fin"):
        run(tiny.params(), layout)


def test_the_judge_stands_beside_and_decides_nothing(packed, tmp_path):
    """Its accuracy by definition; a judge that is the reward model mends none of its mistakes."""
    for name in ("other", "same"):
        (tmp_path / name).mkdir()
    other = copied(packed, tmp_path / "other")
    metrics, (card, gate) = run(tiny.params(), other).metrics, outs(other)
    assert (
        metrics["judge_accuracy"] == card["judge"]["accuracy"] == pytest.approx(own_accuracy(other, "judge"))
    )
    assert 0 < card["judge"]["of_mistakes"] < 1
    page = other.artifact("reward_eval", "card.md").read_text()
    assert f"is right for {metrics['judge_accuracy']:.3f} [0." in page and "Nobody can tell here" in page
    assert card["judge"]["is_judge"] is True and card["judge"]["style_against_truth"] is None
    assert "style" not in card["truth"] and "style stands" not in page, "truth is known here, and no style"
    same = copied(packed, tmp_path / "same")
    same.artifact("reward", "judge").unlink()
    same.artifact("reward", "judge").symlink_to(packed.artifact("reward", "model"))
    again = run(tiny.params(), same).metrics
    assert again.pop("judge_accuracy") == again["accuracy"] and outs(same)[0]["judge"]["of_mistakes"] == 0.0
    assert again.pop("judge_accuracy_without_eos") == again["accuracy_without_eos"] != again["accuracy"]
    del metrics["judge_accuracy"], metrics["judge_accuracy_without_eos"]
    assert again == metrics and outs(same)[1] == gate


def test_both_readings_are_of_the_files(packed, tmp_path):
    """With plain transformers: answers as they stand, and without their last token where that is eos."""
    metrics = run(tiny.params(), packed).metrics
    assert metrics["accuracy"] == pytest.approx(own_accuracy(packed))
    assert metrics["accuracy_without_eos"] == pytest.approx(own_accuracy(packed, without_eos=True))
    assert metrics["accuracy_without_eos"] != metrics["accuracy"]
    card = outs(packed)[0]["without_eos"]
    assert card["accuracy"] == metrics["accuracy_without_eos"]
    assert card["loss"] == pytest.approx(metrics["accuracy"] - card["accuracy"])


def test_what_the_sample_says_of_truth_and_style_reaches_the_card(packed, tmp_path):
    """One right and one wrong answer to each question; the wrong one is written better in every second."""
    layout = copied(packed, tmp_path)

    def told(table):
        rows = []
        for n, row in enumerate(table.to_pylist()):
            right, wrong, *_ = row["answers"]
            right |= {"text": "It is `yes`.", "style": "plain"}
            wrong |= {"text": "Well, it is `no`.", "style": ("clear", "padded")[n % 2]}
            known = {"kind": ("a", "b")[n % 2], "wording": "new", "expected": "yes"}
            rows.append(row | known | {"answers": [right, wrong], "pairs": [[0, 1]], "weights": [1.0]})
        return table.from_pylist(rows, schema=GROUPS)

    rewrite(layout, "eval", told)
    metrics, card = run(tiny.params(), layout).metrics, outs(layout)[0]
    against = card["truth"]["style"]["against truth"]
    assert metrics["judge_style_against_truth"] == against["judge"]["right"]
    assert card["judge"]["style_against_truth"] == against["judge"]["right"]
    assert metrics["style_against_truth"] == against["reward_model"]["right"]
    assert card["judge"]["is_judge"] == (against["judge"]["right"] >= 0.7)
    assert metrics["style_accuracy"] == card["parts"]["kind"]["b"]["pairs"] / card["pairs"]
    assert {"kind_a_accuracy", "kind_b_accuracy", "wording_new_accuracy"} <= metrics.keys()
    assert metrics["right_beats_wrong"] == metrics["accuracy"], "the right answers are the better ones"
    page = layout.artifact("reward_eval", "card.md").read_text()
    assert "## Does the right answer beat the wrong one?" in page and "| against truth |" in page
    assert ("is no judge" in page) != card["judge"]["is_judge"]
