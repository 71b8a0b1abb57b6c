"""What a causal model predicts with: the hidden states that reach its output embeddings, and those.

The model runs as a whole, inside its adapters and wrappers, but its embeddings get next to nothing to read:
:mod:`tasks.lm.logprobs.chunked` applies them, where logits are wanted and chunk by chunk. A model whose
logits are more than its embeddings over its states (Gemma 2 caps them, Cohere scales them, an adapter may sit
on them) is found out at its first forward, and gives its own logits, of the wanted places only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.lm.adapters.kinds import check_adapters
from tasks.lm.logprobs.chunked import TokenReadings, kl_nats, product_dtype, read_tokens, summed_nll
from tasks.lm.logprobs.last_mlp import last_mlp_at
from tasks.lm.model.kinds import unwrapped

LOUD = 1e3  # the largest logit of the trial's second state: caps of 30 and 50 show
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; 2e-2 in half precision

_is_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Predictions:
    """N places that predict a token each, and what their logits are made of."""

    hidden: Tensor  # [T, H] last hidden states of the batch; right at `places` only
    states: Tensor  # the same; or the model's own logits [U, V] of the distinct places
    weight: Tensor | None  # [V, H]; None: `states` are logits
    bias: Tensor | None  # [V]
    places: Tensor  # [N] int64, rows of `states`

    def logits(self) -> Tensor:
        """Of all N places at once, [N, V] float32."""
        states = self.states[self.places]
        logits = states if self.weight is None else functional.linear(states, self.weight, self.bias)
        return logits.float()

    def summed_nll(self, tokens: Tensor) -> Tensor:
        """Sum of −log p of the tokens [N] there, nats."""
        return summed_nll(self.states, self.weight, self.bias, self.places, tokens)

    def read(self, tokens: Tensor, temperature: float = 1.0, **asked: bool) -> TokenReadings:
        """Log-probabilities of the tokens [N] there; `asked` as in :mod:`tasks.lm.logprobs.chunked`."""
        return read_tokens(self.states, self.weight, self.bias, self.places, tokens, temperature, **asked)

    def kl_nats(self, other: Predictions, temperature: float = 1.0) -> Tensor:
        """KL from another model's predictions of the same N tokens to these, [N], without a gradient."""
        own, others = ((p.states, p.weight, p.bias, p.places) for p in (self, other))
        return kl_nats(own, others, temperature)


def check_causal(model: nn.Module) -> None:
    """Refuse what predicts no next token.

    Raises:
        ValueError: an encoder-decoder, an encoder, a model without output embeddings, or one under an
            adapter that is not served (:func:`tasks.lm.adapters.kinds.check_adapters`).
    """
    check_adapters(model)
    bare = unwrapped(model)
    ways = {module.is_causal for module in bare.modules() if hasattr(module, "is_causal")}
    if bare.config.is_encoder_decoder or bare.get_output_embeddings() is None or ways == {False}:
        raise ValueError(f"{type(bare).__name__} is no causal language model")


def predict(model: nn.Module, run: Callable[[nn.Module], Any], places: Tensor) -> Predictions:
    """One forward for N predictions; two, the first time, of a model whose logits are its own.

    Args:
        model: a causal language model, bare or under PEFT.
        run: `run(model)` is the model's output for a batch [B, S].
        places: [N] int64, of the B·S places.
    """
    head = unwrapped(model).get_output_embeddings()
    if type(head).forward is not nn.Linear.forward:  # an adapter starts as nothing, and would pass the trial
        _is_plain[head] = False
    if head not in _is_plain:
        hidden, _is_plain[head] = _try(model, head, run, places)
    elif _is_plain[head]:
        hidden, _ = _run(model, head, run, places, lambda hidden: hidden[:0])
    if _is_plain[head]:
        return Predictions(hidden, hidden, head.weight, head.bias, places)
    distinct, rows = places.unique(return_inverse=True)
    hidden, logits = _run(model, head, run, places, lambda hidden: hidden.index_select(0, distinct))
    return Predictions(hidden, logits, None, None, rows)


def _run(model, head, run, places: Tensor, narrow: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The states [T, H] that reach the embeddings, and the logits of what these get in their stead."""
    seen = []

    def give(_, inputs):
        seen.append(inputs[0].flatten(0, -2))
        return (narrow(seen[0])[None],)

    hook = head.register_forward_pre_hook(give)
    try:
        with last_mlp_at(model, places):
            out = run(model)
    finally:
        hook.remove()
    return seen[0], out.logits[0]


def _try(model, head: nn.Linear, run, places: Tensor) -> tuple[Tensor, bool]:
    """The states, and whether the model's logits of one place, and of a loud state, are the embeddings'."""
    wanted = []

    @torch.no_grad()
    def narrow(hidden: Tensor) -> Tensor:
        loud = torch.arange(hidden.shape[1], device=hidden.device).sin().to(hidden.dtype)  # no random number:
        loud *= LOUD / functional.linear(loud, head.weight).abs().max()  # a resumed run tries again
        rows = torch.cat([hidden[places[:1]], loud[None]])
        wanted.append(functional.linear(rows, head.weight, head.bias).float())
        return rows

    hidden, logits = _run(model, head, run, places, narrow)
    far = (logits.detach().float() - wanted[0]).abs().amax(1) / wanted[0].abs().amax(1)
    return hidden, bool((far <= ROUNDING.get(product_dtype(hidden), 2e-2)).all())
