"""Bytes that a LLaMA-type model takes where it trains and where it samples; formulas alone.

4 + 4 + 8 bytes a trained parameter for weight, gradient and Adam's moments in float32 (Rajbhandari et al.,
arXiv 1910.02054, section 3.1, without the second copy of mixed precision, which autocast makes anew).
"""

from __future__ import annotations

from params.shapes import Shape

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_LOGITS, COPIES = 2**28, 3  # of tasks.lm.logprobs.chunked on CUDA: logits, softmax, gradient, in float32


def activations(shape: Shape, tokens: int, dtype: str, recompute: bool = False) -> float:
    """Bytes that the blocks keep for their backward.

    Counted as by Korthikanti et al. (arXiv 2205.05198, section 4.1), for a LLaMA block. Of each token it
    keeps, in elements of the dtype: the input of q, k and v (h), q and the attention's output (2h), k and v
    (2 kv), the input of gate and up (h), gate, up, their activation and its product (4f); in float32 what its
    norms keep: the residual and its normed self, twice (4h). Autocast casts an input for each matrix that
    reads it: 3h more. No attention scores (no kernel here keeps them), no dropout.

    Args:
        shape: of the model.
        tokens: of one forward.
        dtype: of autocast.
        recompute: gradient checkpointing: of a block its float32 input alone, and all of one block.
    """
    low, h = BYTES[dtype], shape.hidden
    inputs = 4 * h if dtype == "float32" else 7 * h
    block = tokens * (low * (inputs + 2 * shape.kv_hidden + 4 * shape.intermediate) + 4 * 4 * h)
    return block + shape.layers * tokens * 4 * h if recompute else shape.layers * block


def training(
    shape: Shape, tokens: int, dtype: str, *, trained: int, base: float = 4.0, shards: int = 1,
    recompute: bool = False, muon: bool = False,
) -> dict[str, float]:  # fmt: skip
    """GB of a model that trains, by what takes them.

    Args:
        shape: of the model.
        tokens: of one forward.
        dtype: of autocast.
        trained: parameters; fewer than the model's are those of an adapter beside it.
        base: bytes of a frozen weight.
        shards: processes that share weights, gradients and moments.
        recompute: gradient checkpointing.
        muon: one moment a parameter, not two.
    """
    is_adapter = trained < shape.parameters
    weights = (base * shape.parameters if is_adapter else 0) + 4 * trained
    whole = 2 * 4 * shape.of_block if shards > 1 else 0  # gathered: the block at work and the next
    held = 2 * shape.of_block if recompute or shards > 1 else shape.parameters  # else as long as the graph
    cast = 2 * held if dtype == "bfloat16" else 0
    logits = COPIES * 4 * min(tokens * shape.vocabulary, CHUNK_LOGITS)
    found = {
        "weights": weights / shards + whole,
        "gradients": 4 * trained / shards,
        "moments": (4 if muon else 8) * trained / shards,
        "casts": cast,
        "activations": activations(shape, tokens, dtype, recompute),
        "logits": logits,
    }
    return {name: size / GB for name, size in found.items()}


def kv_cache(shape: Shape, rows: int, tokens: int, dtype: str) -> float:
    """Bytes of keys and values of so many rows of so many tokens."""
    return 2 * shape.layers * shape.kv_hidden * rows * tokens * BYTES[dtype]
