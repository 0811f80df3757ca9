"""Conversations in a column of data: which turn is the problem, which one the solution, and what comes before."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Who speaks: `role` and `content` of the usual form, `from` and `value` of ShareGPT's
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
KEYS = {"role", "content", "from", "value"}
WRITTEN = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # as text, in a cell of a table
CALLS = ("tool_calls", "function_call")

Turn = dict[str, str]  # role and content


def unpack(value: Any) -> Any:
    """Return a conversation that is written as JSON, any other value as it is; `ValueError` for what is no JSON."""
    if not isinstance(value, str) or WRITTEN.match(value) is None:
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"looks like a conversation and is not JSON ({error}); write it as JSON") from error


def split_conversation(turns: Sequence[Any]) -> tuple[list[Turn], str | None, str | None]:
    """
    Return the turns before the problem, the problem, and its solution.

    The problem is the last user turn; the solution is the assistant's turn after it, `None` if there is none. One turn
    of an assistant alone is a solution without a problem.

    Raises:
        ValueError: for a turn that is not a text of system, user or assistant, and for other turns at the end.
    """
    read = [_read_turn(f"turn {number}", turn) for number, turn in enumerate(turns, 1)]
    roles = [turn["role"] for turn in read]
    if roles == ["assistant"]:
        return [], None, read[0]["content"]
    if "user" not in roles:
        raise ValueError("no user turn, of which the last is the problem; leave the row out")
    place = len(roles) - 1 - roles[::-1].index("user")
    after = roles[place + 1 :]
    if after not in ([], ["assistant"]):
        raise ValueError(
            f"the last user turn is followed by {', '.join(after)}; it needs one assistant turn, the solution"
        )
    return read[:place], read[place]["content"], read[-1]["content"] if after else None


def _read_turn(place: str, turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} is {type(turn).__name__}, not an object with role and content: {str(turn)[:80]}")
    who = turn.get("role") or turn.get("from")
    if (role := ROLES.get(who) if isinstance(who, str) else None) is None:
        raise ValueError(
            f"{place} has the role {who!r}, and only {', '.join(ROLES)} are read; leave the row out, or give the turn "
            "one of these"
        )
    if calls := [name for name in CALLS if turn.get(name)]:
        raise ValueError(f"{place} has {calls[0]}, which no prompt can hold; leave the row out")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(content, str):
        kind = "a list of parts" if isinstance(content, list) else type(content).__name__
        raise ValueError(f"{place} has as content {kind}, not text: {str(content)[:80]}; write it as one text")
    content.encode()  # half a surrogate pair is a ValueError
    return {"role": role, "content": content}


def unread_keys(turns: Sequence[Any]) -> set[str]:
    """Keys of turns, such as `name`, that hold something and are not read."""
    found = (key for turn in turns if isinstance(turn, Mapping) for key, value in turn.items() if value)
    return set(found) - KEYS


def with_system_prompt(history: list[Turn], system_prompt: str | None) -> list[Turn]:
    """Put a system turn first, in place of one that is there; `None` leaves all as it is."""
    if system_prompt is None:
        return history
    return [{"role": "system", "content": system_prompt}, *history[has_system_turn(history) :]]


def has_system_turn(history: Sequence[Turn]) -> bool:
    return bool(history) and history[0]["role"] == "system"
