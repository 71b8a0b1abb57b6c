"""A user's own PeftModel at the door of each trainer: it works and is saved, or one sentence says why not."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
from adapted import lora, moved
from made_trainers import batch, trainer
from peft import AdaLoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from tasks.lm import AutoModelForCausalLMWithValueHead as Valued
from tasks.lm.adapters.active import at_work
from tasks.lm.adapters.lora import merge_checked
from tasks.lm.logprobs.frozen_layers import Hydra, frozen_depth
from tasks.reward import RewardConfig, RewardTrainer
from tasks.sft import SFTConfig, SFTTrainer

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
OWN = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "whole head": TARGETS | {"modules_to_save": ["lm_head"]},
    "whole embeddings": TARGETS | {"modules_to_save": ["embed_tokens"]},
    "whole and tied": TARGETS | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "some tokens": TARGETS | {"trainable_token_indices": [5, 6]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "norm": TARGETS | {"modules_to_save": ["norm"]},
    "dora": TARGETS | {"use_dora": True},
    "pissa": TARGETS | {"init_lora_weights": "pissa"},
    "olora": TARGETS | {"init_lora_weights": "olora"},
}
MOVED_BY_A_MERGE = {("embeddings", True), ("head", True), ("both", True)}  # one table is two layers
ROWS = [{"input_ids": ids} for ids in tiny.drawn([6] * 8, seed=2)]
PAIRS = [{"chosen_ids": a["input_ids"], "rejected_ids": b}
         for a, b in zip(ROWS, tiny.drawn([6] * 8, seed=3), strict=True)]  # fmt: skip
KEYS = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "save_strategy": "no", "report_to": []}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3]])
REFUSED = {
    "PromptTuningConfig adds virtual tokens": lambda task: PromptTuningConfig(
        num_virtual_tokens=2, task_type=task
    ),
    "AdaLoraConfig is not served: its ranks follow a schedule": lambda task: AdaLoraConfig(
        total_step=10, target_modules=["q_proj"], task_type=task
    ),
    "layer_replication is not served": lambda task: lora(
        **TARGETS, layer_replication=[(0, 2), (1, 2)], task_type=task
    ),
    "init_lora_weights='pissa_niter_4' cuts out": lambda task: lora(
        **TARGETS, init_lora_weights="pissa_niter_4", task_type=task
    ),
}  # fmt: skip


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_ppo_of_ones_own_adapter(name, tied, tmp_path):
    """Another has learnt before; KL begins at 0, the reference stays, what is saved says what it says."""
    keys = {"tie_word_embeddings": tied}
    model = moved(get_peft_model(tiny.causal(**keys), lora(**OWN[name], task_type="CAUSAL_LM")))
    began = logits(model)
    ppo = trainer(given={"model": Valued.from_pretrained(model), "ref_model": None})
    assert abs(ppo.step(*batch())["objective/kl"]) < 1e-5
    ppo.step(*batch(seed=1))
    later = logits(model)
    assert tiny.far(later, began) > 1e-3
    with at_work(model, ppo.ref_adapters) as reference:
        assert torch.equal(logits(reference), began)
    ppo.model.save_pretrained(tmp_path / "saved")
    assert tiny.far(logits(PeftModel.from_pretrained(tiny.causal(**keys), tmp_path / "saved")), later) < 1e-5
    if (name, tied) in MOVED_BY_A_MERGE:
        with pytest.raises(ValueError, match="differs from its adapter by"):
            merge_checked(model, [IDS[0].tolist()])
    else:
        assert tiny.far(logits(merge_checked(model, [IDS[0].tolist()])), later) < 1e-4


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_training_of_ones_own_adapter(kind, name, tmp_path):
    if kind == "sft":
        plain, task = tiny.causal, "CAUSAL_LM"
    elif "lm_head" in str(OWN[name]):
        pytest.skip("a reward model has none")
    else:
        plain, task = tiny.scorer, "SEQ_CLS"
    model = get_peft_model(plain(), lora(**OWN[name], task_type=task))
    if kind == "sft":
        made = SFTTrainer(model, SFTConfig(str(tmp_path / "out"), **KEYS), ROWS)
    else:
        made = RewardTrainer(model, RewardConfig(str(tmp_path / "out"), **KEYS), PAIRS)
    before = logits(model)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert tiny.far(logits(model), before) > 1e-4
    assert tiny.far(logits(PeftModel.from_pretrained(plain(), tmp_path / "saved")), logits(model)) < 1e-5


@pytest.mark.parametrize("match", REFUSED)
def test_what_cannot_be_served_is_refused_at_every_door(match, tmp_path):
    causal = get_peft_model(tiny.causal(), REFUSED[match]("CAUSAL_LM"))
    scorer = get_peft_model(tiny.scorer(), REFUSED[match]("SEQ_CLS"))
    for door in (
        lambda: Valued.from_pretrained(causal),
        lambda: SFTTrainer(causal, SFTConfig(str(tmp_path), **KEYS), ROWS),
        lambda: RewardTrainer(scorer, RewardConfig(str(tmp_path), **KEYS), PAIRS),
        lambda: trainer(given={"ref_model": causal}),
    ):
        with pytest.raises(ValueError, match=f"model: {match}") as found:
            door()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "keys",
    [{"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]}, {"embeddings": True}, {}],
)
def test_embeddings_that_learn_are_no_frozen_trunk(keys):
    """What peft keeps in dictionaries runs below the blocks as well; a memory of the trunk would be stale."""
    last = r"model\.layers\.1\.self_attn\.q_proj"
    keys = dict(keys)
    targets = rf".*({last}|embed_tokens)" if keys.pop("embeddings", False) else f".*{last}"
    model = get_peft_model(tiny.causal(), lora(target_modules=targets, **keys))
    is_frozen = targets == f".*{last}" and not keys
    assert frozen_depth(model) == int(is_frozen)
    ppo, other = (
        trainer(given={"model": Valued.from_pretrained(each), "ref_model": None})
        for each in (model, deepcopy(model))
    )
    other.hydra = Hydra()
    for seed in range(2):
        found, wanted = (each.step(*batch(seed=seed)) for each in (ppo, other))
        assert found["ppo/loss/total"] == pytest.approx(wanted["ppo/loss/total"], rel=1e-4, abs=1e-6)
        assert (found["rollout/trunk_megabytes"] > 0) is is_frozen
