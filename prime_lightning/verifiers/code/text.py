"""From a completion to its program: Markdown fences, in linear time, without parsing Python."""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 256 << 10
"""Characters of a program that is still run."""

_FENCE = re.compile(r"^[ \t]{0,3}(?P<mark>`{3,}+|~{3,}+)(?P<label>[^\n`]*)$", re.MULTILINE)
_PYTHON = ("", "python", "py", "python3", "python 3", "{python}", "{.python}")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    label: str
    code: str
    closed: bool


def _blocks(text: str) -> list[Block]:
    """A fence opened by n marks is closed by at least n of the same without a label; the last may stay open."""
    found: list[Block] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence["mark"].startswith(opened["mark"]) and not fence["label"].strip():
            found.append(Block(opened["label"].strip().lower(), text[opened.end() + 1 : fence.start()], True))
            opened = None
        elif fence["label"].strip().lower() in _PYTHON[1:]:  # a new program begins: the one before was never closed
            found.append(Block(opened["label"].strip().lower(), text[opened.end() + 1 : fence.start()], False))
            opened = fence
    if opened is not None:
        found.append(Block(opened["label"].strip().lower(), text[opened.end() + 1 :], False))
    return found


def program(text: str, entry_point: str = "") -> str:
    r"""The program that a completion hands in.

    The last closed Python block that defines `entry_point`, else the last closed Python block, else the last block
    that was left open, else (no fences at all) the whole text. CRLF become LF and a byte-order mark goes.

    Example:
        >>> program("Use\n```python\r\ndef f():\r\n    return 1\r\n```\nDone.")
        'def f():\n    return 1\n'
        >>> program("```py\nx = 1")
        'x = 1'
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    blocks = _blocks(text)
    if not blocks:
        return text
    python = [block for block in blocks if block.label in _PYTHON] or blocks
    closed = [block for block in python if block.closed]
    if not closed:
        return _dedented(python[-1].code)
    name = re.escape(entry_point)
    defines = re.compile(rf"^[ \t]*(?:async +)?(?:def|class) +{name}\b|^{name} *=", re.MULTILINE)
    having = [block for block in closed if entry_point and defines.search(block.code)]
    return _dedented((having or closed)[-1].code)


def _dedented(code: str) -> str:
    """A block inside a list item is indented as a whole."""
    first = next((line for line in code.split("\n") if line.strip()), "")
    margin = first[: len(first) - len(first.lstrip())]
    if not margin:
        return code
    lines = code.split("\n")
    if not all(line.startswith(margin) or not line.strip() for line in lines):
        return code
    return "\n".join(line.removeprefix(margin) for line in lines)
