"""Code blocks of Markdown pages."""

from __future__ import annotations

import re
from pathlib import Path

_FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page in their order, each without its fences."""
    return [block["code"] for block in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def executed_sessions(page: Path) -> dict[str, str]:
    """What a page executes when it is built: of each session, its blocks as one program."""
    sessions: dict[str, str] = {}
    for number, block in enumerate(_FENCE.finditer(page.read_text(encoding="utf-8"))):
        if 'exec="on"' not in block["options"]:
            continue
        named = re.search(r'session="([^"]+)"', block["options"])
        name = named[1] if named else f"block_{number}"
        sessions[name] = sessions.get(name, "") + block["code"]
    return sessions
