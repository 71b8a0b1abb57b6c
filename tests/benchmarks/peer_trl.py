"""TRL's RewardTrainer and SFTTrainer on prepared token ids; `trainers.py` asks it in TRL's own environment.

python peer_trl.py reward|sft <folder> <JSON: steps and the trainer's settings>
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **keys: object) -> None:
        """Now."""
        self.ends.append(time.monotonic())


def main(kind: str, folder: Path, settings: dict) -> dict[str, float]:
    """Loss of the first batch, seconds of the steps after the first, memory above the imports' own, MB."""
    torch.set_num_threads(2)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = json.loads((folder / f"{kind}.json").read_text())
    data = Dataset.from_list(rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    common = {
        "output_dir": str(folder / "peer"), "report_to": "none", "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10_000, "dataloader_pin_memory": False,
        "max_length": None, **settings,
    }  # fmt: skip
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "reward", num_labels=1, dtype=torch.float32
        )
        trainer = RewardTrainer(
            model, args=RewardConfig(**common), train_dataset=data, processing_class=tokenizer
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32)
        trainer = SFTTrainer(model, args=SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    model.eval()
    first = min(len(rows), settings["per_device_train_batch_size"])
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(first)])
        loss = trainer.compute_loss(model, batch)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": float(loss), "seconds_per_step": (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1),
        "megabytes": (peak - imports) / 1024, "examples": len(trainer.train_dataset),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
