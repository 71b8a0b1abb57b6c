"""The 7B recipe on a model of a few thousand weights: its preset, two processes, a policy on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_end_to_end import Clone
from transformers import AutoModelForCausalLM, AutoTokenizer

OURS = """
    machine.launch=ddp_cpu machine.threads=1 machine.checkpoint_steps=3 machine.checkpoint_updates=2
    model.quantize=none ppo.lora_rank=2
    data.sample.questions=300 pack.row_tokens=256 pack.document_tokens=128 pack.prompt_tokens=128
    sft.lora_rank=2 sft.batch_rows=4 sft.max_steps=4 reward.lora_rank=2 reward.batch_questions=8
    reward.max_steps=4 reward_eval.enforce=false ppo.updates=3 ppo.batch_size=8 ppo.mini_batch_size=2
    ppo.gradient_accumulation_steps=2 ppo.response_tokens=8
""".split()


@pytest.mark.slow
def test_the_recipe_runs_in_two_processes_and_ends_with_a_policy(tmp_path: Path):
    base = tiny.save(
        tiny.causal(vocab_size=330, max_position_embeddings=256, tie_word_embeddings=False), tmp_path / "base"
    )
    clone = Clone(tmp_path / "clone")
    settings = [f"model.base={base}", "data.source=sample", *OURS]
    clone.run("python", "-m", "params", "use", "stack_llama_7b", *settings)
    assert "ok" in clone.run("python", "-m", "params", "check")
    assert "2 process(es)" in clone.run("python", "-m", "params", "estimate")
    printed = clone.run("dvc", "repro", "ppo")
    for stage in ("sft", "reward", "ppo"):
        assert f"stackrl: {stage}: " in printed
        assert not list((clone.root / "scratch" / stage).glob("*/checkpoint-*"))
    folder = clone.root / "artifacts/ppo/model"
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sft = AutoModelForCausalLM.from_pretrained(clone.root / "artifacts/sft/model")
    assert policy.num_parameters() == sft.num_parameters()
    ids = tokenizer("Question: What is 1 + 2?\n\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(policy(ids).logits).all()
    assert not all(
        torch.equal(a, b)
        for a, b in zip(policy.state_dict().values(), sft.state_dict().values(), strict=True)
    )
    metrics = json.loads((clone.root / "artifacts/ppo/metrics.json").read_text())
    assert metrics["updates"] == 3
    assert len((clone.root / "artifacts/sft/curve.csv").read_text().splitlines()) == 5
    assert "up to date" in clone.run("dvc", "repro", "ppo")
