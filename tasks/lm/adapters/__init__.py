"""Adapters on a model: which kinds are served, how they are added, kept, switched and merged."""

from tasks.lm.adapters.lora import merge_checked, merge_onto

__all__ = ["merge_checked", "merge_onto"]
