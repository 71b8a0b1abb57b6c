"""The way frozen_style: optima that are optima, the stage twice and after a kill, what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from trainings import Killed
from transformers import AutoModel

from params.load import ParamsError, validate
from tasks import pack, ppo, reward_eval
from tasks.lm.heads.frozen_style import FrozenStyle, features_of
from tasks.lm.heads.reward_model import RewardModel
from tasks.lm.model.loading import load_tokenizer
from tasks.ppo.preflight import preflight
from tasks.reward import frozen, run
from tasks.reward.convex import newton, scaled
from tasks.reward.frozen import fit, pair_weights, read_answers
from tasks.reward.losses import pair_loss
from tasks.run.text_rule import fit_logistic

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BASE = {"layers": 1, "question_tokens": 6, "answer_tokens": 9, "head_ridge": 5.0, "style_ridge": 20.0}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def optimum(*arguments) -> torch.Tensor:
    *_, found = newton(*arguments)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_slope_at_the_optimum_is_0(smoothing):
    x, weights, ahead = drawn(60, 7), drawn(60, seed=1).abs(), 3 * drawn(60, seed=2)
    found = optimum(x, weights, 0.01, ahead, smoothing).requires_grad_()
    loss = weights @ pair_loss(x @ found, torch.zeros(60), ahead, smoothing) + 0.005 * found @ found
    (slope,) = torch.autograd.grad(loss, found)
    assert slope.abs().max() < 1e-9


def test_without_an_offset_it_is_the_report_cards_rule():
    x, weights = drawn(60, 5), drawn(60, seed=1).abs()
    assert optimum(x, weights, 2.0).numpy() == pytest.approx(fit_logistic(x.numpy(), weights.numpy(), 2.0))


def test_a_far_offset_does_not_overshoot():
    """Undamped, Newton's first step from where nearly all pairs are certain leads away from the optimum."""
    x, ahead = torch.cat([torch.ones(9, 1), -torch.ones(1, 1)]).double(), torch.full((10,), -12.0).double()
    found = list(newton(x, torch.ones(10).double(), 1e-6, ahead))
    assert len(found) < 50 and found[-1].isfinite().all() and (found[-1] > 5).all()


@pytest.fixture
def learning(monkeypatch):
    """The benchmark that docs/learning.md was made by."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning_models
    import learning_world

    yield SimpleNamespace(models=learning_models, world=learning_world)
    for name in ("learning_models", "learning_world"):
        sys.modules.pop(name, None)


HOW = {"weigh": "question", "margin": 0.3, "smoothing": 0.1, "gap_weight": 0.5}
REWARD = {"weigh": "question", "margin": 0.3, "label_smoothing": 0.1, "gap_weight": 0.5}


def made_group(n: int) -> dict:
    """A question with three answers, the first the best, the second the worst."""
    texts = [" ".join(["It is.", "so", f"`{n}`"] * (1 + (n * k + k) % 5)) for k in range(3)]
    known = {"tokens": [1], "characters": 9, "has_code": False, "created": ""}
    scores = 4 + n % 3, 1, 2 + n % 2
    answers = [{"id": k, "text": texts[k], "score": scores[k], **known} for k in range(3)]
    asked = {"site": "s", "question_id": n, "question": f"What is {n}?", "prompt": [1]}
    pairs = [[0, 1], [2, 1]][: 1 + n % 2]
    return {**asked, "answers": answers, "pairs": pairs, "weights": [1.0] * len(pairs)}


@pytest.mark.parametrize(("how", "reward"), [({}, {}), (HOW, REWARD)])
def test_the_numbers_of_the_benchmark(learning, tmp_path, how, reward):
    """Of the same rows and states; its states are centred, so that scores differ by a number."""
    groups = [made_group(n) for n in range(30)]
    train = frozen._laid_out(groups)
    states, features = drawn(90, 6, seed=4).float().double(), features_of(train.questions, train.texts)
    save_file({"mean": states.float()}, tmp_path / "mean.safetensors")
    laid = learning.world.lay_out(groups, np.zeros(90))
    split, ahead = np.array(["reward"] * 30), np.zeros((len(laid.pairs), 3))
    gaps = laid.differences(laid.published)
    world = learning.world.World(groups, laid, split, np.zeros((1, 30)), features.numpy(), ahead, gaps)
    job = learning.world.Job("frozen", "eval", 0, learning.world.How(offset="style", **how), ridge=5.0)
    taught = learning.world.lesson(world, np.ones(30, dtype=bool), job.how)
    wanted = learning.models.train_frozen(tmp_path, world, taught, job, np.arange(90))
    ridges = {"frozen_style": {"head_ridge": 5.0}}
    section = tiny.params(reward={"way": "frozen_style", "base": "x", **ridges, **reward}).reward
    weights = pair_weights(train, section)
    assert weights.numpy() == pytest.approx(taught.weights)
    x, scale = scaled(states, train.pairs)
    head = optimum(x, weights, 5.0, torch.tensor(taught.ahead), job.how.smoothing) / scale
    assert np.ptp((states @ head).numpy() - wanted) < 1e-8
    if not how:  # the benchmark's rule on style counts every pair once, whatever `how` says
        *_, (style, head) = fit(train, features, states, section)
        found = (features @ style + states @ head).numpy()
        assert np.ptp(found - wanted - taught.given) < 1e-8 < np.ptp(taught.given)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed data, a policy's tokenizer, and an encoder of other words."""
    layout = tiny.project(tmp_path_factory.mktemp("frozen"), tiny.splits())
    pack.run(tiny.params(), layout)
    tiny.save(tiny.causal(vocab_size=len(tiny.tokenizer())), layout.artifact("sft", "model"))
    known = tiny.encoder_tokenizer()
    tiny.save(tiny.encoder(vocab_size=len(known)), layout.root / "encoder", known)
    return layout


def given(packed, **keys):
    section = {"way": "frozen_style", "base": str(packed.root / "encoder"), "frozen_style": BASE}
    return tiny.params(reward=section | keys)


def test_the_stage_and_its_card(packed, tmp_path):
    """Plain transformers reads the encoder, reward_eval the model; metrics, files, bytes are the stage's."""
    layouts = [tiny.copied(packed, tmp_path / name) for name in "ab"]
    found = [run(given(packed), layout).metrics for layout in layouts]
    first, second = (tiny.digests(layout.artifact("reward")) for layout in layouts)
    assert found[0] == found[1] and first == second
    names = {"model.safetensors", "config.json", "head.json", "scores.json", "tokenizer.json"}
    assert {f"{out}/{name}" for out in ("model", "judge") for name in names} | {"curve.csv"} <= set(first)
    judged = {"judge_steps", "judge_loss", "judge_accuracy"}
    assert set(found[0]) == {"steps", "loss", "accuracy", "score_mean", "score_std", *judged}
    folder = layouts[0].artifact("reward", "model")
    assert len(AutoModel.from_pretrained(folder).encoder.layer) == 1
    _, held = read_answers(layouts[0].artifact("pack", "groups", "reward.parquet"))
    model = RewardModel.load(folder, load_tokenizer(packed.artifact("pack", "tokenizer")))
    scores = model.score_texts(held.questions, held.texts, 3).double()
    saved = json.loads((folder / "scores.json").read_text())
    assert saved["mean"] == found[0]["score_mean"] == pytest.approx(scores.mean().item(), rel=1e-4, abs=1e-5)
    assert found[0]["score_std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
    better, worse = scores[held.pairs[:, 0]], scores[held.pairs[:, 1]]
    assert found[0]["loss"] == pytest.approx(pair_loss(better, worse).mean().item(), rel=1e-4)
    lines = layouts[0].artifact("reward", "curve.csv").read_text().splitlines()
    assert lines[0] == "step,loss,accuracy" and len(lines) == 1 + found[0]["steps"]
    card = reward_eval.run(given(packed), layouts[0]).metrics
    assert 0 <= card["accuracy"] <= 1 and layouts[0].artifact("reward_eval", "card.md").is_file()
    loop, words = ppo.stage.prepare(given(packed), layouts[0])
    responses = loop.trainer.sample(loop.train[:4], range(4)).lists()
    texts = loop.train[:4], responses
    for scores, out in ((loop.reward_fn, "model"), (loop.looks.judge, "judge")):
        place = layouts[0].artifact("reward", out)
        reader, scale = RewardModel.load(place, words), json.loads((place / "scores.json").read_text())
        wanted = (reader.score_texts(*reader.parts(*texts), 9) - scale["mean"]) / scale["std"]
        assert tiny.far(scores(*texts), wanted) <= 1e-4
    preflight(loop.trainer, loop.train, loop.reward_fn)


def test_a_kill_while_reading_goes_on_there(packed, tmp_path, monkeypatch):
    whole, broken = (tiny.copied(packed, tmp_path / name) for name in "ab")
    monkeypatch.setattr(frozen, "ANSWERS_AT_A_TIME", 40)
    wanted, real, read = run(given(packed), whole).metrics, FrozenStyle.means, []

    def counted(self, questions, answers, rows=64):
        if len(read) == 2:
            raise Killed
        read.append(len(answers))
        return real(self, questions, answers, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FrozenStyle, "means", counted)
        run(given(packed), broken)
    read[:] = [0, 0, 0]
    monkeypatch.setattr(FrozenStyle, "means", counted)
    assert run(given(packed), broken).metrics == wanted
    assert tiny.digests(broken.artifact("reward")) == tiny.digests(whole.artifact("reward"))


def test_threads_change_no_bit_of_a_fit():
    x, weights = drawn(4000, 64), torch.ones(4000).double()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with frozen.one_thread():
            found.append(optimum(x, weights, 1.0))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ({"base": ""}, "reward.way is frozen_style, which needs an encoder: name one in reward.base"),
        ({"lora_rank": 4}, "reward.lora_rank is 4, but reward.way is frozen_style, which trains no layer"),
        ({"judge_base": "x"}, "reward.judge_base is x, but .* which reads reward.base for both"),
        ({"judge_style_offset": 0.5}, "reward.judge_style_offset is 0.5, but .* a rule on style of its own"),
        ({"length_offset": 1.0}, "reward.length_offset is 1.0, but .* frozen_style, which knows length"),
        ({"frozen_style": {"layer": 3}}, "reward.frozen_style.layer: no such key; did you mean"),
    ],
)
def test_what_cannot_be_meant_names_the_key(reward, line):
    with pytest.raises(ParamsError, match=line):
        validate({"reward": {"way": "frozen_style", "base": "org/encoder", **reward}})


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ({"frozen_style": BASE | {"layers": 3}}, r"reward\.base: .* has 2 layers, 3 are asked for"),
        ({"frozen_style": BASE | {"answer_tokens": 80}}, r"reward\.frozen_style: .* are 89; .* room for 64"),
        ({"base": "{sft}"}, r"reward\.base: .*: its tokenizer does not put a cls token"),
        ({"base": "{root}/none"}, r"reward\.base: no tokenizer in "),
    ],
)
def test_an_encoder_that_does_not_serve_names_the_key(packed, tmp_path, reward, line):
    places = {"sft": packed.artifact("sft", "model"), "root": packed.root}
    reward = {k: v.format(**places) if isinstance(v, str) else v for k, v in reward.items()}
    with pytest.raises(ValueError, match=line) as caught:
        run(given(packed, **reward), tiny.copied(packed, tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_its_folder_is_no_base_to_train_from(packed, tmp_path):
    layout = tiny.copied(packed, tmp_path / "run")
    run(given(packed), layout)
    base = str(layout.artifact("reward", "model"))
    with pytest.raises(ValueError, match=r"reward\.base: .* was made by reward\.way frozen_style"):
        run(tiny.params(reward={"base": base}), tiny.copied(packed, tmp_path / "other"))


@pytest.mark.skipif("STACKRL_ENCODER" not in os.environ, reason="STACKRL_ENCODER names no encoder")
def test_the_states_of_the_benchmark(learning, tmp_path):
    """Of the encoder that docs/learning.md was measured with; the benchmark keeps states in bfloat16."""
    groups = [{"question": f"How many is {n} and one?\n\n" + "Why? " * n,
               "answers": [{"text": f"It is {n + 1}, `x`. " * (1 + n * k)} for k in range(3)]}
              for n in range(12)]  # fmt: skip
    learning.models.encode(tmp_path, SimpleNamespace(groups=groups))
    wanted = frozen.load_file(tmp_path / "mean.safetensors")["mean"]
    reward = {"way": "frozen_style", "base": os.environ["STACKRL_ENCODER"]}
    model = frozen.load_base(tiny.params(reward=reward).reward, torch.device("cpu"))
    texts = [(g["question"], a["text"]) for g in groups for a in g["answers"]]
    found = model.means(*map(list, zip(*texts, strict=True)))
    assert torch.cosine_similarity(found, wanted).min() > 0.9995
    assert tiny.far(found, wanted) < 0.02
