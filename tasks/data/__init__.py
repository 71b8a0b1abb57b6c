"""Dump -> questions with scored answers, split by question. Knows no tokenizer.

Reading order: `stage` tells the story; then `sources` (files -> bytes), `dump` (bytes -> rows), `posts` (rows
-> posts), `html` (HTML -> Markdown), `score`, `questions` (posts -> questions), `split`, `write`, `card`.
"""

from tasks.data.stage import run

__all__ = ["run"]
