"""Small encoder-decoders that say something, and what they say of one row by their own forward."""

from __future__ import annotations

import tiny
import torch

from tasks.lm import AutoModelForSeq2SeqLMWithValueHead
from tasks.lm.attention.padding import lay_out

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # as for T5 1.1: no scaling either
UNEVEN = {"num_layers": 3, "num_decoder_layers": 2}
KINDS = {
    "t5": ("t5", {}), "t5 v1.1": ("t5", GATED | UNEVEN), "mt5": ("mt5", {}), "umt5": ("umt5", tiny.T5),
    "bart": ("bart", {"decoder_layers": 3}), "m2m_100": ("m2m_100", {}),
}  # fmt: skip
PACKED = ("t5", "t5 v1.1", "mt5")


def model_of(name: str = "t5", seed: int = 0, **keys):
    """T5's own start is far from uniform; that of the others is made so."""
    kind, own = KINDS[name]
    model = tiny.seq2seq(kind, seed, **{**tiny.NO_DROPOUT, **own, **keys})
    for parameter in model.parameters() if "t5" not in kind else ():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    if own.get("tie_word_embeddings", True) is False:  # transformers ties those that it makes all the same
        torch.manual_seed(seed + 9)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def close(found, wanted, most: float = 1e-5) -> bool:
    """Of nats and the like: to so much, or of numbers above 1 to such a part."""
    return bool(((found - wanted).abs() <= most * wanted.abs().clamp(min=1)).all())


def valued(model, **keys) -> AutoModelForSeq2SeqLMWithValueHead:
    """With a value head that is not zero."""
    wrapped = AutoModelForSeq2SeqLMWithValueHead(model, **keys)
    wrapped.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    return wrapped


def rows(lengths=(5, 9, 1), tokens=(4, 1, 6), seed: int = 1):
    """Prompts and responses, then the first prompt again with another response, and the second with none."""
    prompts, responses = tiny.drawn(lengths, seed), tiny.drawn(tokens, seed + 1)
    return [*prompts, prompts[0], prompts[1]], [*responses, [7, tiny.EOS], []]


def laid_out(*given):
    return lay_out(*(given or rows()), tiny.PAD, "cpu")


def logits_of_row(model, prompt, response):
    """[R, V], by the model's own forward."""
    asking = [model.config.decoder_start_token_id, *response[:-1]]
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([asking])).logits[0]


def alone(wrapped, prompt, response, temperature: float):
    """Log-probabilities, entropies and values of one response, by the definition. Each [R]."""
    model = wrapped.pretrained_model
    start = getattr(model, "get_base_model", lambda: model)().config.decoder_start_token_id
    out = model(
        input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *response[:-1]]]),
        output_hidden_states=True,
    )  # fmt: skip
    logp = (out.logits[0] / temperature).log_softmax(-1)
    values = wrapped.v_head.summary(out.decoder_hidden_states[-1][0])[:, 0]
    return logp[range(len(response)), response], -(logp.exp() * logp).sum(-1), values
