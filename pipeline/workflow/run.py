"""The tasks of a run in storage: their keys, and which of them are done.

    tasks/<name>/<key>/manifest.json         written last: writing it is the commit, since an object store has no rename
    tasks/<name>/<key>/attempt-<run>-<id>/   what one attempt wrote; the manifest names the attempt that counts
    tasks/<name>/<key>/state/                what outlives an attempt that was cut off, such as checkpoints
    runs/<key>.json                          the unique id of the run
    runs/<key>.tasks.json                    the keys of its tasks, for `clean`: an unfinished task has no manifest
    drivers/<key>/                           which driver works at the run or at a task with a state; see `lease.py`

A task's key is the SHA-256 of its name, its version, the settings that decide its output and the keys of its inputs, so
that all keys are known before anything runs. A task whose manifest is in storage is done, for every later run too.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic

from pipeline.storage import Storage
from pipeline.workflow.task import C, Manifest, Task


@dataclass(frozen=True)
class Run(Generic[C]):
    """Tasks with one configuration in one storage.

    Attributes:
        tasks: All tasks, in an order that puts inputs first; the last one follows from all others.
        config: Configuration of the run.
        storage: Where the outputs and manifests are.
    """

    tasks: tuple[Task[C], ...]
    config: C
    storage: Storage

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key of each task by name."""
        keys: dict[str, str] = {}
        for task in self.tasks:
            parts = {
                "task": task.name,
                "version": task.version,
                "section": task.section(self.config),
                "inputs": {name: keys[name] for name in task.inputs},
            }
            keys[task.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return keys

    @property
    def key(self) -> str:
        """Key of the run: that of its last task, which all settings decide."""
        return self.keys[self.tasks[-1].name]

    def home(self, task: str) -> str:
        """Storage prefix of a task."""
        return f"tasks/{task}/{self.keys[task]}"

    def until(self, task: str | None) -> tuple[Task[C], ...]:
        """The tasks up to and including this one; all of them if it is None."""
        names = [each.name for each in self.tasks]
        return self.tasks[: names.index(task) + 1] if task else self.tasks

    def following(self, names: Iterable[str]) -> set[str]:
        """`names` and the names of all tasks that follow from them, directly or not."""
        found = set(names)
        for task in self.tasks:
            if found & set(task.inputs):
                found.add(task.name)
        return found

    def preceding(self, name: str) -> set[str]:
        """Names of all tasks from which this one follows, directly or not."""
        found = {name}
        for task in reversed(self.tasks):
            if task.name in found:
                found |= set(task.inputs)
        return found - {name}

    def done(self) -> dict[str, Manifest]:
        """Manifests of the tasks that need not run: they are committed and current, and so is all they follow from."""
        found: dict[str, Manifest] = {}
        for task in self.tasks:
            if all(name in found for name in task.inputs) and (manifest := self.committed(task)):
                found[task.name] = manifest
        return found

    def committed(self, task: Task[C]) -> Manifest | None:
        """The manifest of a task; None if there is none, or its output is not what this configuration asks for.

        Raises:
            ValueError: as `read_manifest`.
        """
        manifest = self.written(task)
        return manifest if manifest and task.is_current(self.config, manifest["output"]) else None

    def written(self, task: Task[C]) -> Manifest | None:
        """The manifest of a task, whatever configuration its output is for; None if there is none.

        Raises:
            ValueError: as `read_manifest`.
        """
        path = self.manifest_path(task.name)
        return read_manifest(self.storage, path, task.name) if self.storage.exists(path) else None

    def forget(self, names: Iterable[str]) -> None:
        """Deletes the manifests of these tasks and the states that they left; the run gets a new identity.

        If the process is killed meanwhile, no task is left that follows from a forgotten one.
        """
        # First: with the old identity, a model that is trained anew would count as registered.
        self.storage.delete(self._identity_path)
        wanted = set(names)
        for task in reversed(self.tasks):  # what follows before that from which it follows
            if task.name in wanted:
                self.storage.delete(self.manifest_path(task.name))  # first: half of a tree is then no finished task
                self.storage.delete(self.home(task.name))

    def identity(self) -> str:
        """Unique id of the run; made at the first call, and the same until a task of the run is forgotten.

        Raises:
            ValueError: if the file with the identity is damaged; names it.
        """
        if not self.storage.exists(self._identity_path):
            self.record_keys()
            self.storage.write_json(self._identity_path, {"identity": uuid.uuid4().hex})
        try:
            found = self.storage.read_json(self._identity_path)
        except ValueError:
            found = None
        if isinstance(found, dict) and isinstance(identity := found.get("identity"), str) and identity:
            return identity
        raise ValueError(
            f"{self.storage.absolute(self._identity_path)} does not hold the identity of a run: delete it, and the run "
            "gets a new one, with new runs in MLflow"
        )

    def record_keys(self) -> None:
        """Writes down which tasks the run has, for those who see claims and unfinished tasks and nothing else of it.

        Call it before the run is claimed. It writes the same each time, since the key of the run decides it.
        """
        self.storage.write_json(f"runs/{self.key}.tasks.json", self.keys)

    def manifest_path(self, task: str) -> str:
        """Storage path of the manifest of a task."""
        return f"{self.home(task)}/manifest.json"

    @property
    def _identity_path(self) -> str:
        return f"runs/{self.key}.json"


def recorded_keys(storage: Storage) -> dict[str, dict[str, str]]:
    """What runs have written by `record_keys`, by the keys of the runs; without files that are damaged."""
    found = {}
    for name in storage.list("runs"):
        run = name.removesuffix(".tasks.json")
        if run == name:
            continue
        try:
            keys = storage.read_json(f"runs/{name}")
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(keys, dict) and run in keys.values() and all(isinstance(key, str) for key in keys.values()):
            found[run] = keys
    return found


def read_manifest(storage: Storage, path: str, task: str) -> Manifest:
    """The manifest of a task that is done.

    Raises:
        ValueError: if the file is no manifest of this task; names it.
    """
    try:
        manifest = storage.read_json(path)
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and manifest.get("task") == task:
        kinds = {"attempt": str, "inputs": dict, "output": dict}
        if all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
            return manifest
    raise ValueError(f"{storage.absolute(path)} is no manifest of the task {task}: delete it, and the task runs again")
