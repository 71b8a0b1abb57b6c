r"""Dialogues as preference data have them -> the question they come to, in one way, and its answer.

The turns before the answer are the question. One turn of a user stands for itself; more, or a system
turn, are written out as hh-rlhf writes them, each with its speaker::

    Human: hi\n\nAssistant: hello\n\nHuman: why?
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SYSTEM, USER, ASSISTANT, TOOL = "System", "Human", "Assistant", "Tool"
ROLES = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "tool": TOOL, "function": TOOL, "observation": TOOL, "ipython": TOOL,
}  # fmt: skip
NOT_READ = ("tools", "images", "videos", "audios", "image", "video", "audio")
PROMPTS = ("prompt", "conversations", "instruction", "question", "query", "conversation", "messages", "input")
SPEAKER = re.compile(rf"(?:\A|\n\n)({SYSTEM}|{USER}|{ASSISTANT}):")

Row = Mapping[str, Any]
Turn = tuple[str, str]  # who, what


class Unreadable(ValueError):  # noqa: N818 - a row is left out, and the reading goes on
    """A row that cannot be read: args are the reason, as in `card.DROPS`, and words."""


def string(value: Any, name: str) -> str:
    """A value that is text.

    Raises:
        Unreadable: it is not.
    """
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise Unreadable("unreadable_row", f"{name!r} is {what}, no text")
    return value


def question_of(turns: list[Turn]) -> str:
    """Turns as the text of a question."""
    if len(turns) == 1 and turns[0][0] == USER:
        return turns[0][1]
    return "\n\n".join(f"{who}: {what.strip()}" for who, what in turns)


def prompt_of(row: Row) -> list[Turn]:
    """The turns that a row states apart from the answers: [] where there are none."""
    for name in NOT_READ:
        if row.get(name) and row[name] != "[]":
            raise Unreadable("unreadable_row", f"{name!r} is part of the prompt, and only text is read")
    turns = [(SYSTEM, string(row["system"], "system"))] if row.get("system") else []
    for asked, said in row.get("history") or ():
        turns += [(USER, string(asked, "history")), (ASSISTANT, string(said, "history"))]
    for name in PROMPTS:
        value = row.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            return turns + turns_of(value, name)
        if is_transcript(value):
            found = transcript(value)
            return turns + (found[:-1] if found[-1] == (ASSISTANT, "") else found)  # "…Assistant:"
        parts = [value, row.get("input") or ""] if name == "instruction" else [value]
        return [*turns, (USER, "\n".join(filter(None, parts)))]
    return turns


def answered(row: Row, value: Any, name: str) -> tuple[list[Turn], str]:
    """A row's prompt and the answer that a value gives to it: text, a message, or messages.

    Messages that begin with the system or a user are the whole dialogue.

    Raises:
        Unreadable: a field is no text and no messages; the last turn is not the
            assistant's, or it answers no user.
    """
    before = prompt_of(row)
    if isinstance(value, str):
        text = _without_prompt(row, value)
        is_whole = is_transcript(text) and (text.startswith("\n\n") or not before)
        turns = transcript(text) if is_whole else [(ASSISTANT, text)]
        if not before and len(turns) == 1:
            raise Unreadable(
                "unreadable_row", f"no prompt, and {name!r} is no dialogue that begins with Human:"
            )
    else:
        turns = turns_of(value, name)
    if turns and turns[0][0] in (SYSTEM, USER):
        turns = _whole(before, turns)
    else:
        turns = before + turns
    *before, (who, answer) = turns or [(USER, "")]
    if who != ASSISTANT or USER not in (other for other, _ in before) or before[-1][0] not in (USER, TOOL):
        spoken = ", ".join(other for other, _ in turns) or "nobody"
        raise Unreadable("not_the_assistant", f"{name!r}: the turns are {spoken}")
    return before, answer


def _without_prompt(row: Row, value: str) -> str:
    """An answer less the prompt that all of its row repeat; one alone may just begin with its words."""
    prompt, others = row.get("prompt"), [row.get(name) for name in ("chosen", "rejected")]
    repeats = isinstance(prompt, str) and all(str(one).startswith(prompt) for one in [value, *others])
    return value.removeprefix(prompt) if repeats else value


def _whole(before: list[Turn], turns: list[Turn]) -> list[Turn]:
    """A dialogue, with the system's turn that stands elsewhere in its row; its prompt is among its turns."""
    said = {what.strip() for _, what in turns}
    if any(who == USER and what.strip() not in said for who, what in before):
        raise Unreadable("different_prompts", "the prompt is none of the turns")
    system = [turn for turn in before if turn[0] == SYSTEM and turns[0][0] != SYSTEM]
    return system + turns


def turns_of(value: Any, name: str) -> list[Turn]:
    """Messages, {role, content} or {from, value}, one or several; empty system turns are left out.

    Raises:
        Unreadable: it is something else, or a role is none of `ROLES`.
    """
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple) or not all(isinstance(one, Mapping) for one in messages):
        raise Unreadable("unreadable_row", f"{name!r} is {type(value).__name__}, no text and no messages")
    turns = []
    for message in messages:
        role = message.get("role") or message.get("from")
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise Unreadable("unreadable_row", f"{name!r}: a message of role {role!r}")
        if message.get("tool_calls"):
            raise Unreadable("unreadable_row", f"{name!r}: a message with a call of tools, no text")
        said = message.get("content") if message.get("content") is not None else message.get("value")
        turn = ROLES[role.lower()], _content(said, name)
        if turn != (SYSTEM, ""):
            turns.append(turn)
    return turns


def _content(value: Any, name: str) -> str:
    """Text, or the parts of one: [{"type": "text", "text": "hi"}]."""
    if not isinstance(value, list):
        return string(value, f"{name}: content")
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        raise Unreadable("unreadable_row", f"{name!r}: a message with parts that are no text")
    return "".join(string(part.get("text"), f"{name}: text") for part in value)


def is_transcript(text: str) -> bool:
    """Whether a text is a dialogue as hh-rlhf writes it; one without the first blank line has an answer."""
    found = SPEAKER.match(text)
    is_plain = not text.startswith("\n\n") and f"\n\n{ASSISTANT}:" not in text
    return bool(found) and found[1] != ASSISTANT and not is_plain


def transcript(text: str) -> list[Turn]:
    """Its turns."""
    _, *parts = SPEAKER.split(text)
    return [(who, what.strip()) for who, what in zip(parts[::2], parts[1::2], strict=True)]
