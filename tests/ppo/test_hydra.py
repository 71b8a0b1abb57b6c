"""A policy whose first blocks are frozen: computed once per rollout, the same updates as computing all."""

from __future__ import annotations

import pytest
import tiny
import torch
from made_trainers import batch, far_weights, trainer, weights
from peft import LoraConfig

from tasks.lm import AutoModelForCausalLMWithValueHead, create_reference_model
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.responses import response_logprobs
from tasks.lm.model.freezing import blocks_of

BLOCKS = 3
KINDS = ("llama", "gpt2", "gptj")
STATISTICS = "ppo/loss/policy", "ppo/loss/value", "objective/kl", "ppo/policy/entropy", "ppo/grad_norm"


def model_of(kind="llama", tied=False, **keys):
    layers = {"num_hidden_layers": BLOCKS} if kind == "llama" else {"n_layer": BLOCKS}
    model = tiny.causal(kind, **layers, tie_word_embeddings=tied)
    return AutoModelForCausalLMWithValueHead(model, **keys)


def made(kind="llama", tied=False, k=1, megabytes=64, given=None, model_keys=None, **keys):
    given = {"model": model_of(kind, tied, **(model_keys or {})), "ref_model": None, **(given or {})}
    # Adam would make full steps of the rounding of gradients that are 0 (GPT-2's biases of keys)
    given.setdefault("optimizer", torch.optim.SGD(given["model"].parameters(), 0.1, momentum=0.9))
    given["trunk_megabytes"] = megabytes
    return trainer(kind, given=given, num_layers_unfrozen=k, **keys)


def forwards(policy) -> list[int]:
    """A counter of the forwards of each block that computed something."""
    counts = [0] * BLOCKS
    for i, block in enumerate(blocks_of(policy.pretrained_model)):

        def hook(*_, i=i):
            counts[i] += 1

        next(m for m in block.modules() if m is not block).register_forward_hook(hook)
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_remembering_changes_nothing(kind, tied, k):
    """Against the same update that keeps nothing: losses, KL and weights; over two steps."""
    remembers, recomputes = made(kind, tied, k), made(kind, tied, k, megabytes=0)
    start = weights(remembers)
    for seed in (0, 1):
        found, wanted = (each.step(*batch(seed=seed)) for each in (remembers, recomputes))
        for name in STATISTICS:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
    assert far_weights(weights(remembers), weights(recomputes), start) < 1e-4
    assert remembers.hydra.depth == BLOCKS - k and recomputes.hydra.most_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_reference_is_the_model_that_training_starts_from(kind, tied, k):
    """KL is 0 before the first update, and afterwards its log-probabilities are those of then (trlX: not)."""
    policy = made(kind, tied, k)
    prompts, responses, scores = batch()
    sequences = lay_out(prompts, responses, tiny.PAD, "cpu")
    untouched = tiny.causal(kind, **({"num_hidden_layers": 3} if kind == "llama" else {"n_layer": 3}),
                            tie_word_embeddings=tied)  # fmt: skip
    wanted = response_logprobs(untouched, sequences, 1.0)
    assert policy.observe(prompts, responses).kl_nats().abs().max() < 1e-5
    for _ in range(2):
        policy.step(prompts, responses, scores)
    seen = policy.observe(prompts, responses)
    assert tiny.far(seen.ref_logprobs, wanted) < 1e-5
    assert tiny.far(seen.logprobs, wanted) > 1e-4


def test_what_learns_by_hand():
    """k = 0: norm and head; k = 1: a block more; of tied embeddings no head."""
    for k, tied, wanted in ((0, False, 2), (0, True, 1), (1, False, 11), (1, True, 10)):
        policy = made(k=k, tied=tied)
        names = {n for n, p in policy.model.named_parameters() if p.requires_grad}
        assert len({n for n in names if "v_head" not in n}) == wanted
        shared = {p.data_ptr() for p in policy.model.parameters()} & {
            p.data_ptr() for p in policy.ref_model.parameters()
        }
        frozen = [p for p in policy.model.parameters() if not p.requires_grad]
        assert shared == {p.data_ptr() for p in frozen}


@pytest.mark.parametrize("k", [1, 2])
def test_a_trunk_runs_once(k):
    """A step of two passes over two minibatches: the trunk once, the blocks above it 1 + 4 times."""
    policy = made(k=k)
    policy.step(*batch())  # the first forward tries the output embeddings
    counts = forwards(policy.model)
    of_reference = forwards(policy.ref_model)
    policy.step(*batch(seed=1))
    assert counts == [1] * (BLOCKS - k) + [5] * k
    assert of_reference == [0] * (BLOCKS - k) + [1] * k


def test_a_bound_of_memory():
    """Rows of 8 are read in two parts; what two parts need together is one byte too much."""
    policy = made(microbatch_rows=4)
    stats = policy.step(*batch())
    seen = policy.observe(*batch()[:2])
    assert stats["rollout/trunk_megabytes"] == pytest.approx(seen.trunk.nbytes / 2**20) and seen.trunk.nbytes
    for change, is_kept in ((0, True), (-1, False)):
        policy.hydra = type(policy.hydra)(policy.hydra.depth, True, seen.trunk.nbytes + change)
        assert (policy.observe(*batch()[:2]).trunk is not None) is is_kept
    counts = forwards(policy.model)
    assert policy.step(*batch())["rollout/trunk_megabytes"] == 0
    assert counts == [2 + 4] * 2 + [2 + 4]


def test_num_shared_layers_of_trl():
    """It counts the same blocks from the other end; a reference made by hand shares them too."""
    start = weights(made())
    each = [made(k=1), made(k=None, given={"num_shared_layers": 2})]
    policy = model_of()
    each.append(made(k=None, given={"model": policy, "ref_model": create_reference_model(policy, 2)}))
    for one in each:
        assert one.hydra.depth == 2 and one.hydra.is_shared
        one.step(*batch())
    for one in each[1:]:
        assert far_weights(weights(one), weights(each[0]), start) < 1e-6


def test_a_reference_of_its_own():
    """Beside frozen layers: the policy remembers, the reference reads everything."""
    reference = tiny.causal(num_hidden_layers=BLOCKS, seed=5).requires_grad_(False)
    policy, plain = (made(megabytes=m, given={"ref_model": reference}) for m in (64, 0))
    assert policy.hydra.depth == 2 and not policy.hydra.is_shared
    prompts, responses, _ = batch()
    wanted = response_logprobs(reference, lay_out(prompts, responses, tiny.PAD, "cpu"), 1.0)
    assert tiny.far(policy.observe(prompts, responses).ref_logprobs, wanted) < 1e-5
    start = weights(policy)
    found, wanted = (each.step(*batch()) for each in (policy, plain))
    assert found["objective/kl"] == pytest.approx(wanted["objective/kl"], rel=1e-5) and wanted["objective/kl"]
    assert far_weights(weights(policy), weights(plain), start) < 1e-4


@pytest.mark.parametrize("values", [1, 2, 3])
def test_a_value_branch(values):
    """Where it is longer than what is trained, the trunk ends where its copies begin."""
    keys = {"model_keys": {"num_value_layers_unfrozen": values}}
    remembers, recomputes = made(k=1, **keys), made(k=1, megabytes=0, **keys)
    start = weights(remembers)
    for each in (remembers, recomputes):
        for seed in (0, 1):
            each.step(*batch(seed=seed))
    assert remembers.hydra.depth == BLOCKS - max(1, values)
    assert far_weights(weights(remembers), weights(recomputes), start) < 1e-4


@pytest.mark.parametrize("keys", [
    {"kl_penalty": "full"}, {"kl_in": "loss", "kl_penalty": "k3"}, {"gradient_checkpointing": True},
    {"critic_warmup_updates": 1}, {"dtype": "bfloat16"}, {"microbatch_rows": 3}, {"temperature": 0.7},
])  # fmt: skip
def test_beside_other_settings(keys):
    remembers, recomputes = made(k=1, **keys), made(k=1, megabytes=0, **keys)
    start = weights(remembers)
    for each in (remembers, recomputes):
        for seed in (0, 1):
            each.step(*batch(seed=seed))
    assert far_weights(weights(remembers), weights(recomputes), start) < (0.2 if "dtype" in keys else 1e-4)


@pytest.mark.parametrize("layers", [None, [2]])
def test_an_adapter(layers):
    """Frozen below; the reference without it shares a trunk that holds none."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=layers)

    def one(megabytes):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            tiny.causal(num_hidden_layers=BLOCKS), peft_config=config
        )
        return made(k=1, megabytes=megabytes, given={"model": model, "optimizer": None})

    torch.manual_seed(0)
    remembers = one(64)
    torch.manual_seed(0)
    recomputes = one(0)
    assert remembers.hydra.depth == 2 and remembers.hydra.is_shared is (layers is not None)
    names = {n for n, p in remembers.model.pretrained_model.named_parameters() if p.requires_grad}
    assert names and all(".layers.2." in n for n in names)
    start = weights(remembers)
    for each in (remembers, recomputes):
        for seed in (0, 1):
            each.step(*batch(seed=seed))
    assert far_weights(weights(remembers), weights(recomputes), start) < 1e-4


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match=r"ppo.num_layers_unfrozen is 4; the model has 3 blocks"):
        made(k=4)
    with pytest.raises(ValueError, match=r"num_shared_layers is 4; the model has 3 blocks"):
        made(k=None, given={"num_shared_layers": 4})
