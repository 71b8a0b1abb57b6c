"""Dump -> questions with scored answers, split by question or by site. Knows no tokenizer.

Reading order: `stage` tells the story; then `sources` (files -> bytes), `cut` (bytes -> blocks), `dump`
(blocks -> rows), `posts` (rows -> posts), `shelf`, `join`, `deal` (HTML -> Markdown, by `html` and `plain`),
`score`, `questions`, `alike`, `split`, `schema`, `card`; `shapes` for what is no dump.
"""

from tasks.data.stage import run

__all__ = ["run"]
