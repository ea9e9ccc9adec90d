"""Names of the tags of a version besides its evidence, and the tag for the names of its classes."""

import json
from collections.abc import Sequence

STATE, REASON, SINCE, INCUMBENT = (f"promotion.{name}" for name in ("state", "reason", "since", "incumbent"))
ALIAS = "promotion.alias"
"""The alias for which a version was decided; earlier versions have no such tag."""
EVIDENCE = "promotion.evidence"
"""Says what is wrong with the evidence of a version."""
MODEL_DIGEST = "model.sha256"
"""Of the file that was trained; a tag of the logged model too. Earlier versions have no such tag."""
MOST_TAG_BYTES = 60_000
"""Of a tag: MLflow takes 100,000 characters, and MySQL 65,535 bytes."""


def names_tag(label_names: Sequence[str]) -> str:
    """The names of the classes as JSON; of more than MLflow takes, how many there are and where they stand."""
    names = json.dumps(list(label_names), ensure_ascii=False)
    if len(names.encode()) <= MOST_TAG_BYTES:
        return names
    return f"{len(label_names)} names, which the metadata of the model have"
