"""Records of long measurements as JSON lines, appended one by one, so that a killed measurement can continue."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines. If a kill has cut off the last line, it is removed from the file."""
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete)
    return [json.loads(line) for line in complete.splitlines()]


def add(path: Path, row: dict[str, Any]) -> None:
    """Appends a line; creates the file if it does not exist."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
