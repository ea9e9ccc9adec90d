"""Checkpoints in storage: committed as a whole, verified when read; the last few and the best are kept.

    <prefix>/<epoch>-<step>-<id>/...           the files of one checkpoint
    <prefix>/<epoch>-<step>-<id>/commit.json   size and SHA-256 of each file; it is written last, as the commit

Ray Train's checkpoint manager is not used: it registers a checkpoint only when its controller next polls the workers,
so that a crash before then loses a checkpoint that is already in storage, and it does not verify what it restores.
"""

import contextlib
import logging
import math
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.masking import mask
from pipeline.storage import Storage, sha256_of_file

COMMIT_FILE = "commit.json"
# Written by `pipeline.training.checkpoint`; its name is here for readers that do without Keras.
STATE_FILE = "state.json"
# Names sort by position in the training.
NAME = re.compile(r"[0-9]{6}-[0-9]{9}-[0-9a-f]{12}")

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are untouched."""

    @classmethod
    def at(cls, path: str, cause: BaseException) -> "CheckpointError":
        return cls(
            f"the checkpoint {path} could not be written: {cause}; the one before it is intact: fix the cause, and the "
            "same command continues from there"
        )


@dataclass(frozen=True)
class CheckpointsDamaged:
    """The newest checkpoints were not what had been committed, so that a training loses what came after another one.

    Attributes:
        paths: Where they were, in order of position, without passwords.
        epoch: Number of finished epochs in the checkpoint that is intact; 0 if there is none.
        step: Number of steps in it after these.
    """

    paths: tuple[str, ...]
    epoch: int = 0
    step: int = 0

    @property
    def warning(self) -> str:
        """What the person who waits should know."""
        many = len(self.paths) > 1
        what = f"the checkpoint{'s' if many else ''} {', '.join(self.paths)} {'are' if many else 'is'} damaged"
        if self.step:
            return f"{what} and removed: the training goes on after step {self.step} of epoch {self.epoch + 1}"
        if self.epoch:
            return f"{what} and removed: the training goes on after epoch {self.epoch}"
        return f"{what} and removed, and none is intact: the training starts from the beginning"


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        storage: Where the checkpoints are.
        prefix: Folder below the storage root that holds nothing else.
        kept: Number of the last checkpoints to keep; the one with the lowest score is kept too.
    """

    def __init__(self, storage: Storage, prefix: str, kept: int) -> None:
        self._storage, self._prefix, self._kept = storage, prefix, kept

    def path(self, name: str) -> str:
        """Path of the checkpoint `name` below the storage root."""
        return Storage.join(self._prefix, name)

    def commit(self, folder: Path, epoch: int, step: int, score: float = math.inf) -> str:
        """Copies the files in `folder` to storage, commits them, then removes the checkpoints that are not kept.

        Args:
            folder: The files of the checkpoint.
            epoch: Number of finished epochs.
            step: Number of steps taken in the epoch after these.
            score: Score of the last epoch, lower is better; infinite within an epoch.

        Returns:
            The name of the checkpoint.

        Raises:
            CheckpointError: if it could not be written; a partial copy is removed.
        """
        name = f"{epoch:06d}-{step:09d}-{uuid.uuid4().hex[:12]}"
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for file in folder.iterdir()}
        try:
            self._storage.upload(folder, self.path(name))
            commit = {"files": files, "score": score if math.isfinite(score) else None}
            self._storage.write_json(f"{self.path(name)}/{COMMIT_FILE}", commit)
        except OSError as error:
            # What fails the copy may fail this too; without its commit, the partial copy is none that is restored.
            with contextlib.suppress(OSError):
                self._storage.delete(self.path(name))
            raise CheckpointError.at(self._storage.absolute(self.path(name)), error) from error
        try:
            self._prune()
        except OSError as error:  # the checkpoint is safe, and the next one tries again
            place = mask(self._storage.absolute(self._prefix))
            logger.warning("old checkpoints in %s could not be removed: %s", place, mask(str(error)))
        return name

    def restore_newest(self, target: Path, on_damage: Callable[[CheckpointsDamaged], None] | None = None) -> str | None:
        """Copies the newest intact checkpoint into the folder `target`; removes those after it.

        Args:
            target: Folder that gets the files.
            on_damage: Called once if some of those after it were damaged. One that was never committed is not: whoever
                wrote it was killed.

        Returns:
            Its name, or None if there is none.
        """
        unusable: list[str] = []
        found = None
        for name in reversed(self._names()):
            if self.restore(name, target):
                found = name
                break
            unusable.insert(0, name)
        damaged = [name for name in unusable if self._storage.exists(f"{self.path(name)}/{COMMIT_FILE}")]
        if damaged:
            paths = tuple(mask(self._storage.absolute(self.path(name))) for name in damaged)
            epoch, step = map(int, found.split("-")[:2]) if found else (0, 0)
            damage = CheckpointsDamaged(paths, epoch, step)
            logger.warning(damage.warning)
            if on_damage:
                on_damage(damage)
        for name in reversed(unusable):  # last, so that a kill before cannot take the warning with it
            self._remove(name)
        return found

    def restore(self, name: str, target: Path) -> bool:
        """Copies the checkpoint `name` into the folder `target`; returns whether the copy is what was committed."""
        shutil.rmtree(target, ignore_errors=True)
        commit = self._commit(name)
        if commit is None:
            return False
        try:
            self._storage.download(self.path(name), target)
        except FileNotFoundError:  # removed in the meantime
            return False
        return all(_matches(target / file, expected) for file, expected in commit["files"].items())

    def _names(self) -> list[str]:
        """Names of all checkpoints, committed or not, in order of position."""
        return [name for name in self._storage.list(self._prefix) if NAME.fullmatch(name)]

    def _commit(self, name: str) -> dict[str, Any] | None:
        try:
            commit = self._storage.read_json(f"{self.path(name)}/{COMMIT_FILE}")
        except (FileNotFoundError, ValueError):  # not committed, or truncated by a crash of the host
            return None
        return commit if isinstance(commit, dict) and "files" in commit else None

    def _prune(self) -> None:
        commits = {name: commit for name in self._names() if (commit := self._commit(name))}
        scores = {name: commit["score"] for name, commit in commits.items() if commit["score"] is not None}
        keep = {*list(commits)[-self._kept :], *sorted(scores, key=lambda name: scores[name])[:1]}
        for name in self._names():
            if name not in keep:  # there is no other writer, so an uncommitted one stays uncommitted
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._storage.delete(
            f"{self.path(name)}/{COMMIT_FILE}"
        )  # first, so that a partly deleted folder is no checkpoint
        self._storage.delete(self.path(name))


def _matches(file: Path, expected: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == expected["bytes"] and sha256_of_file(file) == expected["sha256"]
