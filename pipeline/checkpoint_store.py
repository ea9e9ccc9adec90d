"""Checkpoints in storage: committed whole, verified when read, the last few and the best kept.

    <prefix>/<epoch>-<step>-<id>/...           the files of one checkpoint
    <prefix>/<epoch>-<step>-<id>/commit.json   size and SHA-256 of each; putting it is the commit

Ray's own record of checkpoints is not used: its controller notes a report only when it next asks the workers, so that a
kill within that time loses a checkpoint that is long in storage, and it hands out what it has noted unverified.
"""

import hashlib
import logging
import math
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from pipeline.storage import Storage

COMMIT_FILE = "commit.json"
# Of the checkpoints that `pipeline.checkpoint` writes: `finished`, `history` and more.
STATE_FILE = "state.json"
# Sorted by name, later positions come later.
NAME = re.compile(r"[0-9]{6}-[0-9]{9}-[0-9a-f]{12}")

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""

    @classmethod
    def at(cls, path: str, cause: BaseException) -> "CheckpointError":
        return cls(
            f"the checkpoint {path} could not be written: {cause}; the one before it is whole: mend the cause, and the "
            "same command goes on from there"
        )


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        storage: where they are.
        prefix: folder below the storage root, for them alone.
        kept: how many of the last ones are kept; the one with the lowest score is kept besides.
    """

    def __init__(self, storage: Storage, prefix: str, kept: int) -> None:
        self._storage, self._prefix, self._kept = storage, prefix, kept

    def path(self, name: str) -> str:
        """Of the checkpoint `name`, below the storage root."""
        return Storage.join(self._prefix, name)

    def commit(self, folder: Path, epoch: int, step: int, score: float = math.inf) -> str:
        """Copies the files in `folder`, then commits them, then removes what need not be kept any more.

        Args:
            epoch: number of epochs that are over.
            step: steps taken since.
            score: of the epoch that is over, lower is better; infinite within an epoch.

        Returns:
            The name of the checkpoint.

        Raises:
            CheckpointError: if it could not be written; what was written of it is removed.
        """
        name = f"{epoch:06d}-{step:09d}-{uuid.uuid4().hex[:12]}"
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in folder.iterdir()}
        try:
            self._storage.upload(folder, self.path(name))
            commit = {"files": files, "score": score if math.isfinite(score) else None}
            self._storage.write_json(f"{self.path(name)}/{COMMIT_FILE}", commit)
        except OSError as error:
            self._storage.delete(self.path(name))
            raise CheckpointError.at(self._storage.absolute(self.path(name)), error) from error
        self._prune()
        return name

    def restore_newest(self, target: Path) -> str | None:
        """Copies the newest checkpoint that is whole into the folder `target`; removes those after it, which are not.

        Returns:
            Its name, or None if there is none.
        """
        for name in reversed(self._names()):
            if self.restore(name, target):
                return name
            logger.warning("the checkpoint %s is not whole: passed over", self._storage.absolute(self.path(name)))
            self._remove(name)
        return None

    def restore(self, name: str, target: Path) -> bool:
        """Copies the checkpoint `name` into the folder `target`; whether what has arrived is what was committed."""
        shutil.rmtree(target, ignore_errors=True)
        commit = self._commit(name)
        if commit is None:
            return False
        try:
            self._storage.download(self.path(name), target)
        except FileNotFoundError:  # removed meanwhile
            return False
        return all(_matches(target / file, expected) for file, expected in commit["files"].items())

    def _names(self) -> list[str]:
        """Of all checkpoints, committed or not, by position."""
        return [name for name in self._storage.list(self._prefix) if NAME.fullmatch(name)]

    def _commit(self, name: str) -> dict[str, Any] | None:
        try:
            commit = self._storage.read_json(f"{self.path(name)}/{COMMIT_FILE}")
        except (FileNotFoundError, ValueError):  # not committed, or cut short by a crash of the host
            return None
        return commit if isinstance(commit, dict) and "files" in commit else None

    def _prune(self) -> None:
        commits = {name: commit for name in self._names() if (commit := self._commit(name))}
        scores = {name: commit["score"] for name, commit in commits.items() if commit["score"] is not None}
        keep = {*list(commits)[-self._kept :], *sorted(scores, key=lambda name: scores[name])[:1]}
        for name in self._names():
            if name not in keep:  # nobody else writes here: what is not committed by now never will be
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._storage.delete(f"{self.path(name)}/{COMMIT_FILE}")  # first: half a tree is then no checkpoint
        self._storage.delete(self.path(name))


def _matches(file: Path, expected: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == expected["bytes"] and _sha256(file) == expected["sha256"]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
