"""PPOTrainer on encoder-decoders: one update by hand, and what TRL 0.11 got wrong of them."""

from __future__ import annotations

import copy

import made_trainers
import pytest
import tiny
import torch
from made_trainers import far_weights, is_still, weights
from peft import LoraConfig
from seq2seq_models import close, laid_out, model_of, valued
from torch.nn.utils.rnn import pad_sequence

from tasks.lm import AutoModelForSeq2SeqLMWithValueHead
from tasks.lm.attention.forest import has_forest
from tasks.lm.logprobs.responses import read_responses
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.ppo.preflight import preflight
from tasks.run.layout import Refusal

FEW = ["t5", "t5 v1.1", "bart"]


def trainer(name="t5", reference_seed=0, given=None, **keys) -> PPOTrainer:
    """A policy whose critic is not zero; of another seed, the reference is another model."""
    given = {"model": valued(model_of(name)), "ref_model": model_of(name, reference_seed), **(given or {})}
    return made_trainers.trainer(given=given, **keys)


def batch(seed: int = 0):
    """Prompts of which two are one; a one-token response, one that is eos alone, an empty one."""
    prompts, responses, scores = made_trainers.batch(seed=seed)
    return [*prompts[:-1], prompts[0]], [[9], [tiny.EOS], [], *responses[3:]], scores


# ---- one update by hand, on padded tensors


def read(model, prompts, responses, temperature):
    """Log-probabilities and values [B, R] by one padded forward, and which are tokens."""
    rows = [[torch.tensor(r, dtype=torch.long) for r in each] for each in (prompts, responses)]
    source, target = (pad_sequence(each, batch_first=True, padding_value=tiny.PAD) for each in rows)
    seen, mask = (pad_sequence([torch.ones_like(r) for r in each], batch_first=True).bool() for each in rows)
    start = torch.full_like(target[:, :1], model.config.decoder_start_token_id)
    out = model.pretrained_model(
        input_ids=source, attention_mask=seen.long(), output_hidden_states=True,
        decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
    )  # fmt: skip
    logp = (out.logits / temperature).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    return logp, model.v_head.summary(out.decoder_hidden_states[-1])[..., 0], mask


def updated(model, reference, given, config, orders):
    """The update that TRL's formulas make of a batch: the losses of each optimizer step; the model moves."""
    prompts, responses, scores = given
    with torch.no_grad():
        old, old_values, mask = read(model, prompts, responses, config.temperature)
        rewards = -config.init_kl_coef * (old - read(reference, prompts, responses, config.temperature)[0])
    for row, response in enumerate(responses):
        if response:
            rewards[row, len(response) - 1] += scores[row]
    advantages = torch.zeros_like(rewards)
    for row, response in enumerate(responses):
        ahead = 0.0
        for t in reversed(range(len(response))):
            after = old_values[row, t + 1] if t + 1 < len(response) else 0.0
            delta = rewards[row, t] + config.gamma * after - old_values[row, t]
            advantages[row, t] = ahead = delta + config.gamma * config.lam * ahead
    returns, tokens = advantages + old_values, advantages[mask]
    advantages = (advantages - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    optimizer, told = torch.optim.Adam(model.parameters(), config.learning_rate), []
    for order in orders:
        for rows in order.split(config.mini_batch_size):
            chosen = [[each[i] for i in rows.tolist()] for each in (prompts, responses)]
            logp, values, real = read(model, *chosen, config.temperature)
            at = rows, slice(0, real.shape[1])
            ratio, gain = (logp - old[at]).exp(), advantages[at]
            policy = torch.max(-gain * ratio, -gain * ratio.clamp(1 - config.cliprange, 1 + config.cliprange))
            near = old_values[at] + (values - old_values[at]).clamp(
                -config.cliprange_value, config.cliprange_value
            )
            value = 0.5 * torch.max((values - returns[at]) ** 2, (near - returns[at]) ** 2)
            loss = [policy[real].mean(), value[real].mean()]
            optimizer.zero_grad()
            (loss[0] + config.vf_coef * loss[1]).backward()
            optimizer.step()
            told.append([x.item() for x in loss])
    return torch.tensor(told)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("keys", [{}, {"temperature": 0.7, "cliprange": 0.05, "ppo_epochs": 4}])
def test_an_update_by_hand(name, keys):
    made = trainer(name, reference_seed=1, microbatch_rows=3, learning_rate=1e-3, ratio_threshold=1e9, **keys)
    assert has_forest(made.model.pretrained_model) is (name != "bart")
    start, policy, reference = weights(made), valued(model_of(name)), valued(model_of(name, 1))
    wanted = updated(policy, reference, batch(), made.config, list(made._orders()))
    stats = made.step(*batch())
    for key, column in (("ppo/loss/policy", 0), ("ppo/loss/value", 1)):
        assert stats[key] == pytest.approx(wanted[:, column].mean().item(), rel=1e-4, abs=1e-5)
    learnt = [n for n in start if "k_proj.bias" not in n]  # whose gradient is 0, and Adam's step its rounding
    a, b = (
        torch.cat([(w[n] - start[n]).double().flatten() for n in learnt])
        for w in (weights(made), policy.state_dict())
    )
    assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", FEW)
def test_at_the_start_kl_is_zero_and_the_ratio_one(name):
    made = trainer(name, ppo_epochs=1, mini_batch_size=8)
    prompts, responses, scores = batch()
    seen = made.observe(prompts, responses)
    assert seen.kl_nats().abs().max() < 1e-5
    again = read_responses(made.model, seen.sequences, 1.0)[0]
    assert torch.equal((again - seen.logprobs) * seen.is_action, torch.zeros_like(again))
    stats = made.step(prompts, responses, scores)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5) and stats["ppo/policy/clipfrac"] == 0


# ---- where TRL 0.11 is wrong


@pytest.mark.parametrize("name", FEW)
def test_the_first_token_is_trained(name):
    """A batch of one-token responses, eos among them: TRL 0.11 gives IndexError or nothing to learn."""
    made = trainer(name, learning_rate=1e-3)
    start = weights(made)
    prompts, _, scores = batch()
    responses = [[9], [tiny.EOS]] * 4
    scores = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)
    before = made.observe(prompts, responses).logprobs
    assert before.shape == (8, 1) and (before < 0).all()
    for _ in range(3):
        made.step(prompts, responses, scores)
    moved = (made.observe(prompts, responses).logprobs - before)[:, 0]
    assert not is_still(made, start) and moved[0::2].mean() > 0 > moved[1::2].mean()


def test_empty_responses_alone_move_nothing():
    made = trainer()
    start = weights(made)
    prompts, _, scores = batch()
    made.step(prompts, [[]] * 8, scores)
    assert is_still(made, start)


def test_responses_that_hold_the_start_token_are_told_of(caplog):
    """As transformers' own generate gives them; TRL wants them so."""
    made = trainer(learning_rate=1e-9)
    prompts, _, scores = batch()
    made.step(prompts, [[tiny.PAD, 5]] * 7 + [[]], scores)
    assert "every response begins with the decoder's start token, 0" in caplog.text
    caplog.clear()
    made.step(prompts, [[tiny.PAD, 5]] * 7 + [[5]], scores)
    made_trainers.trainer().step(prompts, [[tiny.PAD, 5]] * 8, scores)
    assert "start token" not in caplog.text


# ---- the interface


QUICKSTART = """
import torch
from transformers import AutoTokenizer
from tasks.lm import AutoModelForSeq2SeqLMWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer
model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained("t5")
ref_model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained("t5")
tokenizer = AutoTokenizer.from_pretrained("t5")
config = PPOConfig(**{"mini_batch_size": 1, "batch_size": 1})
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer)
query_tensor = tokenizer.encode("This morning I went to the ", return_tensors="pt")
generation_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 20,
    "pad_token_id": tokenizer.eos_token_id,
}
response_tensor = ppo_trainer.generate(
    [item for item in query_tensor], return_prompt=False, **generation_kwargs)
response_txt = tokenizer.decode(response_tensor[0])
reward = [torch.tensor(1.0, device=model.pretrained_model.device)]
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
ppo_trainer.save_pretrained("my-fine-tuned-model-ppo")
from transformers import AutoModelForSeq2SeqLM
again = AutoModelForSeq2SeqLM.from_pretrained("my-fine-tuned-model-ppo")
"""


def test_the_quickstart_of_trl_runs(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer()
    tiny.save(tiny.seq2seq(vocab_size=len(tokenizer)), tmp_path / "t5", tokenizer)
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(compile(QUICKSTART, "quickstart", "exec"), known)
    stats = known["train_stats"]
    assert isinstance(known["response_txt"], str) and 1 <= len(known["response_tensor"][0]) <= 20
    assert stats["ppo/mean_scores"] == 1 and stats["objective/kl"] == pytest.approx(0, abs=1e-4)
    own = known["model"].pretrained_model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in known["again"].state_dict().items())


@pytest.mark.parametrize("name", FEW)
def test_generate_gives_responses_alone(name):
    """The encoder reads the prompts, so that none stands before a response; nor does the start token."""
    made, asked = trainer(name, reference_seed=1), [torch.tensor(ids) for ids in tiny.drawn((3, 7))]
    keys = {"max_new_tokens": 5, "eos_token_id": -1, "do_sample": False}
    whole, of_reference = made.generate(asked, generate_ref_response=True, **keys)
    assert [len(row) for row in whole] == [5, 5]
    again = made.generate(asked, return_prompt=False, **keys)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    wanted = model_of(name).generate(
        input_ids=asked[0][None], do_sample=False, max_new_tokens=5, eos_token_id=-1,
        forced_bos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    assert whole[0].tolist() == wanted[0, 1:].tolist() != of_reference[0].tolist()
    assert made.generate(asked[0], **keys).shape == (1, 5)


def test_rooms_of_source_and_target():
    made = trainer("bart")
    keys = {"max_new_tokens": 64, "eos_token_id": -1}
    assert made.generate(torch.tensor([5] * 64), **keys).shape == (1, 64)
    for length, most in ((65, 5), (5, 65)):
        message = rf"query_tensor\[0\] has {length} tokens and may get {most} more; .* room for 64 each"
        with pytest.raises(ValueError, match=message):
            made.generate(torch.tensor([5] * length), max_new_tokens=most)
    _, responses, scores = batch()
    with pytest.raises(ValueError, match=r"queries\[2\] and responses\[2\] have 3 \+ 65 tokens; .* 64 each"):
        made.step([[5] * 3] * 8, [*responses[:2], [5] * 65, *responses[3:]], scores)
    start = weights(made)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 65 tokens; the model has room for 64"):
        made.train([[5] * 65], lambda p, r: [0.0] * len(p))
    assert is_still(made, start)


def test_a_reference_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="ref_model is a LlamaForCausalLM, the model a T5For"):
        trainer(given={"ref_model": tiny.causal()})
    with pytest.raises(ValueError, match=r"ref_model is a T5For.*, the model a LlamaForCausalLM"):
        made_trainers.trainer(given={"ref_model": model_of()})


@pytest.mark.parametrize("name", FEW)
def test_an_adapter_alone_is_trained(name):
    lora = LoraConfig(r=2, target_modules="all-linear")
    policy = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model_of(name), peft_config=lora)
    made = trainer(name, given={"model": policy, "ref_model": None}, kl_penalty="full")
    start = weights(made)
    assert made.ref_model is None
    for _ in range(3):
        stats = made.step(*batch())
    moved = {n for n, w in weights(made).items() if not torch.equal(w, start[n])}
    assert moved and all("lora" in n or "v_head" in n for n in moved) and stats["objective/kl"] > 0
    sequences = laid_out(*batch()[:2])
    with made.reference() as below, torch.no_grad():
        found = read_responses(below, sequences, 1.0)[0]
    assert close(found, read_responses(model_of(name), sequences, 1.0)[0])


@pytest.mark.parametrize("name", FEW)
def test_layers_that_policy_and_reference_share(name):
    made = trainer(name, given={"ref_model": None, "num_shared_layers": 1})
    start, sequences = weights(made), laid_out(*batch()[:2])
    for _ in range(3):
        stats = made.step(*batch())
    moved = {n for n, w in weights(made).items() if not torch.equal(w, start[n])}
    assert moved and not any(".encoder." in n or "shared" in n or "embed" in n for n in moved)
    assert not any(".block.0." in n or ".layers.0." in n for n in moved) and stats["objective/kl"] != 0
    found = read_responses(made.ref_model, sequences, 1.0)[0]
    assert close(found, read_responses(model_of(name), sequences, 1.0)[0])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_frozen_trunk_is_read_once_and_changes_nothing(name, k):
    """Encoder and first blocks, remembered or computed in each pass: the same updates; KL starts at 0."""
    ends = []
    for megabytes in (64, 0):
        policy = valued(model_of(name))
        optimizer = torch.optim.SGD(policy.parameters(), 0.01)  # Adam would step along the rounding of zeros
        given = {"model": policy, "ref_model": None, "optimizer": optimizer, "trunk_megabytes": megabytes}
        made = trainer(name, given=given, num_layers_unfrozen=k, kl_penalty="full")
        depth = {"bart": 3}.get(name, 2) - k
        assert made.hydra.depth == depth and made.hydra.is_shared is (depth > 0)
        seen = made.observe(*batch()[:2])
        assert seen.kl_nats().abs().max() < 1e-5 and (seen.trunk is not None) is (megabytes * depth > 0)
        start = weights(made)
        for seed in (0, 1):
            stats = made.step(*batch(seed))
        ends.append((weights(made), [stats[key] for key in ("ppo/loss/total", "objective/kl")]))
    assert far_weights(ends[0][0], ends[1][0], start) <= 1e-4
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4, abs=1e-6)


def test_a_resumed_trainer_makes_the_same_step():
    whole = trainer()
    whole.step(*batch())
    other = trainer()
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    for made in (whole, other):
        made.step(*batch(1))
    assert is_still(whole, weights(other))


# ---- preflight and the loop


PROMPTS = tiny.drawn([3, 1, 9, 20, 1, 7, 4, 4, 12, 2, 5, 30, 6, 8, 10, 11, 2, 3])


def varied(prompts, responses):
    return [float(sum(r)) for r in responses]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_trainer_passes_the_preflight(name, dtype):
    given = {"ref_model": None}
    preflight(trainer(name, given=given, dtype=dtype, temperature=0.8, response_tokens=12), PROMPTS, varied)


def test_the_preflight_finds_a_wrong_reference():
    with pytest.raises(Refusal, match=r"KL\(policy, reference\) is not 0"):
        preflight(trainer(reference_seed=1, response_tokens=12), PROMPTS, varied)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_it_learns(name):
    """Say token 7, whatever is asked: the share of sevens among what is said, in 30 updates."""
    asked = {"batch_size": 32, "mini_batch_size": 16, "updates": 30, "response_tokens": 4, "ppo_epochs": 2,
             "init_kl_coef": 0.01, "adap_kl_ctrl": False, "learning_rate": 1e-2, "max_grad_norm": 1.0,
             "eval_updates": 30, "select": "last", "lam": 0.95, "gamma": 1.0}  # fmt: skip
    policy = AutoModelForSeq2SeqLMWithValueHead(tiny.seq2seq(name))
    config = PPOConfig(**{**made_trainers.CONFIG, **asked})
    made = PPOTrainer(config, policy, None, tiny.SPECIAL, seed=3, device="cpu")
    rewards = lambda prompts, responses: [r.count(7) / 4 for r in responses]  # noqa: E731
    curve = made.train(tiny.drawn([3, 5, 2, 8, 4, 6]), rewards)
    scores = [row["score"] for row in curve.rows]
    assert scores[0] < 0.2 and scores[-1] > 0.8
