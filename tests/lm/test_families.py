"""Every causal type that transformers knows: equal to its plain forward, or refused in words."""

from __future__ import annotations

import copy
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers
from torch.nn import functional

from tasks.lm.attention.forest import has_forest
from tasks.lm.attention.padding import lay_out
from tasks.lm.logprobs.frozen_layers import frozen_depth
from tasks.lm.logprobs.responses import read_responses, read_trunk, response_logprobs
from tasks.lm.logprobs.roads import take_road
from tasks.lm.model.freezing import freeze_layers
from tasks.lm.sampling.decoders import prepared, way_of
from tasks.lm.sampling.generation import generate

CLOSE = 1e-5
PROMPTS, RESPONSES = ((6, 3, 9, 3), 1), ((4, 5, 1, 2), 2)


def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses; the last prompt is the second one again."""
    prompts, responses = (tiny.drawn(lengths, seed, low=4, high=40) for lengths, seed in (PROMPTS, RESPONSES))
    return [*prompts[:3], prompts[1]], responses


def plain(model, prompt, response) -> torch.Tensor:
    """Log-probabilities of a response by one plain forward."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float()
    logp = functional.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


def greedy(model, prompt, count: int) -> list[int]:
    row = list(prompt)
    for _ in range(count):
        row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


def is_near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return tiny.far(found, wanted) <= CLOSE


def tried(kind: str) -> tuple[str, str, str, str]:
    """What serves a type: road, decoding, how many first blocks run once, and what is said of it.

    Fails where a number is another one than the plain forward's; an exception is a ValueError of ours.
    """
    model, (prompts, responses) = families.made(kind), rows()
    before = copy.deepcopy(model)
    try:
        take_road(model, learns=True)
    except ValueError as error:
        assert not has_forest(model)
        if "cannot be trained" not in str(error):
            with pytest.raises(ValueError):
                generate(model, prompts, max_tokens=2, eos_id=None, pad_id=0)
        return "refused", "", "", str(error).split(" ", 1)[1]
    sequences = lay_out(prompts, responses, 0, "cpu")
    with torch.no_grad():
        wanted = torch.cat([plain(before, p, r) for p, r in zip(prompts, responses, strict=True)])
        alone = [
            response_logprobs(model, lay_out([p], [r], 0, "cpu"), 1.0)[0]
            for p, r in zip(prompts, responses, strict=True)
        ]
        assert is_near(torch.cat(alone), wanted), "alone"
        assert is_near(response_logprobs(before, sequences, 1.0)[sequences.is_response], wanted), "padded"
        assert is_near(response_logprobs(model, sequences, 1.0)[sequences.is_response], wanted), "road"
    sum(plain(before, p, r).sum() for p, r in zip(prompts, responses, strict=True)).backward()
    read_responses(model, sequences, 1.0)[0].sum().backward()
    assert tiny.far_gradients(tiny.gradients(model), tiny.gradients(before)) <= CLOSE, "gradient"
    with torch.no_grad():
        said = generate(model, prompts, max_tokens=4, eos_id=None, pad_id=0).tokens.tolist()
        assert said == [greedy(before, prompt, 4) for prompt in prompts], "greedy"
        with prepared(model):
            way = way_of(model)
    kept = frozen(model, sequences)
    road = "forest" if has_forest(model) else "padded"
    return (road, way, kept, "") if kept.isdigit() else (road, way, "refused", kept)


def frozen(model, sequences) -> str:
    """How many blocks run once where the last is trained, or why none is; what they make is the same."""
    try:
        freeze_layers(model, 1)
    except ValueError as error:
        return str(error)
    depth = frozen_depth(model)
    if depth:
        with torch.no_grad():
            wanted = response_logprobs(model, sequences, 1.0)
            kept = read_trunk(model, sequences, depth)
            assert is_near(response_logprobs(model, sequences, 1.0, trunk=kept), wanted), "trunk"
    read_responses(model, sequences, 1.0)[0].sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    return str(depth)


QUICK = (
    "bart", "big_bird", "codegen", "diffllama", "falcon", "gemma2", "gpt_neo", "gpt_oss", "llama", "mamba",
    "mixtral", "mpt", "phi3", "roformer as_decoder", "rwkv", "stablelm", "xlm",
)  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LAID_OUT = "5.23."  # of transformers, whose types the page lists


def documented() -> dict[str, tuple[str, ...]]:
    """The rows of the page's table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {kind.strip("`"): tuple(rest) for kind, *rest in cells}


def found(kind: str) -> tuple[str, ...]:
    with families.quiet():
        return tuple(cell.replace("|", "/") for cell in tried(kind))


def check(kinds) -> None:
    """Each type does what the page says; where transformers is another one, it is exact or refused."""
    wrong = {}
    for kind in kinds:
        try:
            row = found(kind)
        except AssertionError as error:
            wrong[kind] = f"is not exact: {error}"
            continue
        if transformers.__version__.startswith(LAID_OUT) and row != documented().get(kind):
            wrong[kind] = f"{row}, the page says {documented().get(kind)}"
    assert not wrong


@pytest.mark.parametrize("kind", QUICK)
def test_a_family_is_exact_or_refused(kind):
    """Alone, padded and by its road; one gradient; greedy decoding; first blocks that run once."""
    if kind in families.types():
        check([kind])


@pytest.mark.slow
def test_every_family_is_exact_or_refused():
    check(kind for kind in families.types() if kind not in QUICK)
    if transformers.__version__.startswith(LAID_OUT):
        assert set(documented()) == set(families.types())


if __name__ == "__main__":  # PYTHONPATH=.:tests:tests/lm python tests/lm/test_families.py: the page's rows
    for each in families.types():
        print(f"| `{each}` | {' | '.join(found(each))} |", flush=True)
