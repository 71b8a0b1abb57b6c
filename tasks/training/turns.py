"""Conversations as people write them -> messages of role and content, each checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ASSISTANT = ("assistant", "model")  # Gemma's word is the second
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


def read_turns(turns: Any, name: str, shares: bool = True) -> list[dict[str, Any]]:
    """Messages of `role` and `content`; ShareGPT's `{from, value}` are read as such.

    Args:
        turns: a conversation, or one turn of it.
        name: of the column, for messages.
        shares: ShareGPT's form is read; its column is `conversations`, and `messages` are OpenAI's.

    Raises:
        ValueError: a turn of another form, of no known role, or whose content is no text.
    """
    if isinstance(turns, Mapping):
        turns = [turns]
    if hasattr(turns, "tolist"):  # a cell of a pandas frame
        turns = turns.tolist()
    return [_turn(turn, f"{name}[{i}]", shares) for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str, shares: bool) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is of type {type(turn).__name__}; {{role, content}} is wanted")
    if "role" not in turn and {"from", "value"} <= turn.keys():
        if not shares:
            raise ValueError(f"{where} has from and value, which stand in a column named conversations")
        role = ROLES.get(turn["from"])
        if role is None:
            raise ValueError(f"{where} is from {turn['from']!r}; {', '.join(ROLES)} are known")
        turn = {"role": role, "content": turn["value"]}
    if not isinstance(turn.get("role"), str):
        raise ValueError(f"{where} has {sorted(map(str, turn))}; {{role, content}} is wanted")
    content = turn.get("content")
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise ValueError(f"{where}: content is of type {type(content).__name__}; text is wanted")
    return dict(turn)


def check_answer(turns: Sequence[Mapping[str, Any]], name: str, alone: bool = False) -> None:
    """What is learnt as the policy's is the assistant's.

    Args:
        turns: a conversation, its last turn the answer.
        name: of the column, for messages.
        alone: all turns are the answer.

    Raises:
        ValueError: it ends with somebody else, or holds somebody else's turn.
    """
    for turn in turns if alone else turns[-1:]:
        if turn["role"] not in ASSISTANT:
            what = f"holds a turn of the {turn['role']}" if alone else f"ends with the {turn['role']}"
            raise ValueError(f"{name} {what}; only the assistant's is learnt")
