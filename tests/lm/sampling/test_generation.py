"""Sampling: transformers' own greedy tokens, softmax's own frequencies, each row for itself."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tasks.lm.adapters.lora import add_adapter
from tasks.lm.attention import kv_cache
from tasks.lm.attention.forest import has_forest, serve_forest
from tasks.lm.sampling import decoders, prepack
from tasks.lm.sampling.generation import Draw, Responses, draw_uniforms, generate, restrict, row_seeds, sample

SPECIAL = {"eos_id": tiny.EOS, "pad_id": tiny.PAD}
ENDLESS = {"eos_id": None, "pad_id": tiny.PAD}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True,
         "sliding_window": 4, "max_window_layers": 1}  # fmt: skip
SERVED = [
    ("llama", {}),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", MIXED),
    ("qwen3", MIXED | {"head_dim": 8}),
    ("gemma", {}),
    ("phi3", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("opt", {}),
    ("gemma2", {"sliding_window": 4}),
]
PADDED = [("bloom", {}), ("gptj", {})]
COUNTING = ("roberta", {"is_decoder": True})  # positions from behind the padding index
NAMES = [f"{kind}{len(keys) or ''}" for kind, keys in SERVED + PADDED]


def ragged(seed=4):
    return tiny.drawn((5, 1, 9, 3, 9, 2, 7), seed)


def uniforms_of(rows, tokens, seed=0):
    return draw_uniforms(row_seeds(seed, rows), tokens)


def state_of(model):
    """Everything of a model but its weights' values."""
    modules = dict(model.named_modules())
    return (
        {name: (type(m), m.training, sorted(vars(m)), list(m._forward_hooks)) for name, m in modules.items()},
        {name: m.config._attn_implementation for name, m in modules.items() if hasattr(m, "config")},
        {name: (p.data_ptr(), p.dtype, p.requires_grad, p._version) for name, p in model.named_parameters()},
    )


def watched(model, what):
    """`what` of the tokens of every forward from here on."""
    found = []

    def look(_, __, keys):
        found.append(what(keys["input_ids"]))

    model.register_forward_pre_hook(look, with_kwargs=True)
    return found


@pytest.fixture
def as_when_large(monkeypatch):
    """Everything that pays only in large batches of large models, in tiny ones."""
    monkeypatch.setattr(prepack, "LEAST_WEIGHTS", 0)
    monkeypatch.setitem(kv_cache.WORTH_A_CALL, "cpu", 1)


@pytest.fixture
def seen(monkeypatch):
    """The logits that every token was drawn from, by step."""
    logits = []
    call = Draw.__call__

    def record(self, some, uniforms, before):
        logits.append(some.float().clone())
        return call(self, some, uniforms, before)

    monkeypatch.setattr(Draw, "__call__", record)
    return logits


@pytest.mark.parametrize(("kind", "keys"), SERVED + PADDED, ids=NAMES)
def test_greedy_is_transformers_greedy(kind, keys, as_when_large):
    model, prompts = tiny.causal(kind, seed=3, **keys), ragged()
    width = max(map(len, prompts))
    ids = torch.tensor([[tiny.PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=tiny.PAD,
        eos_token_id=tiny.EOS,
    )[:, width:]  # fmt: skip
    before = state_of(model)
    found = generate(model, prompts, max_tokens=12, **SPECIAL)
    assert found.tokens[:, : wanted.shape[1]].tolist() == wanted.tolist()
    assert len({tuple(row) for row in wanted.tolist()}) > 3, "the prompts lead to different answers"
    assert state_of(model) == before
    assert serve_forest(model) == ((kind, keys) in SERVED)


@pytest.mark.parametrize("is_served", [True, False], ids=["served", "padded"])
@pytest.mark.parametrize(("kind", "keys"), SERVED + PADDED + [COUNTING], ids=[*NAMES, "roberta"])
def test_every_token_is_drawn_from_the_logits_of_a_forward(
    kind, keys, is_served, seen, as_when_large, monkeypatch
):
    """Several rows share a prompt, rows leave at different times, weights are packed: the logits are those
    of each whole row alone. Padded rows serve every model.
    """
    if not is_served:
        monkeypatch.setattr(decoders, "has_forest", lambda model: False)
    model, prompts = tiny.causal(kind, seed=3, **keys), ragged()
    prompts = prompts + prompts[2:4] + prompts[2:3]
    limits = [1, 12, 3, 12, 9, 2, 2, 12, 12, 4]
    found = generate(model, prompts, max_tokens=limits, uniforms=uniforms_of(10, 12), **ENDLESS).lists()
    assert list(map(len, found)) == limits
    order = sorted(range(10), key=lambda i: (-len(prompts[i]), prompts[i]))
    wanted = {}
    for i in order:
        row = torch.tensor([prompts[i] + found[i]])
        positions = torch.arange(row.shape[1])[None] + (kind == "roberta")
        with torch.no_grad():
            wanted[i] = model(row, position_ids=positions).logits[0]
    assert [len(logits) for logits in seen] == [10, 10, 7, 7] + [5] * 8
    stayed = order
    for step, logits in enumerate(seen):
        if len(logits) < len(stayed):
            stayed = [i for i in stayed if limits[i] > step]
        assert len(logits) == len(stayed)
        for row, i in zip(logits, stayed, strict=True):
            if step < limits[i]:
                assert tiny.far(row, wanted[i][len(prompts[i]) - 1 + step]) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_a_row_depends_on_its_prompt_and_its_numbers_alone(kind):
    model, prompts = tiny.causal(kind), ragged()
    uniforms = uniforms_of(len(prompts), 10, seed=8)

    def sampled(index, rows=512):
        own = [prompts[i] for i in index]
        return generate(model, own, max_tokens=10, uniforms=uniforms[index], rows=rows, **SPECIAL).lists()

    everything = list(range(len(prompts)))
    together = sampled(everything)
    assert [sampled([i])[0] for i in everything] == together
    assert sampled(everything, rows=1) == sampled(everything, rows=3) == together
    assert sampled(everything[::-1]) == together[::-1]
    assert len({tuple(r) for r in together}) == len(prompts)


def test_the_same_batch_gives_the_same_bits(seen):
    model, uniforms = tiny.causal(), uniforms_of(7, 8)
    for _ in range(2):
        generate(model, ragged(), max_tokens=8, uniforms=uniforms, **SPECIAL)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_prompt_that_rows_share_is_read_once(kind):
    model = tiny.causal(kind)
    read = watched(model, torch.Tensor.numel)
    prompts = [[5, 6, 7], [9], [5, 6, 7], [5, 6, 7], [9]]
    uniforms = uniforms_of(5, 6)
    together = generate(model, prompts, max_tokens=6, uniforms=uniforms, **ENDLESS).lists()
    assert read == [4 if kind == "llama" else 6, 5, 5, 5, 5, 5]
    assert len(set(map(tuple, together))) == 5, "but each row draws with its own numbers"
    alone = [generate(model, [p], max_tokens=6, uniforms=u[None], **ENDLESS).lists()[0]
             for p, u in zip(prompts, uniforms, strict=True)]  # fmt: skip
    assert alone == together


def test_prompts_are_read_some_thousand_tokens_at_a_time(monkeypatch):
    model, prompts = tiny.causal("gpt2"), ragged()
    wanted = generate(model, prompts, max_tokens=4, **ENDLESS).lists()
    read = watched(model, lambda tokens: tokens.shape[1])
    monkeypatch.setattr("tasks.lm.sampling.decoders.PREFILL_TOKENS", 8)
    assert generate(model, prompts, max_tokens=4, **ENDLESS).lists() == wanted
    assert read == [9, 9, 7, 5 + 3, 2 + 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_rows_that_have_ended_leave_the_batch(kind):
    model = tiny.causal(kind)
    rows = watched(model, len)
    limits = [8, 2, 5, 2, 2, 5, 8]
    found = generate(model, ragged(), max_tokens=limits, **ENDLESS)
    assert rows[1:] == [7, 4, 4, 4, 2, 2, 2]
    assert found.is_response.sum(1).tolist() == limits and found.tokens.shape == (7, 8)
    alone = [generate(model, [p], max_tokens=8, **ENDLESS).lists()[0] for p in ragged()]
    assert found.lists() == [row[:limit] for row, limit in zip(alone, limits, strict=True)]


def test_row_seeds():
    assert row_seeds(5, 7)[:3] == row_seeds(5, 3) != row_seeds(6, 3)
    assert len(set(row_seeds(0, 2000) + row_seeds(1, 2000))) == 4000
    assert row_seeds(-1, 2) != row_seeds(1, 2) and row_seeds(2**64, 2) != row_seeds(0, 2)


def test_uniforms_are_a_function_of_the_seed_and_the_place():
    seeds = [7, 2**40 + 7, 2**63, 7]
    drawn = draw_uniforms(seeds, 40)
    assert drawn.shape == (4, 40) and drawn.dtype == torch.float32
    assert torch.equal(draw_uniforms(seeds[1:2], 9), drawn[1:2, :9])
    assert torch.equal(drawn[0], drawn[3])
    assert len(drawn[:3].unique()) == 120, "seeds that share their last 32 bits draw their own"
    many = draw_uniforms(range(100), 1000).double()
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 4e-3 and abs(many.var() - 1 / 12) < 2e-3  # more than 4 standard errors
    assert abs(torch.corrcoef(many[:, :2].T)[0, 1]) < 0.4 and abs(torch.corrcoef(many[:2])[0, 1]) < 0.13
    assert draw_uniforms([], 3).shape == (0, 3)


def test_no_global_random_number_is_drawn():
    model, before = tiny.causal(), torch.get_rng_state()
    generate(model, ragged(), max_tokens=10, uniforms=uniforms_of(7, 10), **SPECIAL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_softmax(temperature):
    """A chi-square test on 8 tokens; the bar's false-alarm probability is 1e-4, the seed fixed."""
    model, prompt = tiny.causal("gpt2", vocab_size=8), [3, 5, 2]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
        logits = logits / logits.std()
        model.lm_head.weight.div_(model(torch.tensor([prompt])).logits[0, -1].std())
    count = 6000
    found = generate(
        model, [prompt] * count, max_tokens=1, uniforms=uniforms_of(count, 1), rows=2000,
        temperature=temperature, **SPECIAL,
    )  # fmt: skip
    wanted = (logits / temperature).softmax(-1) * count
    assert wanted.min() > 5
    seen = torch.bincount(found.tokens[:, 0], minlength=8)
    assert ((seen - wanted) ** 2 / wanted).sum() < 29.9


def test_sample_by_hand():
    """Probabilities 0, 1/4, 1/2, 1/4, 0: the cumulative sums are 0, .25, .75, 1, 1."""
    logits = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999, 1 - 2**-24])
    found = sample(logits.expand(8, 5), uniforms).tolist()
    assert found == [1, 1, 2, 2, 2, 3, 3, 3], "a token of probability 0 is never drawn"


def test_rounding_draws_no_impossible_token():
    """Float32 sums of 40,000 probabilities miss 1 by more than the largest uniform number does."""
    logits = torch.randn(64, 40_000, generator=torch.Generator().manual_seed(0)) * 0.1
    logits[:, -1] = -torch.inf
    assert logits.softmax(-1).cumsum(-1)[:, -1].min() < 1 - 2**-22
    assert sample(logits, torch.full((64,), 1 - 2**-24)).max() < 39_999


def test_sampling_inverts_the_same_uniform_whatever_the_shift():
    logits, uniforms = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)), uniforms_of(1, 50)[0]
    assert torch.equal(sample(logits, uniforms), sample(logits + 7, uniforms))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (50, 1.0), (0, 0.7), (4, 0.5), (0, 1e-9)]
)
def test_restriction_is_transformers(top_k, top_p):
    logits = 2 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits[:, 5]  # ties
    wanted = TemperatureLogitsWarper(0.7)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
    found = restrict(logits / 0.7, top_k, top_p)
    assert torch.equal(found, wanted)
    kept = found.isfinite().sum(1)
    assert (kept >= 1).all() and (kept.float().mean() < 12) == ((top_k, top_p) not in [(0, 1.0), (50, 1.0)])


def test_restriction_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    rest = -torch.inf
    assert restrict(logits, 2)[0].tolist() == [*logits[0, :2].tolist(), rest, rest]
    assert restrict(logits, 0, 0.75)[0].isfinite().tolist() == [True, True, False, False]
    assert restrict(logits, 0, 0.85)[0].isfinite().tolist() == [True, True, True, False]
    assert restrict(logits, 2, 0.6)[0].isfinite().tolist() == [True, False, False, False], "k first: 5/8"


def test_generate_restricts_and_divides(seen):
    model, prompts = tiny.causal("gpt2"), [[5, 6]] * 200
    keys = {"max_tokens": 2, "uniforms": uniforms_of(200, 2), "temperature": 3.0}
    few = generate(model, prompts, top_k=2, **keys, **ENDLESS)
    assert set(few.tokens[:, 0].tolist()) == set(seen[0][0].topk(2).indices.tolist())
    wanted = (seen[0][0] / 3).softmax(-1).sort(descending=True)
    kept = 1 + int((wanted.values.cumsum(0) < 0.6).sum())
    nucleus = generate(model, prompts, top_p=0.6, **keys, **ENDLESS)
    assert set(nucleus.tokens[:, 0].tolist()) == set(wanted.indices[:kept].tolist())


def test_no_eos_before_so_many_tokens():
    model, prompts = tiny.causal(vocab_size=6, seed=2), [[4], [3, 5]] * 40
    keys = {"max_tokens": 5, "uniforms": uniforms_of(80, 5, seed=3)}
    lengths = {len(row) for row in generate(model, prompts, min_tokens=3, **keys, **SPECIAL).lists()}
    assert lengths == {4, 5}, "eos is the fourth token at the earliest"
    assert {1, 2} <= {len(row) for row in generate(model, prompts, **keys, **SPECIAL).lists()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    greedy = generate(model, [[4]], max_tokens=6, min_tokens=2, eos_id=0, pad_id=tiny.PAD).lists()
    assert greedy == [[1, 1, 0]], "all logits are equal; the first token wins, greedily too"


def test_eos_is_kept_and_padding_follows():
    model, prompts = tiny.causal(vocab_size=6, seed=2), [[4], [3, 5]] * 40
    found = generate(model, prompts, max_tokens=5, uniforms=uniforms_of(80, 5, seed=3), **SPECIAL)
    assert found.tokens.shape == found.is_response.shape == (80, 5)
    for tokens, real, row in zip(
        found.tokens.tolist(), found.is_response.tolist(), found.lists(), strict=True
    ):
        wanted = tokens.index(tiny.EOS) + 1 if tiny.EOS in tokens else 5
        assert real == [True] * wanted + [False] * (5 - wanted), "a prefix that ends with eos or at R"
        assert row == tokens[:wanted] and row.count(tiny.EOS) <= 1
        assert tokens[wanted:] == [tiny.PAD] * (5 - wanted)
    lengths = [len(row) for row in found.lists()]
    assert {1, 3, 5} <= set(lengths)
    assert any(tiny.PAD in row for row in found.lists()), "a sampled pad token is a token like any other"
    endless = generate(model, prompts, max_tokens=5, uniforms=uniforms_of(80, 5, seed=3), **ENDLESS)
    assert endless.is_response.all() and (endless.tokens == tiny.EOS).any()


def test_lists_by_hand():
    tokens, real = torch.tensor([[7, 8, 1], [9, 1, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    assert Responses(tokens, real).lists() == [[7, 8, 1], [9, 1]]


def test_decoding_stops_when_every_row_has_ended():
    model, forwards = tiny.causal("gpt2"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = 0
    free = generate(model, [[5]], max_tokens=30, **SPECIAL)
    assert len(forwards) == len(free.lists()[0]) == 30
    forwards.clear()
    uniforms = torch.zeros(2, 30)  # the first token with any probability
    with torch.no_grad():
        model.lm_head.weight[tiny.PAD] = 0
    found = generate(model, [[5], [6, 7]], max_tokens=30, uniforms=uniforms, eos_id=tiny.PAD, pad_id=tiny.EOS)
    assert found.lists() == [[tiny.PAD], [tiny.PAD]] and len(forwards) == 1


def test_prompts_may_be_vectors():
    model, prompts = tiny.causal(), ragged()
    wanted = generate(model, prompts, max_tokens=4, **SPECIAL).lists()
    assert generate(model, list(map(torch.tensor, prompts)), max_tokens=4, **SPECIAL).lists() == wanted


def test_no_prompt_no_response():
    assert generate(tiny.causal(), [], max_tokens=3, **SPECIAL).tokens.shape == (0, 3)
    assert generate(tiny.causal(), [], max_tokens=[], **SPECIAL).lists() == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_the_model_is_left_as_it_was(kind, as_when_large):
    model = tiny.causal(kind, **{name: 0.5 for name in tiny.DROPOUTS.split()}).train()
    next(m for m in model.modules() if not list(m.children())).eval()  # some parts train, some do not
    before = state_of(model)
    first, second = (generate(model, ragged(), max_tokens=9, **SPECIAL) for _ in range(2))
    assert first.lists() == second.lists() and not first.tokens.requires_grad
    assert state_of(model) == before
    model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("in the middle")))
    before = state_of(model)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(KeyError):
            generate(model, ragged(), max_tokens=9, dtype=dtype, **SPECIAL)
        assert state_of(model) == before


def test_a_model_that_serves_the_forest_goes_on_serving_it():
    model = tiny.causal()
    serve_forest(model)
    before = state_of(model)
    generate(model, ragged(), max_tokens=3, **SPECIAL)
    assert state_of(model) == before and has_forest(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_sampled_with(kind, as_when_large):
    model = add_adapter(tiny.causal(kind), rank=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw))
    before, uniforms = state_of(model), uniforms_of(7, 12)
    adapted = generate(model, ragged(), max_tokens=12, uniforms=uniforms, **SPECIAL).lists()
    assert state_of(model) == before
    with model.disable_adapter():
        bare = generate(model, ragged(), max_tokens=12, uniforms=uniforms, **SPECIAL).lists()
    merged = model.merge_and_unload()
    assert generate(merged, ragged(), max_tokens=12, uniforms=uniforms, **SPECIAL).lists() == adapted != bare


def test_a_model_that_gives_the_logits_of_all_places():
    model, forward = tiny.causal(), tiny.causal().forward
    wanted = generate(model, ragged(), max_tokens=5, **SPECIAL).lists()
    model.forward = lambda logits_to_keep, **keys: forward(**keys)
    serve_forest(model)
    forward.__self__.set_attn_implementation("forest")
    assert generate(model, ragged(), max_tokens=5, **SPECIAL).lists() == wanted


def test_on_a_cpu_the_cache_of_a_bfloat16_rollout_is_float32():
    """Attention to bfloat16 keys of one query is twice as slow there."""
    model = tiny.causal()
    serve_forest(model)
    assert decoders.decoder_of(model, [[5]], 2, torch.bfloat16).cache.dtype == torch.float32
    assert decoders.decoder_of(model, [[5]], 2, None).cache.dtype is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_bfloat16_is_autocast(kind, seen, as_when_large):
    model, prompts = tiny.causal(kind), ragged()
    found = generate(model, prompts, max_tokens=9, uniforms=uniforms_of(7, 9), dtype="bfloat16", **ENDLESS)
    order = sorted(range(7), key=lambda i: (-len(prompts[i]), prompts[i]))
    exact, low = [], []
    for i in order:
        row = torch.tensor([prompts[i] + found.lists()[i]])
        with torch.no_grad():
            exact.append(model(row).logits[0, len(prompts[i]) - 1 : -1])
            with torch.autocast("cpu", torch.bfloat16):
                low.append(model(row).logits[0, len(prompts[i]) - 1 : -1])
    drawn, exact, low = torch.stack(seen, 1), torch.stack(exact), torch.stack(low)
    assert tiny.far(drawn, exact) < 0.1 and tiny.far(low, exact) > 1e-3
    assert (drawn - exact).square().mean() < 2 * (low - exact).square().mean()


def test_the_callers_autocast_makes_no_difference(seen):
    model = tiny.causal()
    generate(model, ragged(), max_tokens=3, **ENDLESS)
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, ragged(), max_tokens=3, **ENDLESS)
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:]))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompts": [[5], []]}, "prompts: row 1 is empty"),
        ({"prompts": [[5], [6] * 60]}, "prompts: row 1 has 60 tokens, with a response of 5 too many .* 64"),
        ({"max_tokens": [5]}, "max_tokens has 1 rows, prompts 2"),
        ({"max_tokens": [5, 0]}, "max_tokens of row 1 is 0"),
        ({"max_tokens": 0}, "max_tokens of row 0 is 0"),
        ({"uniforms": torch.zeros(2, 4)}, r"uniforms have the shape \(2, 4\), at least \(2, 5\)"),
        ({"uniforms": torch.zeros(3, 5)}, r"uniforms have the shape \(3, 5\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"rows": 0}, "rows"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_computed(wrong, says):
    model = tiny.causal()
    model.register_forward_hook(lambda *_: pytest.fail("computed"))
    right = {"prompts": [[5], [6, 7]], "max_tokens": 5, "uniforms": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=says):
        generate(model, **{**right, **wrong}, **SPECIAL)


def test_a_prompt_and_its_response_may_fill_the_context():
    for kind in ("gpt2", "opt", "llama"):
        assert len(generate(tiny.causal(kind), [[5] * 60], max_tokens=4, **ENDLESS).lists()[0]) == 4


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="is no causal language model"):
        generate(tiny.scorer("bert"), [[5]], max_tokens=2, **SPECIAL)


@pytest.mark.parametrize(("kind", "way"), [("bart", "alike"), ("mamba", "anew"), ("bloom", "padded")])
def test_what_reads_no_padding_is_decoded_otherwise(kind, way):
    """Rows of one length side by side, or whole rows anew: the plain greedy ones, whatever ends first."""
    model, prompts = tiny.causal(kind, seed=3), ragged()
    with decoders.prepared(model):
        assert decoders.way_of(model) == way
    found = generate(model, [*prompts, prompts[2]], max_tokens=[4, 1, 5, 6, 2, 3, 6, 3], **ENDLESS).lists()
    for prompt, response in zip([*prompts, prompts[2]], found, strict=True):
        row = list(prompt)
        for token in response:
            with torch.no_grad():
                logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            row.append(token)
