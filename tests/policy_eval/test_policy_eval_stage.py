"""Policy against SFT: the whole stage on tiny models, and models that are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet

from params.schema import Params, PPOParams
from tasks import pack
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import load_causal
from tasks.policy_eval import monitor, run
from tasks.policy_eval import stage as policy_eval_stage
from tasks.policy_eval.answers import Reader, joined
from tasks.policy_eval.stage import may_judge, prompts_of, temperatures_of
from tasks.run.devices import derive_seed
from tasks.run.files import write_json
from tasks.run.layout import Layout
from tasks.run.monitor.look import Look

SCALES = {"model": {"mean": 0.5, "std": 2.0}, "judge": {"mean": -1.0, "std": 4.0}}


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
    tiny.save(tiny.scorer(seed=2, vocab_size=size), layout.artifact("reward", "judge"))
    for name, scores in SCALES.items():
        layout.artifact("reward", name, "scores.json").write_text(json.dumps(scores))
    return layout


def project(upstream, root, ppo="ppo"):
    root.mkdir(exist_ok=True)
    layout = tiny.project(root)
    layout.artifact("pack").parent.mkdir()
    for name, source in (("pack", "pack"), ("sft", "sft"), ("reward", "reward"), ("ppo", ppo)):
        layout.artifact(name).symlink_to(upstream.artifact(source))
    write_json(layout.artifact("reward_eval", "card.json"), {"judge": {"accuracy": 0.8}})
    return layout


def held_out_prompts(layout, most):
    return prompts_of(layout.artifact("pack", "prompts", "eval.parquet"), most)


def reader_of(sft, model, judge=None, temperature=1.0, length=6):
    scorers = {"model": model, "judge": judge or model}
    return Reader(sft, tiny.tokenizer(), scorers, temperature, length, rows=3, decode_rows=8)


def rewrite(layout, upstream, change, name="eval"):
    """A file of prompts of its own: `change` maps rows to rows."""
    if layout.artifact("pack").is_symlink():
        layout.artifact("pack").unlink()
        shutil.copytree(upstream.artifact("pack"), layout.artifact("pack"))
    path = layout.artifact("pack", "prompts", f"{name}.parquet")
    table = parquet.read_table(path)
    parquet.write_table(table.from_pylist(change(table.to_pylist()), table.schema), path)


def card_of(layout):
    return json.loads(layout.artifact("policy_eval", "card.json").read_text())


def test_the_stage(upstream, tmp_path):
    layouts = [project(upstream, tmp_path / name) for name in "ab"]
    found = [run(tiny.params(), layout).metrics for layout in layouts]
    assert found[0] == found[1]
    first, second = (tiny.digests(layout.artifact("policy_eval")) for layout in layouts)
    assert first == second and set(first) == {"card.json", "card.md", "samples.md"}
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
    assert metrics["kl_nats"] == pytest.approx(0, abs=1e-5)
    for way in ("greedy", "sampled"):
        assert card[way]["sft"] == card[way]["ppo"] and card[way]["score"]["interval"] == [0, 0]


def test_the_monitor_sees_what_the_card_says(upstream, tmp_path):
    """Scores in standard deviations, the judge's own; KL and samples of the card; SFT's KL to itself is 0."""
    layout = project(upstream, tmp_path)
    metrics, card = run(tiny.params(), layout).metrics, card_of(layout)
    found = card["monitor"]
    sft, ppo = (found["measures"][name] for name in ("sft", "ppo"))
    for name, said in (("sft", sft), ("ppo", ppo)):
        own = card["sampled"][name]
        assert said["proxy"] == pytest.approx((own["score"] - 0.5) / 2)
        assert said["tokens"] == pytest.approx(own["response_tokens"])
        for key in ("eos_rate", "distinct_2", "repetition_3"):
            assert said[key] == pytest.approx(own[key])
    assert sft["kl_nats"] == 0 and ppo["kl_nats"] == pytest.approx(card["kl_nats"])
    assert metrics["monitor_judge_gain"] == pytest.approx(ppo["judge"] - sft["judge"])
    assert metrics["monitor_proxy_gain"] == pytest.approx(ppo["proxy"] - sft["proxy"])
    assert metrics["monitor_findings"] == len(found["findings"])
    rows, judge = held_out_prompts(upstream, 12), layout.artifact("reward", "judge")
    model = load_causal(layout.artifact("ppo", "model"))
    draw = derive_seed(0, "policy_eval", "samples")
    reward_model = RewardModel.load(judge, tiny.tokenizer())
    judged = reader_of(model, reward_model).answer(model, rows, 2, 1.0, draw)
    assert ppo["judge"] == pytest.approx((judged.scores.mean() + 1) / 4)
    flat = [(row["prompt"], r) for row, own in zip(rows, judged.tokens, strict=True) for r in own]
    each = []
    for prompt, response in flat:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
        each.append(torch.distributions.Categorical(logits=logits).entropy().mean().item())
    assert ppo["entropy_nats"] == pytest.approx(np.mean(each), rel=1e-4)


def test_entropy_is_a_mean_over_the_tokens_of_each_response(upstream):
    """Of uneven lengths, in batches: padding counts for nothing."""
    model = load_causal(upstream.artifact("ppo", "model"))
    flat = [([5, 6, 7], [8, 9, 10, 11]), ([12], [13]), ([14, 15], [16, 17])]
    wanted = []
    for prompt, response in flat:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
        wanted.append(torch.distributions.Categorical(logits=logits).entropy().mean().item())
    for microbatch in (1, 2, 3):
        assert monitor.entropies(model, flat, 0, 1.0, microbatch) == pytest.approx(wanted, rel=1e-4)


def test_findings_are_told_in_the_card_the_page_the_log_and_the_run(upstream, tmp_path, caplog, monkeypatch):
    layout, tags, asked = project(upstream, tmp_path), [], []
    said = {"judge_fall": "the judge fell", "tokens": "length 1 → 9 tokens"}
    monkeypatch.setattr(monitor, "findings_of", lambda *given: asked.append(given) or said)
    monkeypatch.setattr(policy_eval_stage, "log_tag", lambda *tag: tags.append(tag))
    metrics, card = run(tiny.params(ppo={"monitor": {"kl_nats": 7.5}}), layout).metrics, card_of(layout)
    ((before, after, limits),) = asked
    assert not before.kl_nats.any() and after.kl_nats.any() and limits.kl_nats == 7.5
    assert card["monitor"]["findings"] == said and metrics["monitor_findings"] == 2
    assert metrics["champion"] == 0.0
    assert card["champion"]["reasons"][:2] == ["the monitor found judge_fall", "the monitor found tokens"]
    assert tags == [("stackrl.monitor", "the judge fell; length 1 → 9 tokens")]
    assert "policy_eval: the score rose by " in caplog.text and ", but the judge fell; length" in caplog.text
    page = layout.artifact("policy_eval", "samples.md").read_text()
    assert "- **judge_fall**: the judge fell\n- **tokens**: length 1" in page and "Nothing found." not in page
    assert f"Gain and standard error: proxy {card['monitor']['gains']['proxy']['gain']:+.3f} ± " in page


def test_nothing_found_is_said_too(upstream, tmp_path, caplog, monkeypatch):
    layout, tags = project(upstream, tmp_path, ppo="sft"), []
    monkeypatch.setattr(policy_eval_stage, "log_tag", lambda *tag: tags.append(tag))
    assert run(tiny.params(), layout).metrics["monitor_findings"] == 0
    assert tags == [("stackrl.monitor", "nothing found")] and "the score rose" not in caplog.text
    assert "Nothing found." in layout.artifact("policy_eval", "samples.md").read_text()


def test_a_judge_that_is_broken_is_named(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("reward").unlink()
    shutil.copytree(upstream.artifact("reward"), layout.artifact("reward"))
    layout.artifact("reward", "judge", "scores.json").unlink()
    with pytest.raises(ValueError, match=r"^policy_eval: judge: no scores\.json beside"):
        run(tiny.params(), layout)
    shutil.copy(upstream.artifact("reward", "judge", "scores.json"), layout.artifact("reward", "judge"))
    broken = tiny.scorer(seed=2, vocab_size=len(tiny.tokenizer()))
    torch.nn.init.constant_(broken.score.weight, torch.nan)
    broken.save_pretrained(layout.artifact("reward", "judge"))  # our own door lets no such weight out
    with pytest.raises(ValueError, match=r"^artifacts/reward/judge: .*: score\.weight holds a number"):
        run(tiny.params(), layout)


def test_real_sites_have_no_correctness(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    unknown = dict.fromkeys(("expected", "kind", "wording", "misleads", "wrong"))
    rewrite(layout, upstream, lambda rows: [row | unknown for row in rows])
    metrics, card = run(tiny.params(), layout).metrics, card_of(layout)
    assert card["greedy"]["correct"] is None and card["headline"]["part"] == "all"
    assert not any(word in name for name in metrics for word in ("correct", "invented", "silent"))
    assert "headline_judge_gain_low" in metrics and metrics["champion"] in (0, 1)
    assert all("correct" not in reason for reason in card["champion"]["reasons"])


def test_which_prompts_does_not_depend_on_their_order(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    rewrite(layout, upstream, lambda rows: rows[::-1])
    there = held_out_prompts(upstream, 12)
    assert held_out_prompts(layout, 12) == there and len(there) == 12
    assert held_out_prompts(upstream, 5) == there[:5] and len(held_out_prompts(upstream, 10**6)) == 30
    numbers = [row["question_id"] for row in there]
    assert numbers != sorted(numbers)


@pytest.mark.parametrize("name", ["eval", "rl"])
def test_no_prompt_is_named(upstream, tmp_path, name):
    layout = project(upstream, tmp_path)
    rewrite(layout, upstream, lambda rows: [], name)
    with pytest.raises(ValueError, match=rf"artifacts/pack/prompts/{name}\.parquet holds no prompt"):
        run(tiny.params(), layout)


def test_every_way_to_answer_stands_in_the_card(upstream, tmp_path):
    """Both models greedy and at every temperature, ppo's among them; best of n; both at their best."""
    layout = project(upstream, tmp_path)
    metrics, card = run(tiny.params(), layout).metrics, card_of(layout)
    every = [row for row in card["frontier"] if row["part"] == "all"]
    assert [(row["model"], row["way"]) for row in every] == [
        *((model, way) for model in ("sft", "policy") for way in ("T 1", "T 0.5", "greedy")),
        *(("sft", f"best of {n}") for n in (1, 2, 3)),
    ]
    found = {(row["model"], row["way"]): row for row in every}
    hot = found["sft", "T 1"]
    assert hot["kl"] == 0
    assert hot["score"]["mean"] == pytest.approx(found["sft", "best of 1"]["score"]["mean"])
    assert found["policy", "T 1"]["kl"] == pytest.approx(card["kl_nats"])
    assert found["sft", "T 0.5"]["kl"] > 0 and found["sft", "greedy"]["kl"] > 0
    scores = [found["sft", f"best of {n}"]["score"]["mean"] for n in (1, 2, 3)]
    assert scores == sorted(scores)
    for model in ("sft", "ppo"):
        row = found["policy" if model == "ppo" else model, "greedy"]
        assert row["score"]["mean"] == pytest.approx(card["greedy"]["score"][model])
        assert row["correct"]["mean"] == pytest.approx(card["greedy"]["correct"]["all"][model])
    head = card["headline"]
    assert head["part"] == "new" and 0 < head["prompts"] < 12 and head["best_of"]["n"] == 3
    assert head["chosen"]["by"] == "judge" and head["chosen"]["prompts"] == 12
    for model in ("sft", "policy"):
        chosen = head["chosen"][model]
        assert chosen["means"][chosen["way"]] == max(chosen["means"].values())
        assert head[model]["way"] == chosen["way"]
        assert metrics[f"headline_score_{model}"] == head[model]["score"]["mean"]
        assert metrics[f"headline_kl_{model}"] == head[model]["kl"]
    assert metrics["headline_judge_gain"] == head["gain"]["judge"]["gain"]
    assert metrics["champion"] == float(card["champion"]["is_champion"])
    assert (tmp_path / "reports/policy_eval/frontier.png").is_file()


def test_without_a_judge_the_score_chooses_and_nobody_is_a_champion(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    for said in ({}, {"judge": {}}, {"judge": {"is_judge": True}}):
        write_json(layout.artifact("reward_eval", "card.json"), said)
        assert may_judge(layout), "a card that does not deny it"
    write_json(layout.artifact("reward_eval", "card.json"), {"judge": {"is_judge": False}})
    assert run(tiny.params(), layout).metrics["champion"] == 0.0
    card = card_of(layout)
    assert card["headline"]["chosen"]["by"] == "score"
    assert "chosen by the score on 12 training" in layout.artifact("policy_eval", "card.md").read_text()
    assert any("may not be called one" in reason for reason in card["champion"]["reasons"])


def test_a_card_of_the_reward_model_that_is_no_json_is_named(upstream, tmp_path):
    layout = project(upstream, tmp_path)
    layout.artifact("reward_eval", "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"reward_eval/card\.json: .*`dvc repro reward_eval`"):
        run(tiny.params(), layout)


def test_temperatures_are_those_asked_for_and_ppos_own():
    asked = tiny.params(policy_eval={"temperatures": [0.2, 1.5]})
    assert temperatures_of(asked) == [1.5, 1.0, 0.2, None]
    assert temperatures_of(Params()) == [1.0, 0.7, 0.4, 0.2, None]


def test_answers_belong_to_their_prompts(upstream):
    """K samples of one prompt stand side by side, texts and scores with them; greedy is one and the same."""
    model = load_causal(upstream.artifact("sft", "model"))
    scorer, other = (tiny.scorer(seed=seed, vocab_size=len(tiny.tokenizer())) for seed in (1, 2))
    reader = reader_of(model, *map(tiny.reward_model, (scorer, other)))
    rows = held_out_prompts(upstream, 4)
    found = reader.answer(model, rows, 3, 1.0, 5)
    assert found.scores.shape == (4, 3) and [len(t) for t in found.tokens] == [3] * 4
    for i, row in enumerate(rows):
        for k, (response, text) in enumerate(zip(found.tokens[i], found.texts[i], strict=True)):
            assert text == tiny.tokenizer().decode(response, skip_special_tokens=True)
            for each, read in ((scorer, found.scores), (other, found.judged)):
                with torch.no_grad():
                    wanted = each(torch.tensor([[*row["prompt"], *response]])).logits.item()
                assert read[i, k] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    again = reader_of(model, tiny.reward_model(scorer)).answer(model, rows, 3, 1.0, 5)
    assert again.tokens == found.tokens
    assert reader.answer(model, rows, 3, 1.0, 6).tokens != found.tokens
    greedy = reader.answer(model, rows, 2, None, 5)
    assert all(one == two for one, two in greedy.tokens)
    both = joined(found, greedy)
    assert both.first(3).tokens == found.tokens and both.texts[1] == found.texts[1] + greedy.texts[1]
    assert (both.scores[:, 3:] == greedy.scores).all() and (both.first(3).kl_nats == found.kl_nats).all()


def test_each_distinct_response_is_read_once(upstream, monkeypatch):
    """Greedy and cold samples say the same again and again."""
    model = load_causal(upstream.artifact("sft", "model"))
    scorer = tiny.reward_model(tiny.scorer(seed=1, vocab_size=len(tiny.tokenizer())))
    reader, rows, asked = reader_of(model, scorer), held_out_prompts(upstream, 4), []
    score = RewardModel.score

    def spy(self, prompts, *given, **keys):
        asked.append(len(prompts))
        return score(self, prompts, *given, **keys)

    monkeypatch.setattr(RewardModel, "score", spy)
    reader.answer(model, rows, 5, None, 0)
    assert asked == [4, 4], "model and judge, four prompts"
    reader.answer(model, rows, 2, None, 0)
    assert len(asked) == 2


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.7, 0.4, None])
def test_kl_by_the_definition(upstream, temperature):
    """Log-ratio of the policy as it samples to SFT at the base temperature; a greedy response is certain."""
    sft, ppo = (load_causal(upstream.artifact(stage, "model")) for stage in ("sft", "ppo"))
    scorer = tiny.reward_model(tiny.scorer(vocab_size=len(tiny.tokenizer())))
    rows = held_out_prompts(upstream, 3)
    found = reader_of(sft, scorer, temperature=0.7).answer(ppo, rows, 2, temperature, 1)
    wanted = []
    for row, own in zip(rows, found.tokens, strict=True):
        for response in own:
            ids = torch.tensor([[*row["prompt"], *response]])
            before = slice(len(row["prompt"]) - 1, ids.shape[1] - 1)
            s = (sft(ids).logits[0, before] / 0.7).log_softmax(-1)[range(len(response)), response].sum()
            p = (ppo(ids).logits[0, before] / (temperature or 1)).log_softmax(-1)
            p = p[range(len(response)), response].sum() if temperature else 0
            wanted.append(p - s)
    assert tiny.far(found.kl_nats.ravel(), torch.stack(wanted)) < 1e-4


def test_scores_that_are_not_finite_are_an_error(upstream):
    model = load_causal(upstream.artifact("sft", "model"))
    judge = tiny.reward_model(tiny.scorer(vocab_size=len(tiny.tokenizer())))
    torch.nn.init.constant_(judge.model.score.weight, torch.nan)
    with pytest.raises(ValueError, match=r"scores that are not finite, first to a response to \S+/\d+$"):
        reader_of(model, judge).answer(model, held_out_prompts(upstream, 2), 1, None, 0)


class Recorded:
    """A section that remembers which of its keys were read."""

    def __init__(self, section) -> None:
        self.section, self.read = section, set()

    def __getattr__(self, name: str):
        self.read.add(name)
        return getattr(self.section, name)


def test_what_the_monitor_reads_is_tracked():
    """A run whose target alone changes is judged anew."""
    steady = Look(
        **{name: np.zeros(2) for name in ("proxy", "kl_nats", "tokens", "eos_rate", "repetition_3")},
        code_fence_rate=np.zeros(2), entropy_nats=np.zeros(2), distinct_2=0.5, judge=np.zeros(2),
    )  # fmt: skip
    root, section = Path(__file__).parents[2], Recorded(PPOParams(select="best", kl_budget_nats=1.0))
    monitor.watch(steady, steady, section)
    assert {f"ppo.{key}" for key in section.read} <= set(Layout(root, root).tracked("policy_eval"))
