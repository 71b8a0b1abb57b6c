"""Log-probabilities chunk by chunk: those of the whole logits, every gradient, and never the whole."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch.nn import functional

from tasks.lm.logprobs import chunked as logprobs
from tasks.lm.logprobs.chunked import kl_nats, read_tokens, summed_nll

STATES, WIDTH, VOCABULARY = 40, 16, 50
WHOLE = STATES * VOCABULARY


def drawn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(bias: bool = True, trains=(True, True, True)):
    """States, embeddings, bias; 70 predictions at 40 places, out of order, some repeated with one token."""
    tensors = [drawn(STATES, WIDTH), drawn(VOCABULARY, WIDTH, seed=1)]
    tensors.append(drawn(VOCABULARY, seed=2) if bias else None)
    for tensor, learns in zip(tensors, trains, strict=True):
        if tensor is not None:
            tensor.requires_grad_(learns)
    draw = torch.Generator().manual_seed(3)
    places = torch.cat([torch.randperm(STATES, generator=draw), torch.randint(5, 9, (30,), generator=draw)])
    tokens = torch.randint(0, VOCABULARY, (70,), generator=draw)
    tokens[-10:] = tokens[-1]
    return tensors, places, tokens


def plain(states, weight, bias, places, tokens, temperature=1.0):
    """Log-probability and entropy of each token through the whole logits, by autograd."""
    logits = states if weight is None else functional.linear(states, weight, bias)
    logp = (logits[places].float() / temperature).log_softmax(-1)
    return logp.gather(1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def taken(tensors) -> list[torch.Tensor]:
    found = [t.grad for t in tensors if t is not None and t.requires_grad]
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return found


def same(found, wanted) -> bool:
    return len(found) == len(wanted) and all(
        tiny.far(a, b) <= 1e-5 for a, b in zip(found, wanted, strict=True)
    )


def test_by_hand():
    """Odds 1 : 3 -> p = 1/4, 3/4; at temperature 1/2 the odds are 1 : 9."""
    states, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [math.log(3)]])
    places, tokens = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    said = read_tokens(states, weight, None, places, tokens, entropy=True, best=True)
    assert said.logprobs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4), math.log(1 / 2)])
    spread = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert said.entropy.tolist() == pytest.approx([spread, spread, math.log(2)])
    assert said.best[:2].tolist() == [1, 1]
    half = read_tokens(states, weight, None, places, tokens, 0.5)
    assert half.logprobs.tolist()[:2] == pytest.approx([math.log(0.1), math.log(0.9)])
    assert (half.entropy, half.best) == (None, None)
    never = torch.tensor([[-math.inf, 0.0, math.log(3)]])  # a token that cannot come
    said = read_tokens(never, None, None, places[:1], tokens[:1], entropy=True)
    assert said.entropy.tolist() == pytest.approx([spread]) and said.logprobs.tolist() == [-math.inf]
    assert summed_nll(states, weight, None, places, tokens).item() == pytest.approx(math.log(4 * 4 / 3 * 2))
    some = summed_nll(states, weight, None, places, tokens, torch.tensor([1.0, 0.0, 0.5]))
    assert some.item() == pytest.approx(math.log(4) + 0.5 * math.log(2))


def test_gradients_by_hand():
    """Of −log p(0) − 2 log p(1) at p = (1/4, 3/4): 3 p − (1, 2) = (−1/4, 1/4)."""
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    summed_nll(logits, None, None, torch.tensor([0, 0, 0]), torch.tensor([1, 0, 1])).backward()
    assert logits.grad.tolist()[0] == pytest.approx([-0.25, 0.25])
    taken([logits])
    said = read_tokens(logits, None, None, torch.tensor([0]), torch.tensor([0]), entropy=True)
    said.entropy.sum().backward()
    spread = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)  # dH/dz = −p (log p + H)
    wanted = [-0.25 * (math.log(1 / 4) + spread), -0.75 * (math.log(3 / 4) + spread)]
    assert logits.grad.tolist()[0] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 40, None])
@pytest.mark.parametrize("bias", [False, True])
def test_the_sum_is_that_of_the_whole_logits(chunk, bias):
    tensors, places, tokens = inputs(bias)
    weights = drawn(70, seed=4).abs()
    for given in (None, weights):
        wanted = -(plain(*tensors, places, tokens)[0] * (1 if given is None else given)).sum()
        (3 * wanted).backward()
        gradients = taken(tensors)
        found = summed_nll(*tensors, places, tokens, given, chunk=chunk)
        (3 * found).backward()
        assert tiny.far(found, wanted) <= 1e-5 and same(taken(tensors), gradients)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 40, None])
@pytest.mark.parametrize(("temperature", "bias"), [(1.0, False), (0.7, True)])
def test_each_token_is_that_of_the_whole_logits(monkeypatch, kept, chunk, temperature, bias):
    """Every token with a gradient of its own, and every entropy; kept for the backward or made again."""
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", {"cpu": 20 * VOCABULARY if kept else 0})
    tensors, places, tokens = inputs(bias)
    up, down = drawn(70, seed=5), drawn(70, seed=6)
    logp, entropy = plain(*tensors, places, tokens, temperature)
    for a, b in ((1, 0), (0, 1), (1, 1)):
        (a * logp @ up + b * entropy @ down).backward(retain_graph=True)
        gradients = taken(tensors)
        said = read_tokens(*tensors, places, tokens, temperature, entropy=True, best=True, chunk=chunk)
        assert tiny.far(said.logprobs, logp) <= 1e-5 and tiny.far(said.entropy, entropy) <= 1e-5
        sum(([said.logprobs @ up] if a else []) + ([said.entropy @ down] if b else [])).backward()
        assert same(taken(tensors), gradients)
    logits = functional.linear(*tensors)[places]
    assert torch.equal(said.best, logits.argmax(-1))


@pytest.mark.parametrize("used", [False, True])
def test_an_entropy_that_no_loss_uses_costs_the_backward_nothing(monkeypatch, used):
    seen, slopes = [], logprobs._slopes
    monkeypatch.setattr(logprobs, "_slopes", lambda *a: (seen.append(a[4]), slopes(*a))[1])
    tensors, places, tokens = inputs()
    (plain(*tensors, places, tokens)[0].sum()).backward()
    gradients = taken(tensors)
    said = read_tokens(*tensors, places, tokens, entropy=True, chunk=7)
    (said.logprobs.sum() + (0 * said.entropy.sum() if used else 0)).backward()
    assert all((spread is None) is not used for spread in seen) and len(seen) == 6
    assert same(taken(tensors), gradients)


def test_the_kl_by_hand():
    """p = (1/4, 3/4), q = (1/2, 1/2); at temperature 1/2 p = (1/10, 9/10). No token of p, no cost."""
    p, q = (torch.tensor([[0.0, math.log(3), -math.inf]]), torch.zeros(1, 3))
    q[0, 2] = -math.inf
    first = torch.tensor([0])
    own, other = (p, None, None, first), (q, None, None, first)
    wanted = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_nats(own, other).tolist() == pytest.approx([wanted])
    assert kl_nats(own, other, 0.5).tolist() == pytest.approx([0.1 * math.log(0.2) + 0.9 * math.log(1.8)])
    assert kl_nats(own, own).tolist() == [0]
    with pytest.raises(ValueError, match="3 and 2 tokens"):
        kl_nats(own, (q[:, :2], None, None, first))


@pytest.mark.parametrize("chunk", [1, 7, 70, None])
def test_the_kl_is_that_of_the_whole_logits(chunk):
    """One model by its states and embeddings, the other by its logits, at places of their own."""
    (states, weight, bias), places, _ = inputs()
    draw = torch.Generator().manual_seed(9)
    logits, elsewhere = drawn(60, VOCABULARY, seed=8), torch.randint(0, 60, (70,), generator=draw)
    p = functional.linear(states, weight, bias)[places].div(0.7).log_softmax(-1)
    q = logits[elsewhere].div(0.7).log_softmax(-1)
    wanted = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    with tiny.Largest() as seen:
        found = kl_nats((states, weight, bias, places), (logits, None, None, elsewhere), 0.7, chunk=chunk)
    assert tiny.far(found, wanted) <= 1e-5 and not found.requires_grad
    assert seen.elements <= max((chunk or 70) * VOCABULARY, 70 * WIDTH)


@pytest.mark.parametrize("trains", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_is_frozen_gets_no_gradient(trains):
    tensors, places, tokens = inputs(trains=trains)
    (-plain(*tensors, places, tokens)[0].sum()).backward()
    gradients = taken(tensors)
    assert len(gradients) == 1
    summed_nll(*tensors, places, tokens).backward()
    assert same(taken(tensors), gradients)
    (-read_tokens(*tensors, places, tokens).logprobs.sum()).backward()
    assert same(taken(tensors), gradients)


def test_tied_embeddings_get_both_gradients():
    weight = drawn(VOCABULARY, WIDTH, seed=1).requires_grad_()
    ids, places, tokens = torch.arange(20), torch.arange(20), torch.arange(20) + 5
    found = []
    for chunked in (False, True):
        states = functional.embedding(ids, weight).tanh()
        if chunked:
            summed_nll(states, weight, None, places, tokens, chunk=6).backward()
        else:
            (-plain(states, weight, None, places, tokens)[0].sum()).backward()
        found += taken([weight])
    assert same(found[:1], found[1:])


@pytest.mark.parametrize("door", [summed_nll, lambda *given: -read_tokens(*given).logprobs.sum()])
def test_other_places_change_nothing_and_get_nothing(door):
    """Rows that predict nothing: padding, or the prompt."""
    (states, weight, bias), places, tokens = inputs()
    wide = torch.cat([drawn(3, WIDTH, seed=8) * 1e9, states.detach(), drawn(2, WIDTH, seed=9)])
    wide.requires_grad_()
    wanted, found = door(states, weight, bias, places, tokens), door(wide, weight, bias, places + 3, tokens)
    assert tiny.far(found, wanted) <= 1e-6
    wanted.backward()
    own = [g.clone() for g in taken([states, weight, bias])]
    found.backward()
    padded, *others = taken([wide, weight, bias])
    assert same([padded[3:-2], *others], own)
    assert not padded[:3].any() and not padded[-2:].any()


def test_no_prediction_at_all():
    (states, weight, bias), _, _ = inputs()
    none = torch.zeros(0, dtype=torch.long)
    loss = summed_nll(states, weight, bias, none, none)
    loss.backward()
    assert loss.item() == 0 and not any(g.any() for g in taken([states, weight, bias]))
    said = read_tokens(states, weight, bias, none, none, entropy=True, best=True)
    said.logprobs.sum().backward()
    assert len(said.logprobs) == len(said.entropy) == len(said.best) == 0


@pytest.mark.parametrize("entropy", [False, True])
def test_the_whole_logits_are_never_made(monkeypatch, entropy):
    """The largest tensor is that of a chunk, or of the embeddings, forward and backward."""
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", {"cpu": 0})
    tensors, places, tokens = inputs()
    bound = max(VOCABULARY * WIDTH, 5 * VOCABULARY)
    assert bound < WHOLE / 2
    with tiny.Largest() as seen:
        summed_nll(*tensors, places, tokens, chunk=5).backward()
        said = read_tokens(*tensors, places, tokens, entropy=entropy, best=True, chunk=5)
        (said.logprobs.sum() + (said.entropy.sum() if entropy else 0)).backward()
    assert 5 * VOCABULARY <= seen.elements <= bound
    with tiny.Largest() as seen:
        plain(*tensors, places, tokens)[0].sum().backward()
    assert seen.elements >= WHOLE


def test_chunks_have_a_bound_and_are_alike():
    sizes = lambda places, vocabulary: [len(c.places) for c in logprobs._chunks(places, vocabulary, None)]  # noqa: E731
    assert sizes(torch.arange(600), 32_000) == [200, 200, 200]
    assert sizes(torch.arange(600).repeat(3), 1000) == [600]


def test_the_same_bits_every_time(monkeypatch):
    """On several threads, with many predictions from one place."""
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", {"cpu": 0})
    states, weight = drawn(64, 32).requires_grad_(), drawn(100, 32, seed=1).requires_grad_()
    draw = torch.Generator().manual_seed(3)
    places = torch.randint(0, 3, (60_000,), generator=draw)
    tokens, up = torch.randint(0, 100, (60_000,), generator=draw), drawn(60_000, seed=5)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            summed_nll(states, weight, None, places, tokens, up).backward()
            (read_tokens(states, weight, None, places, tokens).logprobs @ up).backward()
            found.append(taken([states, weight]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_bfloat16_products_and_float32_sums():
    """Under autocast, near what float32 gives; of lower weights, lower gradients."""
    tensors, places, tokens = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_nll(*tensors, places, tokens, chunk=7)
        said = read_tokens(*tensors, places, tokens, entropy=True, chunk=7)
    assert loss.dtype == said.logprobs.dtype == said.entropy.dtype == torch.float32
    wanted = plain(*tensors, places, tokens)
    assert tiny.far(loss, -wanted[0].sum()) <= 1e-2 and 1e-4 < tiny.far(said.logprobs, wanted[0]) <= 2e-2
    loss.backward()
    found = taken(tensors)
    (-said.logprobs.sum()).backward()
    again = taken(tensors)
    (-wanted[0].sum()).backward()
    for one, other, exact in zip(found, again, taken(tensors), strict=True):
        assert one.dtype == torch.float32 and tiny.far(one, exact) <= 2e-2 and tiny.far(other, exact) <= 2e-2
    lower = [t.detach().bfloat16().requires_grad_() for t in tensors]
    summed_nll(*lower, places, tokens).backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in lower)


def test_small_probabilities_are_summed_in_float32():
    """4096 equal logits in bfloat16: a bfloat16 sum of their exponentials would stop at 256."""
    states = torch.zeros(1, 4096, dtype=torch.bfloat16)
    said = read_tokens(states, None, None, torch.tensor([0]), torch.tensor([7]), entropy=True)
    assert said.logprobs.item() == pytest.approx(-math.log(4096), rel=1e-6)
    assert said.entropy.item() == pytest.approx(math.log(4096), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("lower", [False, True])
def test_on_a_gpu(monkeypatch, lower):
    """The whole logits' numbers; the same bits, also with one place read often; memory of chunks alone."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cuda": 0})
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", {"cuda": 0})
    draw = torch.Generator("cuda").manual_seed(0)
    keys = {"generator": draw, "device": "cuda"}
    tensors = [torch.randn(4096, 64, **keys), torch.randn(3000, 64, **keys) / 4, torch.randn(3000, **keys)]
    for tensor in tensors:
        tensor.requires_grad_()
    places = torch.cat([torch.randperm(4096, **keys), torch.randint(0, 3, (50_000,), **keys)])
    tokens, up = torch.randint(0, 3000, places.shape, **keys), torch.randn(len(places), **keys)
    logp, entropy = plain(*tensors, places, tokens, 0.7)
    (logp @ up + entropy @ up).backward()
    wanted = [logp.detach(), entropy.detach(), *taken(tensors)]
    del logp, entropy
    found = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=lower):
            said = read_tokens(*tensors, places, tokens, 0.7, entropy=True)
        (said.logprobs @ up + said.entropy @ up).backward()
        each = [said.logprobs.detach(), said.entropy.detach(), *taken(tensors)]
        with torch.autocast("cuda", torch.bfloat16, enabled=lower):
            loss = summed_nll(*tensors, places, tokens, up)
        loss.backward()
        found.append([*each, loss.detach(), *taken(tensors)])
        assert torch.cuda.max_memory_allocated() - before < 4 * 4096 * 3000 / 2
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    bound = 3e-2 if lower else 1e-5
    assert all(tiny.far(a.cpu(), b.cpu()) <= bound for a, b in zip(found[0][:5], wanted, strict=True))
    (-(plain(*tensors, places, tokens)[0] * up).sum()).backward()
    gradients = taken(tensors)
    assert all(tiny.far(a.cpu(), b.cpu()) <= bound for a, b in zip(found[0][6:], gradients, strict=True))


def test_an_entropy_whose_token_has_no_probability_has_a_gradient():
    """Of two tokens as likely and one that cannot be: H = log 2, slope 0; nothing is 0 · ∞."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    said = read_tokens(logits, None, None, torch.tensor([0]), torch.tensor([1]), entropy=True)
    assert said.entropy.item() == pytest.approx(math.log(2))
    (said.entropy + said.logprobs).sum().backward()
    assert logits.grad.tolist() == [pytest.approx([-0.5, 0.5, 0.0])]
