"""PPO of an adapter: what learns, what the reference is, what scores, what a checkpoint holds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from adapted import lora, saved_base, saved_policy, saved_scorer
from made_trainers import batch, far_weights, is_still, trainer, weights
from safetensors import safe_open
from torch.optim import SGD, Adam, AdamW

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.responses import response_logprobs
from tasks.lm.numerics.optimizer import MuonAdamW
from tasks.ppo.loop import Loop
from tasks.ppo.reward_functions import from_adapter, from_model, scores_of
from tasks.run import checkpoint

WAYS = ("fresh", "trained on", "stacked")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an SFT adapter and a reward adapter on it, and what plain models say there."""
    root = tmp_path_factory.mktemp("adapters")
    base = saved_base(root / "base")
    sft, scorer = saved_policy(root / "sft", base), saved_scorer(root / "reward", base)
    return SimpleNamespace(root=root, sft=sft, scorer=scorer)


def policy_of(folders, way="fresh"):
    torch.manual_seed(5)
    source = folders.root / ("base" if way == "fresh" else "sft")
    config = None if way == "trained on" else lora()
    return Valued.from_pretrained(source, peft_config=config, reward_adapter=folders.root / "reward")


def made(folders, way="fresh", **keys):
    keys = {"init_kl_coef": 0.5, "mini_batch_size": 8, **keys}
    given = keys.pop("given", {})
    return trainer(given={"model": policy_of(folders, way), "ref_model": None, **given}, **keys)


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_the_reference_is_what_training_began_with(folders, way, kl_penalty):
    """The base, or SFT where an adapter of SFT is there (TRL: the base). Before and after updates."""
    ppo = made(folders, way, kl_penalty=kl_penalty)
    plain = tiny.causal() if way == "fresh" else folders.sft
    prompts, responses, scores = batch()
    wanted = response_logprobs(plain, lay_out(prompts, responses, tiny.PAD, "cpu"), 1.0)
    seen = ppo.observe(prompts, responses)
    assert seen.kl.abs().max() < 1e-6 and tiny.far(seen.ref_logprobs, wanted) < 1e-6
    before = weights(ppo)
    for _ in range(2):
        ppo.step(prompts, responses, scores)
    again = ppo.observe(prompts, responses)
    assert torch.equal(again.ref_logprobs, seen.ref_logprobs)
    assert tiny.far(again.logprobs, wanted) > 1e-3 and again.kl.abs().max() > 1e-3
    changed = {n for n, v in weights(ppo).items() if not torch.equal(v, before[n])}
    adapter = ".policy." if way == "stacked" else ".default."
    assert {n for n in changed if not n.startswith("v_head")} == {n for n in before if adapter in n}
    assert "v_head.summary.weight" in changed


@pytest.mark.parametrize("way", WAYS)
def test_the_references_text(folders, way):
    """TRL gives the policy's."""
    ppo = made(folders, way)
    prompts, responses, scores = batch()
    asked = [torch.tensor(p) for p in prompts]
    keys = {"max_new_tokens": 6, "do_sample": False, "return_prompt": False}
    own, theirs = ppo.generate(asked, generate_ref_response=True, **keys)
    assert all(map(torch.equal, own, theirs))
    for _ in range(3):
        ppo.step(prompts, responses, scores)
    later, still = ppo.generate(asked, generate_ref_response=True, **keys)
    assert all(map(torch.equal, still, theirs)) and not all(map(torch.equal, later, own))


@pytest.mark.parametrize("way", WAYS)
def test_ppo_leaves_the_scores_alone(folders, way):
    """To the bit: base and reward adapter are frozen, and the policy's adapter is off while these score."""
    ppo = made(folders, way)
    prompts, responses, scores = batch()
    tokens = torch.tensor(tiny.drawn([9], seed=4))
    reward_fn = from_adapter(ppo.model, tiny.SPECIAL, rows=3)
    before, of_tokens = reward_fn(prompts, responses), ppo.model.compute_reward_score(tokens)
    assert before.std() > 0.01
    for _ in range(2):
        ppo.step(prompts, responses, scores)
    assert torch.equal(reward_fn(prompts, responses), before)
    assert torch.equal(ppo.model.compute_reward_score(tokens), of_tokens)
    with torch.no_grad():
        wanted = [folders.scorer(input_ids=torch.tensor([p + r])).logits[0, 0]
                  for p, r in zip(prompts, responses, strict=True)]  # fmt: skip
    assert tiny.far(before, torch.stack(wanted)) < 1e-5


def test_a_reward_function_of_an_adapter(folders, tmp_path):
    """As the reward model's own, normalised, of token ids and of texts."""
    scorer = tiny.scorer(vocab_size=len(tiny.tokenizer()))
    base = saved_base(tmp_path / "base", vocab_size=len(tiny.tokenizer()))
    scorer = saved_scorer(tmp_path / "reward", base)
    (tmp_path / "scores.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    policy = Valued.from_pretrained(base, peft_config=lora(), reward_adapter=tmp_path / "reward")
    own = from_adapter(policy, tiny.tokenizer(), scores=tmp_path)
    plain = from_model(scorer, tiny.tokenizer())
    for rollout in (batch()[:2], (["What is 2?", "Who?"], [" Four", " It is me"])):
        found = torch.cat([s.reshape(1) for s in scores_of(own, *rollout)])
        assert tiny.far(found, (plain(*rollout) - 0.5) / 2) < 1e-5
    assert own.reads_tokens
    with pytest.raises(ValueError, match=r"no scores\.json beside"):
        from_adapter(policy, tiny.tokenizer(), scores=tmp_path / "base")
    with pytest.raises(ValueError, match="model has no reward adapter"):
        from_adapter(Valued.from_pretrained(base), tiny.tokenizer())


@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_small_and_resumes_bit_for_bit(folders, way, select, tmp_path):
    keys = {"updates": 3, "eval_updates": 1, "select": select, "kl_budget_nats": 1e3, "preflight": False}
    prompts = batch(12, seed=3)[0]

    def loop(updates=3):
        ppo = made(folders, way, **{**keys, "updates": updates})
        return Loop(ppo, from_adapter(ppo.model, tiny.SPECIAL), prompts, prompts[:4])

    whole = loop()
    whole.run(None, 1)
    first = loop(2)
    first.run(tmp_path, 1)
    with safe_open(checkpoint.latest(tmp_path).path / "tensors.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    learns = sum(p.numel() for p in first.trainer.parameters)
    held = sum(torch.Size(shape).numel() for shape in shapes)
    assert held < 4.2 * learns + 100, "weights, two moments, and the best so far; nothing of the base"
    second = loop()
    torch.manual_seed(8)
    second.run(tmp_path, 1)
    assert second.curve.rows == whole.curve.rows and second.select() == whole.select()
    found, wanted = (weights(each.trainer) for each in (second, whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], v) for n, v in wanted.items())


def test_a_checkpoint_of_other_shapes_is_refused(folders):
    ppo = made(folders)
    other = trainer(given={"model": Valued.from_pretrained(folders.root / "base", peft_config=lora(r=3)),
                           "ref_model": None})  # fmt: skip
    start = weights(ppo)
    with pytest.raises(ValueError, match=r"of another model: its .*lora_A"):
        ppo.load_state_dict(other.state_dict())
    assert is_still(ppo, start)


def test_the_update_is_that_of_a_separate_reference(folders):
    """An SFT adapter that is trained on, against a reference model that stands by itself."""
    own = made(folders, "trained on")
    other = made(folders, "trained on", given={"ref_model": Valued.from_pretrained(folders.root / "sft")})
    start = weights(other)
    for seed in (0, 1):
        found, wanted = (each.step(*batch(seed=seed)) for each in (own, other))
        assert found["objective/kl"] == pytest.approx(wanted["objective/kl"], rel=1e-4, abs=1e-6)
    assert far_weights({n: weights(own)[n] for n in start}, weights(other), start) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", Adam), ("adamw", AdamW), ("sgd", SGD), ("muon", MuonAdamW)]
)
def test_the_optimizer_by_its_name(folders, name, kind):
    ppo = made(folders, optimizer=name, adam_beta2=0.95, weight_decay=0.0 if name == "adam" else 0.1)
    assert type(ppo.optimizer) is kind
    groups = ppo.optimizer.param_groups
    taken = [id(p) for group in groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in ppo.parameters)
    if kind in (Adam, AdamW):
        assert all(group["betas"] == (0.9, 0.95) and group["lr"] == 1e-2 for group in groups)
    if name == "muon":
        of_muon = {id(p) for g in ppo.optimizer.parts["muon"].param_groups for p in g["params"]}
        assert of_muon == {id(p) for n, p in ppo.model.named_parameters() if "default" in n}
        assert ppo.optimizer.parts["adamw"].param_groups[0]["betas"] == (0.9, 0.95)
    start = weights(ppo)
    ppo.step(*batch())
    assert not is_still(ppo, start)


def test_what_cannot_be_is_refused(folders):
    with pytest.raises(TypeError, match="lora_rank"):  # of the params section; a script gives peft_config
        trainer(lora_rank=4)
    with pytest.raises(ValueError, match=r"ppo\.optimizer: adamw_8bit needs a GPU.*take adamw"):
        trainer(optimizer="adamw_8bit")
    policy = policy_of(folders)
    policy.pretrained_model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.* is the base's own and learns"):
        trainer(given={"model": policy, "ref_model": None})
