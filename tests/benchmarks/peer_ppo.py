"""A PPOTrainer of TRL's interface on prepared cases: TRL 0.11.4's, in its own environment, or ours.

    <python with trl==0.11.4> peer_ppo.py <folder> <case> …

reads `<folder>/<case>.json`:

    model       keys of a transformers configuration, `model_type` among them; `seq2seq`: it has an encoder
    weights     <folder>/<weights>.safetensors: of the policy and its value head
    reference   likewise; null: the trainer makes a copy
    config      of the trainer; `trainer`: its further arguments; `lora`: an adapter; `threads`: of torch
    padding     side on which the tokenizer pads
    actions     in their order, each a call: of generate {"prompts", "keys"}, or of step {"queries",
                "responses", "scores", "masks", "orders", "watch"}: orders of the rows in the passes (ours
                are noted there); whether to measure the gradient at each optimizer step; what TRL gets
                instead of responses and masks, "peer_responses"

and writes `<folder>/<case>.found.json` and the weights then, `<folder>/<case>.found.safetensors`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

HEAD = "v_head."


def weights_of(folder: Path, case: dict, name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A language model, and what its value head holds."""
    auto = AutoModelForSeq2SeqLM if case.get("seq2seq") else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(**case["model"]))
    state = load_file(folder / f"{name}.safetensors")
    head = {key.removeprefix(HEAD): state.pop(key) for key in list(state) if key.startswith(HEAD)}
    model.load_state_dict(state)
    return model, head


def build(folder: Path, case: dict, library, **own) -> tuple:
    """The trainer of a case, from its library's classes, and whether it reseeded torch's random numbers.

    `own`: further keys of the configuration.
    """

    def made(name: str):
        model, head = weights_of(folder, case, name)
        lora = LoraConfig(**case["lora"], task_type="CAUSAL_LM") if case.get("lora") else None
        kind = "Seq2SeqLM" if case.get("seq2seq") else "CausalLM"
        valued = getattr(library, f"AutoModelFor{kind}WithValueHead")
        wrapped = valued.from_pretrained(model, peft_config=lora)
        wrapped.v_head.load_state_dict(head)
        return wrapped

    known = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = case.get("padding", "left")
    policy, reference = made(case["weights"]), made(case["reference"]) if case.get("reference") else None
    config = library.PPOConfig(**case["config"], **own)
    state = torch.get_rng_state()
    trainer = library.PPOTrainer(config, policy, reference, tokenizer, **case.get("trainer", {}))
    return trainer, not torch.equal(torch.get_rng_state(), state)


def play(folder: Path, name: str, library, **own) -> dict:
    """What a trainer makes of a case."""
    imports = _kilobytes()
    case = json.loads((folder / f"{name}.json").read_text())
    torch.set_num_threads(case.get("threads", 1))
    trainer, reseeds = build(folder, case, library, **own)
    reference = [] if trainer.ref_model is None else trainer.ref_model.parameters()
    places = {p.data_ptr() for p in trainer.model.parameters()}
    found = {"actions": [], "error": None, "reseeds": reseeds}
    found["shared"] = sum(p.data_ptr() in places for p in reference)
    try:
        for action in case["actions"]:
            found["actions"].append((_generate if "prompts" in action else _step)(trainer, action))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found |= {"kl_coef": float(trainer.kl_ctl.value), "megabytes": (_kilobytes() - imports) / 1024}
    state = {k.removeprefix("pretrained_model."): v for k, v in trainer.model.state_dict().items()}
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / f"{name}.found.safetensors")
    (folder / f"{name}.found.json").write_text(json.dumps(found))
    (folder / f"{name}.json").write_text(json.dumps(case))  # with our orders, for TRL
    return found


def _kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _tensors(rows, dtype=torch.long) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=dtype) for row in rows]


def _generate(trainer, action: dict) -> dict:
    prompts, start = _tensors(action["prompts"]), time.perf_counter()
    found = trainer.generate(prompts, **action["keys"])
    seconds = time.perf_counter() - start
    both = found if isinstance(found, tuple) else (found, [])
    return {"seconds": seconds, "tokens": [[row.tolist() for row in rows] for rows in both]}


def _step(trainer, action: dict) -> dict:
    norms = []

    def measure(optimizer, *_):
        if not action.get("watch", True):
            return
        every = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in every]).norm().item())

    if hasattr(trainer, "_orders"):
        action["orders"] = [order.tolist() for order in trainer._orders()]
    elif "peer_responses" in action:
        action = action | {"responses": action["peer_responses"], "masks": None}
    orders = map(np.array, action["orders"])
    rows = _tensors(action["queries"]), _tensors(action["responses"]), _tensors(action["scores"], torch.float)
    masks = _tensors(action["masks"]) if action.get("masks") else None
    hook, start = register_optimizer_step_pre_hook(measure), time.perf_counter()
    try:
        with mock.patch.object(np.random, "permutation", lambda _: next(orders)):
            stats = trainer.step(*rows, masks)
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    stats = {key: np.asarray(value).tolist() for key, value in stats.items()}
    return {"seconds": seconds, "norms": norms, "stats": stats, "is_training": trainer.model.training}


if __name__ == "__main__":
    import trl

    for case_name in sys.argv[2:]:
        play(Path(sys.argv[1]), case_name, trl)
