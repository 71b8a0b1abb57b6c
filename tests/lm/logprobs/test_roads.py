"""Which road serves a model is tried on it: what is found, what stays as it was, every door that asks."""

from __future__ import annotations

import copy

import families
import pytest
import tiny
import torch

from tasks.lm import AutoModelForCausalLMWithValueHead
from tasks.lm.attention.forest import has_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.heads.scores import score_documents, take_scoring_road
from tasks.lm.logprobs import roads
from tasks.lm.logprobs.responses import response_logprobs
from tasks.lm.logprobs.roads import check_road, remembered, take_road
from tasks.lm.model.context import room_of
from tasks.lm.sampling.generation import generate
from tasks.ppo import PPOConfig, PPOTrainer
from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16, "factor": 4.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    """Each test tries its models itself."""
    monkeypatch.setattr(roads, "_found", {})


def forwards(model) -> list[int]:
    counts: list[int] = []
    model.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("kind", ["llama", "bart", "gptj"])
def test_a_trial_leaves_everything_as_it_was(kind):
    """Random state, modes, weights, gradients and, where the forest does not serve, the attention."""
    model = tiny.causal(kind).train()
    next(model.children()).eval()
    model.get_output_embeddings().weight.grad = torch.ones_like(model.get_output_embeddings().weight)
    modes = [module.training for module in model.modules()]
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attention = model.config._attn_implementation
    take_road(model, learns=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    graded = [name for name, p in model.named_parameters() if p.grad is not None]
    assert graded == [n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight]
    assert not any(p.dtype != torch.float32 for p in model.parameters())
    assert has_forest(model) == (kind == "llama")
    assert has_forest(model) or model.config._attn_implementation == attention


def test_a_class_and_its_configuration_are_tried_once():
    """Another object of both is believed; another configuration, or a trainer's question, is not."""
    take_road(tiny.causal())
    like, wider = tiny.causal(seed=1), tiny.causal(intermediate_size=40)
    counts = forwards(like)
    take_road(like)
    assert has_forest(like) and not counts
    counts = forwards(wider)
    take_road(wider)
    assert len(counts) > 3
    before = len(counts)
    take_road(wider)
    assert len(counts) == before
    take_road(wider, learns=True)
    assert len(counts) > before
    assert remembered(like, ("anything",), lambda: 5) == remembered(like, ("anything",), lambda: 6) == 5


def test_a_gradient_that_stops_in_the_forest_is_found_out(monkeypatch):
    """The numbers are right, the road is not: a trainer takes padded rows."""
    whole = roads.run_forest

    def stopped(model, forest, **keys):
        out = whole(model, forest, **keys)
        hook = model.model.layers[1].register_forward_hook(lambda _, inputs, out: out.detach())
        try:
            return whole(model, forest, **keys)
        finally:
            hook.remove()
            del out

    monkeypatch.setattr(roads, "run_forest", stopped)
    reads, learns = tiny.causal(), tiny.causal()
    take_road(reads)
    take_road(learns, learns=True)
    assert has_forest(reads) and not has_forest(learns)


@pytest.mark.parametrize("kind", ["big_bird", "megatron-bert", "rembert", "xlm"])
def test_what_looks_ahead_is_refused_at_every_door(kind):
    """An encoder that passes for a causal model: transformers' own class has a language model's head."""
    model, sequences = families.made(kind), lay_out([[5, 6]], [[7, 8]], 0, "cpu")
    doors = (
        lambda: take_road(model),
        lambda: response_logprobs(model, sequences, 1.0),
        lambda: generate(model, [[5, 6]], max_tokens=2, eos_id=None, pad_id=0),
        lambda: SFTTrainer(model, SFTConfig("never", use_cpu=True), [{"input_ids": [5, 6]}]),
        lambda: PPOTrainer(
            PPOConfig(batch_size=1, mini_batch_size=1),
            AutoModelForCausalLMWithValueHead(model),
            None,
            tiny.SPECIAL,
            device="cpu",
        ),
    )
    for door in doors:
        with families.quiet(), pytest.raises(ValueError, match="is no causal language model"):
            door()


@pytest.mark.parametrize("learner", [SFTTrainer, RewardTrainer])
def test_a_load_balancing_loss_is_not_left_out_in_silence(learner, tmp_path):
    """It is refused by name; what is only read needs none."""
    model = tiny.causal("mixtral", **MOE, output_router_logits=True)
    sequences = lay_out(tiny.drawn((4, 6)), tiny.drawn((3, 2), 1), 0, "cpu")
    found = response_logprobs(model, sequences, 1.0)
    assert model.config.output_router_logits
    wanted = response_logprobs(tiny.causal("mixtral", **MOE), sequences, 1.0)
    assert tiny.far(found, wanted) <= 1e-5
    config = {SFTTrainer: SFTConfig, RewardTrainer: RewardConfig}[learner](str(tmp_path), use_cpu=True)
    made = model if learner is SFTTrainer else tiny.scorer("mixtral", **MOE, output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits asks for a load-balancing loss"):
        learner(made, config, [], processing_class=tiny.tokenizer())


@pytest.mark.parametrize("kind", ["llama", "gptj", "bart"])
def test_rows_padded_on_the_left_are_read_or_refused(kind):
    """By a value head's own forward; BART's positions count padding. On the right all read them."""
    model = AutoModelForCausalLMWithValueHead(tiny.causal(kind))
    rows = tiny.drawn((6, 3))
    alone = [model(torch.tensor([row]))[0][0] for row in rows]
    for side in ("right", "left"):
        places = [slice(0, len(row)) if side == "right" else slice(6 - len(row), 6) for row in rows]
        tokens, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
        for i, (row, at) in enumerate(zip(rows, places, strict=True)):
            tokens[i, at], mask[i, at] = torch.tensor(row), 1
        if side == "left" and kind == "bart":
            with pytest.raises(ValueError, match="BartForCausalLM does not read rows that are padded on the"):
                model(tokens, attention_mask=mask)
            continue
        logits = model(tokens, attention_mask=mask)[0]
        assert all(tiny.far(logits[i, at], alone[i]) <= 1e-5 for i, at in enumerate(places))


def test_a_rope_that_switches_for_a_whole_batch_bounds_the_room():
    """Longer documents would change what is said of the shorter ones beside them."""
    model = tiny.causal("phi3", rope_parameters=LONG, original_max_position_embeddings=16)
    assert room_of(model) == 16 and room_of(tiny.causal("phi3")) == 64
    rows = lay_out(tiny.drawn((9, 4)), tiny.drawn((9, 5), 1), 0, "cpu")
    with pytest.raises(ValueError, match=r"row 0 has a prompt of 9 .* room for 16"):
        response_logprobs(model, rows, 1.0)


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "stablelm", "gptj", "mixtral"])
def test_a_reward_model_is_tried_as_well(kind):
    """Its scores are those of its documents alone, by whatever road."""
    keys = {"gpt_oss": MOE | {"head_dim": 8}, "mixtral": MOE}.get(kind, {})
    model, documents = tiny.scorer(kind, **keys), tiny.drawn((5, 9, 2))
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([d])).logits[0, 0] for d in documents])
    take_scoring_road(model, learns=True)
    assert has_forest(model) == (kind in ("gemma2", "mixtral"))
    assert tiny.far(score_documents(model, documents, 4), wanted) <= 1e-5


def test_why_a_model_cannot_be_read_is_said():
    model = tiny.causal()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot be read as a causal language model: Runtime"
    ):
        check_road(model)
