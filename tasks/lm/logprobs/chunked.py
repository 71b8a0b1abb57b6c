"""Log-probabilities of wanted tokens, from hidden states and the output embeddings, never through [T, V].

Only the places that predict a wanted token reach the embeddings, each once and some hundreds at a time; the
softmax and every sum over chunks are float32, under bf16 autocast too. Two doors: :func:`summed_nll` has one
upstream gradient and computes all of its own in the forward, while a chunk's logits are at hand;
:func:`read_tokens` takes a gradient for each token, and its backward makes the logits of a chunk again. No
sum depends on the order of threads: the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

LEAST_PLACES = 256  # of a chunk; fewer starve the matrix products
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**28}  # more places while their logits are no more than these
KEPT_LOGITS = {"cpu": 2**23, "cuda": 2**28}  # so many are kept for the backward; the rest is made again


# States [T, H], output embeddings [V, H] or None, bias [V] or None, and places [N]: see summed_nll
Prediction = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


@dataclass(frozen=True, slots=True)
class TokenReadings:
    """What a model says of N tokens."""

    logprobs: Tensor  # [N] nats
    entropy: Tensor | None  # [N] nats, of the distribution each token is drawn from
    best: Tensor | None  # [N] int64, the most probable token in each one's stead


def summed_nll(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    places: Tensor,
    tokens: Tensor,
    token_weights: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Sum of −w log p over N tokens, nats, float32.

    Args:
        states: [T, H] hidden states; [T, V] logits where `weight` is None.
        weight: [V, H] output embeddings.
        bias: [V], or None.
        places: [N] int64, the row of `states` that predicts each token; one row may predict several.
        tokens: [N] int64.
        token_weights: [N] w, without a gradient; None: 1.
        chunk: most places whose logits exist at once.
    """
    if token_weights is None:
        token_weights = torch.ones(len(tokens), device=states.device)
    asked = chunk, torch.is_grad_enabled()
    return _SummedNLL.apply(states, weight, bias, places, tokens, token_weights, asked)


def read_tokens(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    places: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    best: bool = False,
    chunk: int | None = None,
) -> TokenReadings:
    """Log-probability of each of N tokens under softmax(logits / temperature), float32; more on demand.

    Arguments as in :func:`summed_nll`. Log-probabilities and entropies carry gradients; an entropy that no
    loss uses costs the backward nothing.
    """
    asked = temperature, entropy, best, chunk, torch.is_grad_enabled()
    return TokenReadings(*_ReadTokens.apply(states, weight, bias, places, tokens, asked))


@torch.no_grad()
def kl_nats(
    own: Prediction, other: Prediction, temperature: float = 1.0, *, chunk: int | None = None
) -> Tensor:
    """Exact KL(own || other) of the distributions that N tokens are drawn from, float32, no gradient. -> [N].

    Args:
        own: states, weight, bias and places as in :func:`summed_nll`.
        other: the same of another model, for the same N tokens.
        temperature: the logits of both are divided by it.
        chunk: most places whose logits exist at once.

    Raises:
        ValueError: the two predict over vocabularies of different sizes.
    """
    heads = [_Head(states, weight, bias, product_dtype(states)) for states, weight, bias, _ in (own, other)]
    sizes = [head.vocabulary for head in heads]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a KL needs one vocabulary; {sizes[0]} and {sizes[1]} tokens are predicted over")
    most, kl = chunk or _most(own[3].device, sizes[0]), torch.empty(len(own[3]), device=own[3].device)
    for which in torch.arange(len(kl), device=kl.device).split(most):
        logp, logq = (
            head.logp(head.at(parts[3][which]), temperature)
            for head, parts in zip(heads, (own, other), strict=True)
        )
        gap, p = logp - logq, logp.exp_()
        kl[which] = gap.mul_(p).masked_fill_(p == 0, 0).sum(-1)  # p log p vanishes with p
    return kl


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some places, each once, and the predictions read there.

    Miniature: places 5 3 5 in chunks of one place -> (3; 1; 0) and (5; 0 2; 0 0).
    """

    places: Tensor  # [C] int64, ascending
    which: Tensor  # [n] int64, index of the prediction
    rows: Tensor  # [n] int64, index into `places`


def _most(device: torch.device, vocabulary: int) -> int:
    """Places of a chunk."""
    return max(LEAST_PLACES, CHUNK_LOGITS.get(device.type, 0) // vocabulary)


def _chunks(places: Tensor, vocabulary: int, most: int | None) -> list[_Chunk]:
    most = most or _most(places.device, vocabulary)
    distinct, rows = places.unique(return_inverse=True)
    rows, which = rows.sort(stable=True)
    size = -(-len(distinct) // max(1, -(-len(distinct) // most)))  # as many chunks as needed, all alike
    firsts = torch.arange(0, len(distinct) + size, max(1, size), device=places.device)
    bounds = torch.searchsorted(rows, firsts).tolist()
    return [
        _Chunk(distinct[i * size : (i + 1) * size], which[first:last], rows[first:last] - i * size)
        for i, (first, last) in enumerate(pairwise(bounds))
    ]


class _Head:
    """Output embeddings over some states, and the gradients of both; products in `dtype`."""

    def __init__(self, states, weight, bias, dtype: torch.dtype, needs=(False, False, False)) -> None:
        self.states, self.dtype = states, dtype
        self.weight, self.bias = (None if x is None else x.to(dtype) for x in (weight, bias))
        self.vocabulary = states.shape[1] if weight is None else len(weight)
        of_states = torch.zeros_like(states) if needs[0] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
        self.gradients, self.needs_weight = [of_states, None, of_bias], needs[1]

    def at(self, places: Tensor) -> Tensor:
        """[C] -> [C, H]."""
        return self.states.index_select(0, places).to(self.dtype)

    def logits(self, some: Tensor, temperature: float = 1.0) -> Tensor:
        """[C, H] -> [C, V]; float32 where a temperature divides them."""
        logits = some if self.weight is None else functional.linear(some, self.weight, self.bias)
        return logits if temperature == 1.0 else logits.float() / temperature

    def logp(self, some: Tensor, temperature: float = 1.0) -> Tensor:
        """[C, H] -> [C, V] float32."""
        return self.logits(some, temperature).log_softmax(-1, dtype=torch.float32)

    def add(self, places: Tensor, some: Tensor, slopes: Tensor) -> None:
        """What the slopes [C, V] of the logits of some places mean for all three."""
        of_states, of_weight, of_bias = self.gradients
        if of_bias is not None:
            of_bias += slopes.sum(0)
        slopes = slopes.to(self.dtype)
        if of_states is not None:
            found = slopes if self.weight is None else slopes @ self.weight
            of_states.index_copy_(0, places, found.to(of_states.dtype))
        if self.needs_weight:
            self.gradients[1] = _plus_product(of_weight, slopes.mT, some)

    def sums(self) -> tuple[Tensor | None, ...]:
        """The gradients of states, embeddings and bias; None where none is wanted."""
        of_states, of_weight, of_bias = self.gradients
        if self.needs_weight and of_weight is None:
            of_weight = torch.zeros_like(self.weight, dtype=torch.float32)
        return of_states, of_weight, of_bias


def product_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which autocast, or else the states, want matrix products."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in float32, written over the total; None: nothing yet."""
    if total is None:
        is_low = a.is_cuda and a.dtype != torch.float32
        return torch.mm(a, b, out_dtype=torch.float32) if is_low else (a @ b).float()
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if total.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)


def _add_at(total: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """`total[places] += values`, places repeated or not, always in the same order."""
    if total.is_cuda:
        return total.index_put_((places,), values, accumulate=True)  # sorts; index_add_ has atomics
    return total.index_add_(0, places, values)  # a plain loop; index_put_ may have atomics


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [C, V], the largest logit and the logarithm of its probability, [C]; float32.

    log p = z − largest + its log p: that is at least −log V, and so exact. A softmax takes half of what a
    log-softmax and an exponential take.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    largest, where = logits.max(-1)
    return p, largest.float(), p.gather(1, where[:, None])[:, 0].log()


def _entropy(logits: Tensor, p: Tensor, largest: Tensor, of_it: Tensor) -> Tensor:
    """Entropy of each row, log Σ exp z − Σ p z; what :func:`_softmax` gives. -> [C]."""
    mean = torch.linalg.vecdot(p, logits.float())
    if mean.isnan().any():  # a token of no probability: 0 · −∞ is 0
        mean = torch.linalg.vecdot(p, logits.float().masked_fill(p == 0, 0))
    return largest - mean - of_it


def _slopes(
    p: Tensor, rows: Tensor, tokens: Tensor, of_logp: Tensor, spread: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Slopes with respect to the logits, written over the probabilities p. -> [C, V].

    In a row whose tokens t have upstream gradients g, and whose entropy H has e in all:
    Σ g·onehot(t) − p (Σ g + e (log p + H)).

    Args:
        p: [C, V].
        rows: [n], of each prediction.
        tokens: [n].
        of_logp: [n] g.
        spread: upstream gradients of the predictions' entropies [n], and H [C].
    """
    total = _add_at(p.new_zeros(len(p)), rows, of_logp)[:, None]
    if spread is None:
        slopes = p.mul_(-total)
    else:
        of_entropy = _add_at(p.new_zeros(len(p)), rows, spread[0])[:, None]
        surprise = p.log().clamp_(min=torch.finfo(p.dtype).min).add_(spread[1][:, None])  # 0 · log 0 is 0
        slopes = surprise.mul_(of_entropy).add_(total).mul_(p).neg_()
    _add_at(slopes.view(-1), rows * p.shape[1] + tokens, of_logp)
    return slopes


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, places, tokens, token_weights, asked):
        most, is_training = asked
        needs = [is_training and need for need in ctx.needs_input_grad[:3]]
        head = _Head(states, weight, bias, product_dtype(states), needs)
        total = torch.zeros((), device=states.device)
        for chunk in _chunks(places, head.vocabulary, most):
            some, wanted, weights = head.at(chunk.places), tokens[chunk.which], token_weights[chunk.which]
            logp = head.logp(some)
            total -= (weights * logp[chunk.rows, wanted]).sum()
            if any(needs):
                head.add(chunk.places, some, _slopes(logp.exp_(), chunk.rows, wanted, -weights))
        ctx.gradients = head.sums() if any(needs) else (None, None, None)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, None  # as with saved tensors, they serve one backward
        return *(None if g is None else g.mul_(upstream) for g in gradients), None, None, None, None


class _ReadTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, places, tokens, asked):
        temperature, with_entropy, with_best, most, is_training = asked
        ctx.set_materialize_grads(False)  # what no loss uses comes back as None, not as zeros
        head = _Head(states, weight, bias, product_dtype(states))
        ctx.chunks = _chunks(places, head.vocabulary, most)
        ctx.kept, ctx.entropies, ctx.temperature, ctx.dtype = [], [], temperature, head.dtype
        logprobs = torch.empty(len(tokens), device=states.device)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        best = torch.empty_like(tokens) if with_best else None
        room = KEPT_LOGITS.get(states.device.type, 0) if is_training else 0
        for chunk in ctx.chunks:
            logits = head.logits(head.at(chunk.places), temperature)
            p, largest, of_it = _softmax(logits)
            said = logits[chunk.rows, tokens[chunk.which]].float()
            logprobs[chunk.which] = said - largest[chunk.rows] + of_it[chunk.rows]
            if with_entropy:
                ctx.entropies.append(_entropy(logits, p, largest, of_it))
                entropy[chunk.which] = ctx.entropies[-1][chunk.rows]
            if with_best:
                best[chunk.which] = logits.argmax(-1)[chunk.rows]
            room -= p.numel()
            ctx.kept.append(p if room >= 0 else None)
        ctx.save_for_backward(states, weight, bias, tokens)
        return logprobs, entropy, best

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logprobs, of_entropy, _):
        states, weight, bias, tokens = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        head = _Head(states, weight, bias, ctx.dtype, ctx.needs_input_grad[:3])
        if of_logprobs is None:
            of_logprobs = torch.zeros(len(tokens), device=states.device)
        for i, chunk in enumerate(ctx.chunks):
            some = head.at(chunk.places)
            p = _softmax(head.logits(some, ctx.temperature))[0] if kept[i] is None else kept[i]
            ahead, spread = of_logprobs[chunk.which] / ctx.temperature, None
            if of_entropy is not None:
                spread = of_entropy[chunk.which] / ctx.temperature, ctx.entropies[i]
            slopes = _slopes(p, chunk.rows, tokens[chunk.which], ahead, spread)
            head.add(chunk.places, some, slopes)
            kept[i] = None
        return *head.sums(), None, None, None
