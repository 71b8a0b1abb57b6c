"""Packed rows, or rows as users have them -> policy: supervised fine-tuning."""

from tasks.sft.records import PackedRow, collate
from tasks.sft.stage import read_rows, run
from tasks.sft.trainer import SFTConfig, SFTTrainer

__all__ = ["PackedRow", "SFTConfig", "SFTTrainer", "collate", "read_rows", "run"]
