"""Policy against SFT: the whole stage on tiny models, and models that are the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet

from tasks import pack
from tasks.lm.loading import load_causal
from tasks.policy_eval import run
from tasks.policy_eval.card import Answers
from tasks.policy_eval.stage import answer, held_out_prompts, kl_to_sft


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """Prompts and three models; ppo is another random model than sft."""
    layout = tiny.project(tmp_path_factory.mktemp("upstream"), tiny.splits(held=30))
    pack.run(tiny.params(), layout)
    size = len(tiny.tokenizer())
    for stage, model in (
        ("sft", tiny.causal(vocab_size=size, num_hidden_layers=1)),
        ("ppo", tiny.causal(seed=3, vocab_size=size, num_hidden_layers=1)),
        ("reward", tiny.scorer(seed=1, vocab_size=size)),
    ):
        tiny.save(model, layout.artifact(stage, "model"))
    return layout


def project(upstream, root, ppo="ppo"):
    root.mkdir(exist_ok=True)
    layout = tiny.project(root)
    layout.artifact("pack").parent.mkdir()
    for name, source in (("pack", "pack"), ("sft", "sft"), ("reward", "reward"), ("ppo", ppo)):
        layout.artifact(name).symlink_to(upstream.artifact(source))
    return layout


def card_of(layout):
    return json.loads(layout.artifact("policy_eval", "card.json").read_text())


def test_the_stage(upstream, tmp_path):
    layouts = [project(upstream, tmp_path / name) for name in "ab"]
    found = [run(tiny.params(), layout).metrics for layout in layouts]
    assert found[0] == found[1]
    first, second = (tiny.digests(layout.artifact("policy_eval")) for layout in layouts)
    assert first == second and set(first) == {"card.json", "samples.md"}
    metrics, card = found[0], card_of(layouts[0])
    assert metrics["prompts"] == card["prompts"] == 12 and metrics["kl_nats"] == card["kl_nats"] > 0.1
    assert metrics["win_rate"] == card["sampled"]["win_rate"] and 0 < metrics["win_rate"] < 1
    assert metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]
    for way in ("greedy", "sampled"):
        for model in ("sft", "ppo"):
            assert metrics[f"{way}_score_{model}"] == card[way]["score"][model] == card[way][model]["score"]
            assert metrics[f"{way}_correct_{model}"] == card[way]["correct"]["all"][model]
        low, high = card[way]["score"]["interval"]
        assert metrics[f"{way}_score_gain_low"] == low <= card[way]["score"]["gain"] <= high
        assert set(card[way]["correct"]) == {"all", "sums"}
    page = layouts[0].artifact("policy_eval", "samples.md").read_text()
    assert page.count("\n| Question") == 0 and page.count("What is ") == 12 and "## greedy" in page
    assert "12 held-out prompts, the same random numbers for both" in page


def test_identical_models_are_even(upstream, tmp_path):
    """The same prompts and the same random numbers: nothing differs at all."""
    layout = project(upstream, tmp_path, ppo="sft")
    metrics, card = run(tiny.params(), layout).metrics, card_of(layout)
    assert metrics["win_rate"] == metrics["win_rate_low"] == metrics["win_rate_high"] == 0.5
    assert metrics["kl_nats"] == pytest.approx(0, abs=1e-6)
    for way in ("greedy", "sampled"):
        assert card[way]["sft"] == card[way]["ppo"] and card[way]["score"]["interval"] == [0, 0]


def test_real_sites_have_no_correctness(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("pack").unlink()
    layout.artifact("pack", "prompts").mkdir(parents=True)
    table = parquet.read_table(upstream.artifact("pack", "prompts", "eval.parquet"))
    rows = [row | {"expected": None, "kind": None} for row in table.to_pylist()]
    parquet.write_table(
        table.from_pylist(rows, table.schema), layout.artifact("pack", "prompts", "eval.parquet")
    )
    metrics = run(tiny.params(), layout).metrics
    assert card_of(layout)["greedy"]["correct"] is None and not any("correct" in name for name in metrics)


def test_which_prompts_does_not_depend_on_their_order(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("pack").unlink()
    layout.artifact("pack", "prompts").mkdir(parents=True)
    table = parquet.read_table(upstream.artifact("pack", "prompts", "eval.parquet"))
    back = table.from_pylist(table.to_pylist()[::-1], table.schema)
    parquet.write_table(back, layout.artifact("pack", "prompts", "eval.parquet"))
    there = held_out_prompts(upstream, 12)
    assert held_out_prompts(layout, 12) == there and len(there) == 12
    assert held_out_prompts(upstream, 5) == there[:5] and len(held_out_prompts(upstream, 10**6)) == 30
    numbers = [row["question_id"] for row in there]
    assert numbers != sorted(numbers)


def test_no_prompt_is_named(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("pack").unlink()
    layout.artifact("pack", "prompts").mkdir(parents=True)
    table = parquet.read_table(upstream.artifact("pack", "prompts", "eval.parquet"))
    parquet.write_table(table.slice(0, 0), layout.artifact("pack", "prompts", "eval.parquet"))
    with pytest.raises(ValueError, match=r"eval\.parquet holds no prompt"):
        run(tiny.params(), layout)


def test_answers_belong_to_their_prompts(upstream):
    """K samples of one prompt stand side by side, texts and scores with them; greedy is one and the same."""
    model = load_causal(upstream.artifact("sft", "model"))
    scorer = tiny.scorer(seed=1, vocab_size=len(tiny.tokenizer()))
    judge = tiny.reward_model(scorer)
    rows, params = held_out_prompts(upstream, 4), tiny.params()
    found = answer(model, judge, tiny.tokenizer(), rows, params, 3, seed=5)
    assert found.scores.shape == (4, 3) and [len(t) for t in found.tokens] == [3] * 4
    for row, tokens, texts, scores in zip(rows, found.tokens, found.texts, found.scores, strict=True):
        for response, text, score in zip(tokens, texts, scores, strict=True):
            assert text == tiny.tokenizer().decode(response, skip_special_tokens=True)
            with torch.no_grad():
                wanted = scorer(torch.tensor([[*row["prompt"], *response]])).logits.item()
            assert score == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    again = answer(model, judge, tiny.tokenizer(), rows, params, 3, seed=5)
    assert again.tokens == found.tokens
    assert answer(model, judge, tiny.tokenizer(), rows, params, 3, seed=6).tokens != found.tokens
    greedy = answer(model, judge, tiny.tokenizer(), rows, params, 2, seed=None)
    assert all(one == two for one, two in greedy.tokens)


@torch.no_grad()
def test_kl_by_the_definition(upstream):
    sft, ppo = (load_causal(upstream.artifact(stage, "model")) for stage in ("sft", "ppo"))
    rows = [{"prompt": p} for p in tiny.drawn((4, 2), high=200)]
    tokens = [[[5, 6, 1], [7]], [[8, 9], [3, 4, 5]]]
    found = kl_to_sft(ppo, sft, rows, Answers(tokens, [], np.zeros((2, 2))), 0, 0.7, 3)
    wanted = []
    for row, own in zip(rows, tokens, strict=True):
        for response in own:
            ids = torch.tensor([[*row["prompt"], *response]])
            before = slice(len(row["prompt"]) - 1, ids.shape[1] - 1)
            p, s = ((m(ids).logits[0, before] / 0.7).log_softmax(-1) for m in (ppo, sft))
            wanted.append((p - s)[range(len(response)), response].sum())
    assert tiny.far(found, torch.stack(wanted)) < 1e-4


def test_scores_that_are_not_finite_are_an_error(upstream):
    model = load_causal(upstream.artifact("sft", "model"))
    judge = tiny.reward_model(tiny.scorer(vocab_size=len(tiny.tokenizer())))
    torch.nn.init.constant_(judge.model.score.weight, torch.nan)
    with pytest.raises(ValueError, match="scores that are not finite"):
        answer(model, judge, tiny.tokenizer(), held_out_prompts(upstream, 2), tiny.params(), 1, None)
