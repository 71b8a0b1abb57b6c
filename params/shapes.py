"""How large a LLaMA-type model is, from the numbers of its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from params.inputs import BASES
from params.load import ParamsError
from params.schema import ModelParams


@dataclass(frozen=True, slots=True)
class Shape:
    """RMSNorm, rotary positions, gated MLP, no bias. LLaMA-7B: ``Shape(4096, 11008, 32, 32, 32, 32000)``."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool = False  # the head is the embedding

    @property
    def kv_hidden(self) -> int:
        """Elements of a token's keys; as many of its values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def of_block(self) -> int:
        """Parameters of one block: q and o, k and v, gate, up and down, two norms."""
        h, f = self.hidden, self.intermediate
        return 2 * h * h + 2 * h * self.kv_hidden + 3 * h * f + 2 * h

    @property
    def parameters(self) -> int:
        """All of the causal model; a matrix that serves as embedding and head counts once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.layers * self.of_block + embeddings + self.hidden

    @property
    def of_trunk(self) -> int:
        """Without the head: what a reward model has, but for its one row of scores."""
        return self.parameters - (0 if self.is_tied else self.vocabulary * self.hidden)

    def of_lora(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers of the blocks: rank × (inputs + outputs) each."""
        h, f, kv = self.hidden, self.intermediate, self.kv_hidden
        return self.layers * rank * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))


LLAMA_7B = Shape(4096, 11008, 32, 32, 32, 32000)
KNOWN = {
    "huggyllama/llama-7b": LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "huggyllama/llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "mistralai/Mistral-7B-v0.1": Shape(4096, 14336, 32, 32, 8, 32000),
    "meta-llama/Meta-Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": Shape(2048, 5632, 22, 32, 4, 32000),
}
KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
).split()


def shape_of(model: ModelParams) -> Shape:
    """The shape of a run's base model: of `model.config`, of the folder's config.json, of a known Hub id.

    Raises:
        ParamsError: a Hub id that is not in the table, or a configuration without these numbers.
    """
    if not model.base:
        return _read(model.config.model_dump(), "model.config")
    if model.base in KNOWN:
        return KNOWN[model.base]
    path = Path(model.base) / "config.json"
    if model.base == str(BASES["model.base"]) or path.is_file():
        if not path.is_file():
            raise ParamsError(f"model.base: {path} is missing")
        return _read(json.loads(path.read_text(encoding="utf-8")), str(path))
    raise ParamsError(
        f"model.base: the shape of {model.base} is not in the table ({', '.join(KNOWN)}); download the model "
        "and name its folder"
    )


def _read(config: dict, name: str) -> Shape:
    config = {"num_key_value_heads": config.get("num_attention_heads"), **config}
    if missing := [key for key in KEYS if not isinstance(config.get(key), int)]:
        raise ParamsError(f"{name}: no {missing[0]}; sizes are known of LLaMA-type models alone")
    return Shape(*(config[key] for key in KEYS), is_tied=bool(config.get("tie_word_embeddings", False)))
