"""The interface of TRL 0.11: its quickstart, its arguments, its errors, and what it got wrong."""

from __future__ import annotations

import random
import re
from pathlib import Path

import made_trainers
import numpy
import pytest
import tiny
import torch
from made_trainers import batch, first_gradients, is_still, trainer, weights
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.sampling.generation import row_seeds
from tasks.ppo import LengthSampler, PPOConfig, PPOTrainer

QUICKSTART = """
# 0. imports
import torch
from transformers import GPT2Tokenizer
from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer
# 1. load a pretrained model
model = AutoModelForCausalLMWithValueHead.from_pretrained("gpt2")
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained("gpt2")
tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
tokenizer.pad_token = tokenizer.eos_token
# 2. initialize trainer
ppo_config = {"mini_batch_size": 1, "batch_size": 1}
config = PPOConfig(**ppo_config)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer)
# 3. encode a query
query_txt = "This morning I went to the "
query_tensor = tokenizer.encode(query_txt, return_tensors="pt").to(model.pretrained_model.device)
# 4. generate model response
generation_kwargs = {
"min_length": -1,
"top_k": 0.0,
"top_p": 1.0,
"do_sample": True,
"pad_token_id": tokenizer.eos_token_id,
"max_new_tokens": 20,
}
response_tensor = ppo_trainer.generate(
[item for item in query_tensor], return_prompt=False, **generation_kwargs)
response_txt = tokenizer.decode(response_tensor[0])
# 5. define a reward for response
# (this could be any reward such as human feedback or output from another model)
reward = [torch.tensor(1.0, device=model.pretrained_model.device)]
# 6. train model with ppo
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
model.save_pretrained("my-fine-tuned-model-ppo")
from transformers import AutoModelForCausalLM
again = AutoModelForCausalLM.from_pretrained("my-fine-tuned-model-ppo")
model = AutoModelForCausalLMWithValueHead.from_pretrained("my-fine-tuned-model-ppo")
"""


def test_the_quickstart_of_trl_runs(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer()
    tiny.save(tiny.causal("gpt2", vocab_size=len(tokenizer)), tmp_path / "gpt2", tokenizer)
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(compile(QUICKSTART, "quickstart", "exec"), known)
    stats = known["train_stats"]
    assert isinstance(known["response_txt"], str) and 1 <= len(known["response_tensor"][0]) <= 20
    assert stats["ppo/mean_scores"] == 1 and stats["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert known["model"].v_head.summary.weight.any(), "it was saved, and came back"
    for name, value in known["again"].state_dict().items():
        assert torch.equal(value, known["model"].pretrained_model.state_dict()[name])


# ---- generate


def queries(*lengths, seed=3):
    return [torch.tensor(ids) for ids in tiny.drawn(lengths, seed)]


def test_what_generate_gives_back():
    asked, keys = queries(3, 5, 1), {"max_new_tokens": 5, "eos_token_id": -1}
    with_prompt = trainer().generate(asked, **keys)
    without = trainer().generate(asked, return_prompt=False, **keys)
    assert [len(r) for r in without] == [5, 5, 5]
    for query, whole, response in zip(asked, with_prompt, without, strict=True):
        assert torch.equal(whole, torch.cat([query, response]))
    one = trainer().generate(asked[0], return_prompt=False, **keys)
    assert one.shape == (1, 5) and torch.equal(one[0], without[0]), "a row of its own is the row of a batch"


def test_a_response_ends_with_the_first_eos_and_a_prompt_may_hold_one():
    """TRL 0.11 cuts at the first eos of the whole text, the prompt's too."""
    made = trainer()
    asked = [torch.tensor([tiny.EOS, 5, 6])] * 200
    for whole in made.generate(asked, max_new_tokens=6):
        response = whole[3:].tolist()
        assert whole[:3].tolist() == [tiny.EOS, 5, 6] and response
        assert tiny.EOS not in response[:-1] and (len(response) == 6 or response[-1] == tiny.EOS)


def test_each_call_draws_anew_and_a_resumed_trainer_draws_the_same():
    made, asked = trainer(), queries(3, 4)
    first, second = (made.generate(asked, max_new_tokens=6) for _ in range(2))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.shape == b.shape) or [
        len(a) for a in first
    ] != [len(b) for b in second]
    other = trainer()
    other.generate(asked)
    resumed = trainer()
    resumed.load_state_dict(other.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.generate(asked, max_new_tokens=6), second, strict=True)
    )


def test_the_batch_changes_no_response():
    asked = queries(3, 5, 1, 7, 2)
    found = [trainer().generate(asked, batch_size=size, max_new_tokens=6) for size in (1, 2, 5)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_length_sampler_gives_each_row_its_length():
    lengths = iter([2, 5, 1])
    found = trainer().generate(
        queries(3, 3, 3), length_sampler=lambda: next(lengths), return_prompt=False, eos_token_id=-1
    )
    assert [len(r) for r in found] == [2, 5, 1]


def test_lengths_are_drawn_between_both_bounds():
    """TRL's never gives the upper one, and draws from numpy's global numbers."""
    state = random.getstate()
    found = [[sampler() for _ in range(200)] for sampler in (LengthSampler(2, 4), LengthSampler(2, 4))]
    assert set(found[0]) == {2, 3, 4} and found[0] == found[1] and random.getstate() == state
    assert found[0] != [sampler() for sampler in [LengthSampler(2, 4, seed=1)] * 200]
    assert LengthSampler(3, 3)() == 3
    for low, high in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=rf"LengthSampler: min_value {low}, max_value {high}"):
            LengthSampler(low, high)


def test_greedy_is_not_sampled():
    made, asked = trainer(), queries(4)
    found = [made.generate(asked, do_sample=False, max_new_tokens=5, eos_token_id=-1)[0] for _ in range(2)]
    wanted = made.model.generate(asked[0][None], do_sample=False, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], wanted[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0.7}, r"temperature is 0\.7, but .* ppo\.temperature, 1\.0"),
        ({"num_beams": 4}, "num_beams=4 is not known"),
        ({"max_length": 20}, "give max_new_tokens; max_length counts the prompt"),
        ({"min_length": 4}, "give min_new_tokens"),
        ({"eos_token_id": []}, "eos_token_id must be a token or several, not"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token or several, not '</s>'"),
        ({"max_new_tokens": 0}, "at least one new token, not 0"),
        (
            {"max_new_tokens": 70},
            r"query_tensor\[0\] has 3 tokens and may get 70 more; the model has room for 64",
        ),
        ({"length_sampler": lambda: 0}, "at least one new token, not 0"),
    ],
)
def test_what_generate_refuses(keys, message):
    made = trainer()
    with pytest.raises(ValueError, match=message):
        made.generate(queries(3), **keys)
    assert made.draws == 0


def test_what_generate_refuses_of_prompts():
    for wrong, message in (
        ([torch.tensor([[5, 6]])], r"query_tensor\[0\] must hold token ids, shape \[tokens\]"),
        (torch.tensor([[5, 6]]), r"query_tensor\[0\] must hold token ids"),
        ([torch.tensor([5]), torch.tensor([], dtype=torch.long)], r"query_tensor\[1\] is empty"),
        ([], "query_tensor is empty; generate needs at least one prompt"),
        ("What?", "query_tensor must be a list of token rows, not str"),
        (["What?"], r"query_tensor\[0\] must be a list or tensor of token ids, not str"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer().generate(wrong)


def test_sampling_another_distribution_is_said(caplog):
    trainer().generate(queries(3), top_k=5)
    assert "KL may become negative" in caplog.text


def test_global_random_numbers_are_left_alone():
    """TRL 0.11 seeds all three in its constructor; its generate draws from torch's."""
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    policy, reference = tiny.causal(), tiny.causal()
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    made = trainer(given={"model": AutoModelForCausalLMWithValueHead(policy), "ref_model": reference})
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    made.generate(queries(3, 4))
    made.step(*batch())
    PPOTrainer(made.config, made.model, reference, tiny.SPECIAL, device="cpu")
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_rollouts_and_updates_are_without_dropout():
    """TRL 0.11 leaves the model in training mode after its first step."""
    made, asked = trainer("gpt2", model_keys=made_trainers.DROPOUT), queries(3, 4, 5)
    made.step(*batch())
    seeds = row_seeds(1, 3)
    found = [made.sample([q.tolist() for q in asked], seeds).lists() for _ in range(2)]
    assert found[0] == found[1] and not any(m.training for m in made.model.modules())


# ---- adapters


def adapted(**keys):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.3)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.causal(), peft_config=lora)
    return trainer(given={"model": policy, "ref_model": None}, **keys)


def test_under_an_adapter_the_reference_is_the_model_without_it():
    """TRL 0.11 gives the policy's text as the reference's."""
    made, asked = adapted(), queries(3, 4, 2, 5)
    start = weights(made)
    for number in range(3):
        stats = made.step(*batch(seed=number))
    assert stats["objective/kl"] != pytest.approx(0, abs=1e-4)
    moved = {n for n, v in made.model.state_dict().items() if not torch.equal(v, start[n])}
    assert moved and all("lora" in name or "v_head" in name for name in moved)
    prompts, responses, _ = batch()
    plain = trainer()
    wanted = plain.observe(prompts, responses).logprobs
    assert tiny.far(made.observe(prompts, responses).ref_logprobs, wanted) < 1e-5
    keys = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    own, reference = made.generate(asked, generate_ref_response=True, **keys)
    assert all(torch.equal(a, b) for a, b in zip(reference, plain.generate(asked, **keys), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(own, reference, strict=True))


def test_a_reference_response_has_the_same_random_numbers():
    made, asked = trainer(), queries(3, 4)
    own, reference = made.generate(asked, generate_ref_response=True, max_new_tokens=6)
    assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True)), "the two are one model yet"
    one = made.generate(asked[0], generate_ref_response=True, max_new_tokens=6)
    assert len(one) == 2 and one[0].shape[0] == 1


def test_shared_layers_are_frozen_and_shared():
    made = trainer(given={"ref_model": None, "num_shared_layers": 1})
    start = weights(made)
    made.step(*batch())
    layers = made.model.pretrained_model.model.layers, made.ref_model.pretrained_model.model.layers
    for position, is_shared in ((0, True), (1, False)):
        own, other = (each[position].mlp.up_proj.weight for each in layers)
        assert (own.data_ptr() == other.data_ptr()) is is_shared
        name = f"pretrained_model.model.layers.{position}.mlp.up_proj.weight"
        assert torch.equal(own, start[name]) is is_shared and torch.equal(other, start[name])


# ---- what else a caller may give


def test_a_callers_optimizer_and_scheduler():
    policy = AutoModelForCausalLMWithValueHead(tiny.causal())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    made = trainer(given={"model": policy, "optimizer": optimizer, "lr_scheduler": scheduler})
    assert made.optimizer is optimizer
    rates = [made.step(*batch(seed=n))["ppo/learning_rate"] for n in range(3)]
    assert rates == pytest.approx([0.5, 0.45, 0.405])


def test_a_dataset_is_served_in_whole_batches():
    rows = [{"input_ids": [n]} for n in range(20)]
    made = trainer(
        given={"dataset": rows, "data_collator": lambda found: {"input_ids": [r["input_ids"] for r in found]}}
    )
    found = [b["input_ids"] for b in made.dataloader]
    assert [len(b) for b in found] == [8, 8] and len({ids[0] for b in found for ids in b}) == 16
    assert trainer().dataloader is None
    assert list(trainer(given={"dataset": rows[:7]}).dataloader) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tokenizer": type("T", (), {"eos_token_id": 1, "pad_token_id": None})},
            "tokenizer: it has no pad_token_id",
        ),
        (
            {"tokenizer": type("T", (), {"eos_token_id": None, "pad_token_id": 0})},
            "tokenizer: it has no eos_token_id",
        ),
        (
            {"ref_model": tiny.causal(vocab_size=40)},
            "ref_model has a vocabulary of 40 tokens, the model one of 32",
        ),
        ({"ref_model": "gpt2"}, "ref_model must be a language model, not str"),
        ({"ref_model": tiny.scorer()}, "must be a language model, not LlamaForSequenceClassification"),
        ({"ref_model": torch.nn.Linear(1, 1)}, "must be a language model, not Linear"),
        (
            {"optimizer": torch.optim.SGD(tiny.causal().parameters())},
            "optimizer holds none of the model's parameters",
        ),
        ({"optimizer": torch.optim.SGD}, "optimizer holds none of the model's parameters"),
    ],
)
def test_what_the_constructor_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        trainer(given=given)


def test_what_the_constructor_refuses_of_models():
    with pytest.raises(ValueError, match="microbatch_rows is 0; a forward takes at least one row"):
        trainer(microbatch_rows=0)
    with pytest.raises(ValueError, match=r"model must be an AutoModelForCausalLM.*, not LlamaForCausalLM"):
        PPOTrainer(PPOConfig(), tiny.causal(), None, tiny.SPECIAL)
    model = AutoModelForCausalLMWithValueHead(tiny.causal())
    for own in (model, model.pretrained_model):  # the second is the same weights without their head
        with pytest.raises(ValueError, match="ref_model is the model itself"):
            PPOTrainer(PPOConfig(), model, own, tiny.SPECIAL)
    with pytest.raises(ValueError, match="config must be a PPOConfig, not dict"):
        PPOTrainer({}, model, None, tiny.SPECIAL)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, 5, "queries must hold 8 rows; it is 5"),
        (2, 3.0, r"scores must hold 8 rows; it is 3\.0"),
        (2, torch.tensor(1.0), r"scores must hold 8 rows; it is tensor\(1"),
        (3, 1.0, r"response_masks must hold 8 rows; it is 1\.0"),
        (0, [[5]] * 7, "queries holds 7 rows; a step takes 8"),
        (0, [[5]] * 7 + [[1.5]], r"queries\[7\] must hold token ids, .* it is \[1\.5\]"),
        (1, [[5], ["a"]] + [[5]] * 6, r"responses\[1\] must hold token ids, .* it is \['a'\]"),
        (0, [[[5, 6]]] + [[5]] * 7, r"queries\[0\] must hold token ids"),
        (0, [[5, None]] + [[5]] * 7, r"queries\[0\] must hold token ids"),
        (0, [torch.tensor([True])] + [[5]] * 7, r"queries\[0\] must hold token ids, .* torch\.bool"),
        (0, [torch.tensor(5)] + [[5]] * 7, r"queries\[0\] must hold token ids, .* it is \(\) torch\.int64"),
        (1, [[5]] * 7 + ["a"], r"responses\[7\] must be a list or tensor of token ids, not str"),
        (3, [None] * 8, r"response_masks\[0\] must hold 0 or 1 for each of the"),
        (3, ["ab"] * 8, r"response_masks\[0\] must hold 0 or 1"),
        (2, [0.0] * 7 + [float("nan")], r"scores\[7\] is not finite: nan"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_nothing_moves(place, wrong, message):
    made, given = trainer(), [*batch(), None]
    start = weights(made)
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        made.step(*given)
    assert is_still(made, start) and made.updates == 0 and not made.optimizer.state


@pytest.mark.parametrize("kind", ["llama", "bloom"])  # without padding, and with it
@pytest.mark.parametrize("pad_id", [-1, 32])
def test_a_pad_token_that_the_model_has_not_is_never_read(kind, pad_id):
    special = type("T", (), {"eos_token_id": tiny.EOS, "pad_token_id": pad_id})
    prompts, responses, _ = batch()
    found, wanted = (trainer(kind, given=g).observe(prompts, responses) for g in ({"tokenizer": special}, {}))
    assert tiny.far(found.logprobs, wanted.logprobs) < 1e-6


def test_rewards_of_tokens_stay_as_they_came():
    """The penalty of a missing eos is taken from a copy."""
    prompts, responses, _ = batch()
    given = [torch.zeros(len(r)) for r in responses]
    stats = trainer(missing_eos_penalty=2.0).step(prompts, responses, given)
    assert stats["ppo/mean_scores"] < -0.5 and not any(row.any() for row in given)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 6, "mini_batch_size": 4}, "must be a multiple of ppo.mini_batch_size"),
        (
            {"batch_size": 6, "mini_batch_size": 3, "samples_per_prompt": 4},
            "multiple of ppo.samples_per_prompt",
        ),
        ({"kl_in": "loss"}, "kl cannot be paid in the loss"),
        ({"kl_in": "loss", "kl_penalty": "full"}, "full cannot be paid in the loss"),
        ({"use_score_norm": True}, "needs ppo.use_score_scaling"),
    ],
)
def test_what_the_configuration_refuses(keys, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**keys)


# ---- tracking and keeping


def test_mlflow_really_gets_them(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    made = trainer(log_with="mlflow")
    with mlflow.start_run() as run:
        made.log_stats(made.step(*batch()), {"query": ["a"] * 8, "response": ["b"] * 8}, torch.ones(8))
    mlflow.set_tracking_uri(None)
    found = mlflow.MlflowClient(f"sqlite:///{tmp_path}/m.db").get_run(run.info.run_id).data.metrics
    assert found["env/reward_mean"] == 1 and "ppo/loss/policy" in found


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("tasks.run.tracking.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log_with is wandb, which is not installed"):
        trainer(log_with="wandb")


def test_what_is_saved_loads_with_plain_transformers(tmp_path):
    made = trainer(given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330})
    made.step(*batch())
    made.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(v, made.model.pretrained_model.state_dict()[n]) for n, v in plain.state_dict().items()
    )
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.fixture
def hub(monkeypatch):
    """What is pushed: where to, with which arguments, and the files."""
    pushed = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, name, private=None, exist_ok=False):
            return type("Repo", (), {"repo_id": f"me/{name.split('/')[-1]}"})

        def upload_folder(self, repo_id, folder_path, **keys):
            pushed.append((repo_id, keys, {path.name for path in Path(folder_path).iterdir()}))
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return pushed


def test_the_hub_gets_model_head_tokenizer_and_card_in_one_commit(hub, tmp_path):
    made = trainer(given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330})
    assert made.push_to_hub("policy", branch="b", private=True) == "commit"
    where, keys, files = hub[0]
    assert where == "me/policy" and keys["revision"] == "b"
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json", "README.md"} <= files
    assert made.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="m") == "commit"
    assert hub[1][0] == "me/mine" and not (tmp_path / "mine" / "README.md").exists()
    with pytest.raises(
        ValueError, match="save_pretrained: private says how to push, and push_to_hub is not set"
    ):
        made.save_pretrained(tmp_path, private=True)


def test_the_best_is_pushed(hub):
    keys = {"push_to_hub_if_best_kwargs": {"repo_id": "policy"}, "compare_steps": 2}
    made = trainer(given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330}, **keys)
    prompts, responses, _ = batch()
    for score in (1.0, 9.0, 0.5, 9.0, 2.0):  # looked at: 1, 0.5, 2
        made.step(prompts, responses, torch.full((8,), score))
    assert len(hub) == 2 and float(made.highest_reward) == 2
    other = trainer(given={"tokenizer": tiny.tokenizer()}, model_keys={"vocab_size": 330}, **keys)
    other.load_state_dict(made.state_dict())
    assert other.compare_step == 5 and float(other.highest_reward) == 2
    with pytest.raises(ValueError, match=r"ppo\.push_to_hub_if_best_kwargs: it has no repo_id"):
        trainer(push_to_hub_if_best_kwargs={"private": True})


# ---- rewards of other kinds


def test_a_reward_on_the_last_token_alone_is_a_score():
    prompts, responses, scores = batch()
    dense = [torch.cat([torch.zeros(len(r) - 1), s[None]]) for r, s in zip(responses, scores, strict=True)]
    found = first_gradients(step=(prompts, responses, dense))
    assert tiny.far_gradients(found, first_gradients()) < 1e-6


def test_rewards_of_tokens_are_summed_in_the_report():
    prompts, responses, _ = batch()
    stats = trainer().step(prompts, responses, [torch.full((len(r),), 0.5) for r in responses])
    assert stats["ppo/mean_scores"] == pytest.approx(0.5 * sum(map(len, responses)) / 8)
    with pytest.raises(
        ValueError, match="a reward per token is neither scaled, clipped nor given a baseline"
    ):
        trainer(score_clip=1.0).step(prompts, responses, [torch.full((len(r),), 0.5) for r in responses])
    mixed = [torch.zeros(len(r)) for r in responses]
    mixed[next(i for i, r in enumerate(responses) if len(r) > 1)] = torch.tensor(1.0)
    with pytest.raises(
        ValueError, match=r"scores\[\d\] is one number, but other rows have one for each token"
    ):
        trainer().step(prompts, responses, mixed)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, [1.0, -2.0, 4.0]),
        ({"score_baseline": 0.5}, [0.5, -2.5, 3.5]),
        ({"score_clip": 1.5}, [1.0, -1.5, 1.5]),
        ({"missing_eos_penalty": 3.0}, [1.0, -5.0, 1.0]),
        ({"score_clip": 1.5, "missing_eos_penalty": 3.0}, [1.0, -4.5, -1.5]),
        ({"use_score_scaling": True}, [1 / 3, -2 / 3, 4 / 3]),
        ({"use_score_scaling": True, "use_score_norm": True}, [0.0, -1.0, 1.0]),
    ],
)
def test_scores_are_shaped_by_hand(keys, wanted):
    """1, −2, 4: mean 1, standard deviation 3; only the first response ends with eos, the last is empty."""
    made = trainer(batch_size=3, mini_batch_size=3, **keys)
    step = [[5], [6], [7]], [[8, tiny.EOS], [9], []], torch.tensor([1.0, -2.0, 4.0])
    paid = []
    shape = made.shape
    made.shape = lambda *given: paid.append(shape(*given)) or paid[0]
    stats = made.step(*step)
    assert tiny.far(paid[0], wanted) < 1e-5
    assert stats["ppo/mean_scores"] == pytest.approx(sum(wanted) / 3, abs=1e-5)


def test_score_scaling_is_a_running_estimate():
    """TRL 0.11 crashes here."""
    made = trainer(use_score_scaling=True, use_score_norm=True)
    scores = []
    for number in range(3):
        prompts, responses, given = batch(seed=number)
        scores.append(given * 7 + 3)
        made.step(prompts, responses, scores[-1])
    whole = torch.cat(scores)
    assert made.running.mean == pytest.approx(whole.mean().item(), rel=1e-5)
    assert made.running.std == pytest.approx(whole.std().item(), rel=1e-5)
    other = trainer(use_score_scaling=True)
    other.load_state_dict(made.state_dict())
    assert other.running.state_dict() == made.running.state_dict()


# ---- what is learnt from, and what is not


def test_a_masked_tail_is_as_if_it_were_not_there():
    prompts, responses, scores = batch()
    longer = [[*r, 7, 8] for r in responses]
    masks = [torch.tensor([1] * len(r) + [0, 0]) for r in responses]
    found = first_gradients(step=(prompts, longer, scores, masks), missing_eos_penalty=0)
    assert tiny.far_gradients(found, first_gradients()) < 1e-5


def test_a_tools_tokens_are_seen_but_not_learnt():
    """A gap in the mask: neither its KL, its log-probabilities nor its values count."""
    made = trainer(ppo_epochs=1, mini_batch_size=8)
    prompts, _, scores = batch()
    responses = tiny.drawn([6] * 8, 5)
    masks = [[1, 1, 0, 0, 1, 1]] * 8
    seen = made.observe(prompts, responses, masks)
    assert seen.is_action.sum().item() == 32 and seen.sequences.is_response.sum().item() == 48
    stats = made.step(prompts, responses, scores, masks)
    kept = torch.tensor(masks[0], dtype=torch.bool)
    assert stats["objective/entropy"] == pytest.approx(-seen.logprobs[:, kept].sum(1).mean().item(), rel=1e-5)
    assert len(stats["ppo/policy/ratio"]) == 32


def test_an_empty_response_teaches_nothing():
    """TRL 0.11: IndexError."""
    prompts, responses, scores = batch()
    responses[3] = []
    left = [[x for i, x in enumerate(rows) if i != 3] for rows in (prompts, responses, scores)]
    found = first_gradients(step=(prompts, responses, scores), mini_batch_size=8)
    wanted = first_gradients(step=tuple(left), batch_size=7, mini_batch_size=7)
    assert tiny.far_gradients(found, wanted) < 1e-5
    made = trainer()
    start = weights(made)
    stats = made.step(prompts, [[]] * 8, scores)
    assert is_still(made, start) and made.updates == 1 and stats["tokens/responses_len_mean"] == 0


def test_texts_of_an_error_are_whole_sentences():
    """No message of a refusal spans lines: a stage prints one."""
    with pytest.raises(ValueError) as caught:
        trainer().step(*batch(count=7))
    assert not re.search(r"\n|  ", str(caught.value))
