"""Helpers for all sections of settings: fields that are not part of a task's key, and range checks."""

from dataclasses import fields
from typing import Any

# Metadata of fields that decide how a run is executed and not its results: they are not part of a task's key.
EXECUTION = {"keyed": False}


def keyed(section: Any) -> dict[str, Any]:
    """The fields of a section that decide the output of a task, and so are part of its key."""
    return {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("keyed", True)}


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises a ValueError with the name of the setting, its value and the remedy, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: {remedy}")
