"""Helpers for all sections of settings: which fields are part of a task's key, and range checks."""

from dataclasses import fields
from typing import Any

from pipeline.masking import mask

# Metadata of fields that decide how a run is executed and not its results: they are not part of a task's key.
EXECUTION = {"keyed": False}
# Metadata of fields that were added after runs had been made: with their default they are not part of a key, so that
# finished runs stay finished.
ADDED_LATER = {"keyed": "unless default"}


def keyed(section: Any) -> dict[str, Any]:
    """The fields of a section that decide the output of a task, and so are part of its key."""
    found = {}
    for f in fields(section):
        value, rule = getattr(section, f.name), f.metadata.get("keyed", True)
        if rule is True or (rule == "unless default" and value != f.default):
            found[f.name] = value
    return found


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises a ValueError with the name of the setting, its value and the remedy, unless `condition` holds."""
    if not condition:
        # Masked here, because the parser of the command line folds a message before it prints it.
        raise ValueError(f"{name} = {mask(repr(value))}: {remedy}")
