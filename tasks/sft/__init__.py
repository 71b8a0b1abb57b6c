"""Packed rows, or rows as users have them -> policy: supervised fine-tuning."""

from tasks.sft.config import SFTConfig
from tasks.sft.records import PackedRow, collate
from tasks.sft.stage import read_rows, run
from tasks.sft.trainer import SFTTrainer

__all__ = ["PackedRow", "SFTConfig", "SFTTrainer", "collate", "read_rows", "run"]
