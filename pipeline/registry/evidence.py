"""The evidence of a version as it is stored: some of its tags, and a file about its test rows. Does not use MLflow."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.registry.promotion import Evidence

ROWS_FILE = "evaluation/test_rows.npz"
TEST_DIGEST, CALIBRATION_ERROR, LATENCY = "test.sha256", "test.calibration_error", "latency_ms"


class NoEvidence(Exception):
    """The test predictions of a version are gone or cannot be read."""


def tags_of(evidence: Evidence) -> dict[str, str]:
    """All of the evidence but what is in the file."""
    return {
        TEST_DIGEST: evidence.test_digest,
        CALIBRATION_ERROR: repr(float(evidence.calibration_error)),
        LATENCY: repr(float(evidence.latency_ms)),
    }


def write_rows(evidence: Evidence, folder: Path) -> None:
    """Writes `ROWS_FILE` into the folder of a model."""
    (folder / ROWS_FILE).parent.mkdir()
    np.savez_compressed(folder / ROWS_FILE, row_ids=evidence.row_ids, hits=evidence.hits)


def read_evidence(tags: Mapping[str, str], rows_file: Path) -> Evidence:
    """The evidence from the tags of a version and a local copy of its `ROWS_FILE`.

    Raises:
        NoEvidence: If the file cannot be read.
    """
    try:
        # From memory, since NumPy leaves a file open whose zip is damaged.
        with np.load(io.BytesIO(rows_file.read_bytes())) as rows:
            row_ids, hits = rows["row_ids"], rows["hits"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise NoEvidence(f"{ROWS_FILE} cannot be read: {error}") from error
    return Evidence(tags[TEST_DIGEST], row_ids, hits, float(tags[CALIBRATION_ERROR]), float(tags[LATENCY]))
