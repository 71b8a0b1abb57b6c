"""Every setting of the loss: by definition on padded rows, the same in parts and in processes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, product

import pytest
import tiny
import torch
from made_rewards import groups, padded_scores, trainer
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from trainings import FirstGradients, run_in_two

from tasks.reward import NOTHING, GroupedAnswers, RewardConfig
from tasks.reward.losses import length_rule

OPTIONS = {
    "plain": {},
    "question": {"weigh": "question"},
    "margin": {"margin": 0.3},
    "gap_weight": {"gap_weight": 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "centering": {"center_rewards_coefficient": 0.01},
    "length": {"length_offset": 0.7},
    "without_eos": {"without_eos_share": 0.3},
    "all": {
        "weigh": "question", "margin": 0.3, "gap_weight": 0.5, "label_smoothing": 0.1,
        "center_rewards_coefficient": 0.01, "length_offset": 0.7, "without_eos_share": 0.25,
    },
}  # fmt: skip


def some(count: int = 8) -> list[GroupedAnswers]:
    """Weights and gaps on every pair; the last question has one good and one bad answer."""
    found = []
    for n, group in enumerate(groups(count - 1)):
        weights = tuple(0.5 + (n + i) % 3 for i in range(len(group.pairs)))
        gaps = tuple(float(1 + (n + i) % 4) for i in range(len(group.pairs)))
        found.append(replace(group, weights=weights, gaps=gaps))
    good_and_bad = (0, NOTHING), (NOTHING, 1)
    return [*found, GroupedAnswers((3, 4), ((7, 8, 1), (9, 1)), good_and_bad, (1.0, 2.0), (1.0, 1.0))]


def longer(group: GroupedAnswers) -> list[float]:
    """log of how many times as long the better answer of each pair is."""
    sizes = [[len(group.responses[i]) for i in pair if i != NOTHING] for pair in group.pairs]
    return [math.log(size[0] / size[-1]) for size in sizes]


def without_eos(group: GroupedAnswers) -> GroupedAnswers:
    """Cut of it where an answer is more than that."""
    cut = (r[:-1] if len(r) > 1 and r[-1] == tiny.EOS else r for r in group.responses)
    return replace(group, responses=tuple(cut))


def by_definition(model, data, **options) -> torch.Tensor:
    """The loss of one batch, written out over padded rows."""
    power, share = options.get("gap_weight", 0), options.get("label_smoothing", 0)
    gaps = [g for group in data for g in group.gaps]
    mean = sum(g**power for g in gaps) / len(gaps)
    weights = [[w * g**power / mean for w, g in zip(d.weights, d.gaps, strict=True)] for d in data]
    beta = 0.0
    if "length_offset" in options:
        beta = options["length_offset"] * length_rule([*chain(*map(longer, data))], [*chain(*weights)])
    cut, questions = options.get("without_eos_share", 0), []
    chances = (1 - cut) ** 2, (1 - cut) * cut, cut * (1 - cut), cut**2
    read = padded_scores(model, data), padded_scores(model, [without_eos(group) for group in data])
    for group, whole, short, of_pairs in zip(data, *read, weights, strict=True):
        losses = []
        for (b, w), weight, gap, length in zip(group.pairs, of_pairs, group.gaps, longer(group), strict=True):
            for chance, (of_better, of_worse) in zip(chances, product((whole, short), repeat=2), strict=True):
                better = of_better[b] if b != NOTHING else torch.tensor(0.0)
                worse = of_worse[w] if w != NOTHING else torch.tensor(0.0)
                d = better - worse + beta * length - options.get("margin", 0) * gap
                loss = -(1 - share) * logsigmoid(d) - share * logsigmoid(-d)
                loss = loss + options.get("center_rewards_coefficient", 0) * (better + worse) ** 2
                losses.append(weight * chance * loss)
        questions.append(torch.stack(losses).view(-1, 4).sum(1))
    if options.get("weigh") == "question":
        return torch.stack([losses.mean() for losses in questions]).mean()
    return torch.cat(questions).mean()


def first_step(folder, data, **keys) -> tuple[dict, float]:
    """Gradients of the first step, and the loss it logs."""
    seen = FirstGradients()
    once = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    quiet = {"max_grad_norm": 1e9, "optimizer": "adamw", "save_strategy": "no"}
    made = trainer(folder, seen, train=data, **{**once, **quiet, **keys})
    made.train()
    return seen.found, made.state.log_history[0]["loss"]


@pytest.mark.parametrize("name", OPTIONS)
def test_by_definition_and_in_parts(tmp_path, name):
    data, options = some(), OPTIONS[name]
    model = tiny.scorer()
    wanted = by_definition(model, data, **options)
    wanted.backward()
    gradients = tiny.gradients(model)
    ways = [{}, {"microbatch_tokens": 25}, {"microbatch_tokens": 1}]
    ways += [{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "microbatch_tokens": 40}]
    for way in ways:
        found, loss = first_step(tmp_path, data, **options, **way)
        assert tiny.far_gradients(found, gradients) <= 1e-5, way
        assert loss == pytest.approx(wanted.item(), rel=1e-4)  # it is logged to four places


def loss(folder, data, **options) -> float:
    made = trainer(folder, train=data, **options)
    return made.compute_loss(made.model, made.data_collator(made.train_dataset)["parts"][0]).item()


def test_what_does_nothing_changes_nothing(tmp_path):
    data = some()
    plain = loss(tmp_path, data)
    assert loss(tmp_path, data, center_rewards_coefficient=0.0) == plain
    same = [replace(g, gaps=(3.0,) * len(g.pairs)) for g in data]
    assert loss(tmp_path, same, gap_weight=2.0) == pytest.approx(plain, rel=1e-6)
    assert loss(tmp_path, [replace(g, gaps=(0.0,) * len(g.pairs)) for g in data], margin=3.0) == plain
    alike = [replace(g, responses=tuple(r[:1] for r in g.responses)) for g in data if len(g.pairs) == 1]
    single = [g for g in data if len(g.pairs) == 1]
    assert len(single) >= 3
    assert loss(tmp_path, single, weigh="question") == loss(tmp_path, single)
    with pytest.raises(ValueError, match="length_offset"):
        loss(tmp_path, alike, length_offset=1.0)


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_both_readings_on_either_road(tmp_path, kind):
    """In the forest and in padded rows; the whole batch and parts of a question each."""
    model, data = tiny.scorer(kind), some()
    wanted = by_definition(model, data, without_eos_share=0.4)
    wanted.backward()
    gradients = tiny.gradients(model)
    for most in (0, 1):
        keys = {"model": tiny.scorer(kind), "without_eos_share": 0.4, "microbatch_tokens": most}
        found, loss = first_step(tmp_path, data, **keys)
        assert tiny.far_gradients(found, gradients) <= 1e-5
        assert loss == pytest.approx(wanted.item(), rel=1e-4)


def test_a_share_of_1_is_training_on_answers_without_eos(tmp_path):
    data = some()
    always = loss(tmp_path, data, without_eos_share=1.0)
    assert always == pytest.approx(loss(tmp_path, [without_eos(group) for group in data]), rel=1e-5)
    assert abs(always - loss(tmp_path, data)) > 1e-3


def test_a_share_that_nothing_could_follow_is_refused(tmp_path):
    keys = {"without_eos_share": 0.5}
    cut = [without_eos(group) for group in groups(4)]
    only_eos = [replace(cut[0], responses=((tiny.EOS,), *cut[0].responses[1:]))]
    for data in (cut, only_eos):
        with pytest.raises(ValueError, match=r"share is 0\.5, but no answer of train_dataset ends with eos"):
            trainer(tmp_path, train=data, **keys)
    with pytest.raises(ValueError, match="BertForSequenceClassification is an encoder, which reads no eos"):
        trainer(tmp_path, model=tiny.scorer("bert"), **keys)
    with pytest.raises(ValueError, match="without_eos_share is between 0 and 1, not"):
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, without_eos_share=1.5)


@pytest.mark.parametrize("option", ["margin", "gap_weight"])
def test_gaps_are_needed_by_what_uses_them(tmp_path, option):
    data = [some()[0], replace(some()[1], gaps=(), name="s/9")]
    with pytest.raises(ValueError, match="train_dataset, s/9: margin and gap_weight need the gap"):
        trainer(tmp_path, train=data, **{option: 1.0})


def test_each_question_the_same(tmp_path):
    """Three copies of a question's pairs change the mean over pairs, and not that over questions."""
    data = groups(4)
    copied = [replace(data[0], pairs=data[0].pairs * 3), *data[1:]]
    assert loss(tmp_path, copied, weigh="question") == pytest.approx(loss(tmp_path, data, weigh="question"))
    assert abs(loss(tmp_path, copied) - loss(tmp_path, data)) > 1e-3


def test_evaluation_is_plain(tmp_path):
    """Whatever is trained on, held-out loss and accuracy are comparable."""
    data = some()
    plain = trainer(tmp_path, train=data, held=data[:-1]).evaluate()
    assert trainer(tmp_path, train=data, held=data[:-1], **OPTIONS["all"]).evaluate() == plain
    unweighted = [replace(g, weights=()) for g in data[:-1]]
    assert trainer(tmp_path, train=data, held=unweighted).evaluate() == plain


def test_good_and_bad_answers_are_held_out_too(tmp_path):
    made = trainer(tmp_path, held=some()[-1:])
    good, bad = padded_scores(tiny.scorer(), some()[-1:])[0].tolist()
    wanted = (math.log(1 + math.exp(-good)) + math.log(1 + math.exp(bad))) / 2
    found = made.evaluate()
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["eval_accuracy"] == ((good > 0) + (bad < 0)) / 2
    assert found["eval_score_mean"] == pytest.approx((good + bad) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weigh": "answer"}, "weigh is pair or question, not 'answer'"),
        ({"invalid_rows": "keep"}, "invalid_rows is refuse or drop"),
        ({"label_smoothing": 1.0}, r"label_smoothing is at least 0 and below 1\.0"),
        ({"margin": -1.0}, "margin is at least 0"),
        ({"gap_weight": math.nan}, "gap_weight is at least 0"),
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient is at least 0"),
        ({"length_offset": math.inf}, "length_offset is at least 0"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        RewardConfig(output_dir=str(tmp_path), use_cpu=True, **options)


RANK = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
import test_options as t
name, folder = sys.argv[1], Path(sys.argv[2])
seen = t.FirstGradients()
made = t.trainer(folder, seen, train=t.some(), held=t.groups(5), per_device_train_batch_size=4, max_steps=1,
    gradient_accumulation_steps=1, microbatch_tokens=30, max_grad_norm=1e9, optimizer="adamw",
    save_strategy="no", ddp_backend="gloo", **t.way(name))
metrics = made.evaluate()
made.train()
found = {k.removeprefix("module."): v for k, v in seen.found.items()}
found |= {k: t.torch.tensor(v) for k, v in metrics.items() if k != "epoch"}
save_file(found, folder / f"rank-{os.environ['RANK']}.safetensors")
"""


def way(name: str) -> dict:
    """An option, an encoder or an adapter."""
    if name == "adapter":
        return {"peft": LoraConfig(r=2, target_modules="all-linear")}
    return {"model": tiny.scorer(name)} if name == "bert" else OPTIONS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["question", "all", "adapter", "bert"])
def test_two_processes_make_the_whole_batch(tmp_path, name):
    run_in_two(RANK, tmp_path, name, tmp_path, beside=__file__)
    whole, _ = first_step(tmp_path, some(), **way(name))
    metrics = trainer(tmp_path, train=some(), held=groups(5), **way(name)).evaluate()
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        for key in [key for key in found if key.startswith("eval_")]:
            assert found.pop(key).item() == pytest.approx(metrics[key], rel=1e-5)
        assert tiny.far_gradients(found, whole) <= 1e-5
