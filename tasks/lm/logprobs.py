"""Log-probabilities of tokens, float32."""

from __future__ import annotations

from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(logits / temperature), and the entropy there, nats.

    logits [..., V], tokens [...] -> [...], [...].
    """
    logp = (logits.float() / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens[..., None]).squeeze(-1), entropy
