"""What would make a run worthless, looked for on a few prompts before compute is spent on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tasks.lm.logprobs.responses import read_responses
from tasks.lm.logprobs.seq2seq import logits_alone
from tasks.lm.model.kinds import is_seq2seq
from tasks.lm.model.modes import evaluating
from tasks.lm.model.recompute import recompute_blocks
from tasks.lm.numerics.precision import autocast
from tasks.lm.sampling.generation import draw_uniforms, row_seeds
from tasks.ppo.batch import check_batch, read_scores
from tasks.ppo.reward_functions import RewardFunction
from tasks.ppo.rollout import Rollout
from tasks.ppo.rounding import FULL, HALF, TF32  # noqa: F401  # how far is rounding, by their names here
from tasks.ppo.rounding import distance as _distance
from tasks.ppo.rounding import rounding_of as _rounding
from tasks.run.devices import derive_seed
from tasks.run.layout import Refusal

if TYPE_CHECKING:
    from tasks.ppo.trainer import PPOTrainer

PROBE = 16  # responses that are tried
ROUNDS = 8  # of so many responses before a reward is taken to be constant
SAME = 1e-6  # relative difference of rewards that are one
LEAST_EOS = 1e-12  # probability of the end, somewhere in the probe


def preflight(trainer: PPOTrainer, prompts: Sequence[Sequence[int]], reward_fn: RewardFunction) -> None:
    """Try rollout, log-probabilities and reward on 16 responses; nothing of the trainer changes.

    Looked for are: a ratio other than 1 on the first minibatch; before any update, a KL to the reference
    other than 0; log-probabilities that depend on the batch or its padding; sampled tokens that are no draws
    of the distribution that is trained; an eos that cannot be said; rewards that are not finite, not one for
    each response or token, or all the same.

    Args:
        trainer: before its first update, or later.
        prompts: token ids; 16 of them are tried, from the shortest to the longest.
        reward_fn: of token ids; of a reward per token, the sum over the response must differ.

    Raises:
        Refusal: all that was found, in words and figures.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    probe = [prompts[order[i]] for i in torch.linspace(0, len(order) - 1, PROBE).long().tolist()]
    seeds = row_seeds(derive_seed(trainer.seed, "ppo", "preflight"), PROBE * ROUNDS)
    cuda = [trainer.device] if trainer.device.type == "cuda" else []
    # a model that draws random numbers, in evaluation mode too, is what is looked for
    with evaluating(trainer.model, trainer.ref_model), torch.random.fork_rng(devices=cuda):
        responses = trainer.sample(probe, seeds[:PROBE]).lists()
        seen = trainer.observe(probe, responses)
        rows = list(zip(probe, responses, strict=True))
        uniforms = draw_uniforms(seeds[:PROBE], trainer.config.response_tokens)
        findings = [
            *_of_first_minibatch(trainer, seen),
            *_of_reference(trainer, seen),
            *_of_rows_alone(trainer, rows, seen),
            *_of_draws(trainer, rows, uniforms),
            *_of_reward(trainer, rows, seeds, reward_fn),
        ]
    if findings:
        raise Refusal(f"preflight: {'; '.join(findings)} (ppo.preflight: false goes on all the same)")


def _of_first_minibatch(trainer: PPOTrainer, seen: Rollout) -> Iterator[str]:
    """Read again as an update reads it, with gradients."""
    count = min(trainer.mini_rows, trainer.microbatch_rows, PROBE)
    some = seen.rows(torch.arange(count, device=trainer.device))
    with _precision(trainer), recompute_blocks(trainer.model, trainer.config.gradient_checkpointing):
        logprobs = read_responses(trainer.model, some.sequences, trainer.config.temperature)[0].detach()
    far, allowed = _distance(logprobs, some.logprobs, some.is_action), _rounding(trainer, autocast=True).nats
    if not far <= allowed:
        yield f"the ratio of the first minibatch is not 1: {_nats(far, allowed)}; is dropout on?"


def _of_reference(trainer: PPOTrainer, seen: Rollout) -> Iterator[str]:
    far = _distance(seen.logprobs, seen.ref_logprobs, seen.is_action)
    allowed = _rounding(trainer, autocast=True).nats
    if trainer.updates == 0 and not far <= allowed:
        yield (
            f"KL(policy, reference) is not 0 before the first update: {_nats(far, allowed)}; is the "
            "reference the model that training starts from?"
        )


@torch.no_grad()
def _of_rows_alone(trainer: PPOTrainer, rows: list[tuple], seen: Rollout) -> Iterator[str]:
    """Without autocast, whose rounding would hide a wrong position or a padding that is seen."""
    parts = torch.arange(PROBE, device=trainer.device).split(trainer.microbatch_rows)
    sequences, temperature = seen.sequences, trainer.config.temperature
    batch = [read_responses(trainer.model, sequences.rows(some), temperature)[0] for some in parts]
    alone = torch.zeros_like(seen.logprobs)
    for row, (prompt, response) in enumerate(rows):
        logp = _read_alone(trainer, prompt, response, nullcontext())
        alone[row, : len(response)] = _at(logp, response)
    far, allowed = _distance(alone, torch.cat(batch), seen.is_action), _rounding(trainer).nats
    if not far <= allowed:
        yield f"log-probabilities depend on the batch or its padding: alone, {_nats(far, allowed)}"


@torch.no_grad()
def _of_draws(trainer: PPOTrainer, rows: list[tuple], uniforms: Tensor) -> Iterator[str]:
    """Which tokens the same random numbers choose from what is trained, and whether eos can be one."""
    ends = [token for token in trainer.ends if 0 <= token < trainer.vocabulary()]
    rounding, agree, best = _rounding(trainer, autocast=True), [], 0.0
    for (prompt, response), drawn in zip(rows, uniforms, strict=True):
        logp = _read_alone(trainer, prompt, response, _precision(trainer))
        upto = logp.exp().cumsum(-1)
        wanted, above = drawn[: len(response)].to(upto) * upto[:, -1], _at(upto, response)
        off = torch.maximum(wanted - above, above - _at(logp, response).exp() - wanted)
        agree += (off <= rounding.cumulative).tolist()
        if ends:
            best = max(best, logp[:, ends].max().exp().item())
    share = sum(agree) / len(agree)
    if not share >= rounding.agreement:
        yield (
            f"sampled tokens are no draws of the distribution that is trained: the same random numbers "
            f"choose {share:.1%} of {len(agree)} tokens again ({rounding.agreement:.0%} is wanted)"
        )
    eos = ", ".join(map(str, trainer.ends))
    if not ends:
        yield f"no response can end: eos is token {eos}, the vocabulary has {trainer.vocabulary()}"
    elif not best > LEAST_EOS:
        yield f"no response can end: eos (token {eos}) has a probability of at most {best:.2g}"


def _of_reward(
    trainer: PPOTrainer, rows: list[tuple], seeds: list[int], reward_fn: RewardFunction
) -> Iterator[str]:
    """Chance may give 16 responses one reward; then more are drawn."""
    prompts, responses = ([row[i] for row in rows] for i in range(2))
    low, high = math.inf, -math.inf
    for drawn in range(PROBE, PROBE * (ROUNDS + 1), PROBE):
        scores = reward_fn(prompts, responses)
        try:
            scores = read_scores("reward_fn: scores", scores, PROBE)
            size = PROBE, trainer.vocabulary(), trainer.room()
            trainer.shape(check_batch(prompts, responses, scores, None, *size), learn=False)
        except ValueError as error:
            yield str(error)
            return
        totals = [score.sum().item() for score in scores]
        low, high = min(low, *totals), max(high, *totals)
        if high - low > SAME * max(abs(low), abs(high)):
            return
        if drawn < len(seeds):
            responses = trainer.sample(prompts, seeds[drawn : drawn + PROBE]).lists()
    yield f"the reward is {high:g} for each of {drawn} responses: nothing can be learnt from it"


def _read_alone(
    trainer: PPOTrainer, prompt: list[int], response: list[int], precision: AbstractContextManager
) -> Tensor:
    """Log-probabilities of the whole vocabulary at each token of a response, by a plain forward. [R, V]."""
    model = trainer.model.pretrained_model
    ids = torch.tensor([[*prompt, *response]], device=trainer.device)
    keys = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with precision:
        if is_seq2seq(model):
            logits = logits_alone(model, prompt, response)
        else:
            logits = model(input_ids=ids, **keys).logits[0, -len(response) - 1 : -1]
    return (logits.float() / trainer.config.temperature).log_softmax(-1)


def _at(values: Tensor, tokens: list[int]) -> Tensor:
    """[R, V] -> [R]."""
    return values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0]


def _nats(far: float, allowed: float) -> str:
    return f"log-probabilities differ by {far:.2g} nats ({allowed:g} is rounding)"


def _precision(trainer: PPOTrainer) -> AbstractContextManager:
    return autocast(trainer.device, trainer.config.dtype)
