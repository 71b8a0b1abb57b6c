"""Small trainers and batches that the tests of PPOTrainer share."""

from __future__ import annotations

import tiny
import torch

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.heads.value_head import ModelWithValueHead
from tasks.ppo import PPOConfig, PPOTrainer

DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
CONFIG = {
    "batch_size": 8, "mini_batch_size": 4, "response_tokens": 6, "learning_rate": 1e-2, "ppo_epochs": 2,
    "init_kl_coef": 0.1, "lam": 0.9, "gamma": 0.99, "target": 0.5, "horizon": 100, "max_grad_norm": 1e9,
}  # fmt: skip


def trainer(kind="llama", seed=0, microbatch_rows=64, model_keys=None, given=None, **keys) -> PPOTrainer:
    """A policy and a reference that are one model; `keys` for PPOConfig, `given` for PPOTrainer."""
    given = dict(given or {})
    policy = given.pop("model", None) or tiny.causal(kind, seed, **(model_keys or {}))
    reference = tiny.causal(kind, seed, **(model_keys or {})).requires_grad_(False)
    given = {"ref_model": reference, "tokenizer": tiny.SPECIAL, **given}
    if not isinstance(policy, ModelWithValueHead):
        policy = AutoModelForCausalLMWithValueHead(policy)
    config = PPOConfig(**{**CONFIG, **keys})
    return PPOTrainer(config, policy, seed=11, device="cpu", microbatch_rows=microbatch_rows, **given)


def batch(count=8, seed=0):
    """Prompts and responses of uneven lengths, some ending with eos; scores around zero."""
    draw = torch.Generator().manual_seed(seed)
    prompts = tiny.drawn(torch.randint(1, 9, (count,), generator=draw).tolist(), seed + 1)
    responses = tiny.drawn(torch.randint(1, 7, (count,), generator=draw).tolist(), seed + 2)
    responses = [[*r[:-1], tiny.EOS] if n % 2 else r for n, r in enumerate(responses)]
    return prompts, responses, torch.randn(count, generator=draw)


def weights(made):
    """A copy of the weights."""
    return {n: v.clone() for n, v in made.model.state_dict().items()}


def is_still(made, start) -> bool:
    """Whether no weight has moved."""
    return all(torch.equal(v, start[n]) for n, v in made.model.state_dict().items())


def far_weights(found, wanted, start) -> float:
    """Largest difference of two sets of weights, relative to the largest step that was made."""
    moved = max((wanted[n] - start[n]).abs().max() for n in wanted)
    assert moved > 1e-4
    return float(max((found[n] - wanted[n]).abs().max() for n in wanted) / moved)


def first_gradients(step=None, **keys):
    """The gradients of the first optimizer step of an update."""
    made, caught = trainer(**keys), []
    made.optimizer.register_step_pre_hook(lambda *_: caught.append(tiny.gradients(made.model, keep=True)))
    made.step(*(step or batch()))
    return caught[0]
