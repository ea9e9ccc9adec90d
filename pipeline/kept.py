"""What `clean` leaves in a storage folder: what registered versions, recent results and drivers at work rely on.

In doubt something stays, and a note says why: a registry that cannot be asked may have any version, and a driver that
gives no sign of life may go on.
"""

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from pipeline.masking import MASK, mask
from pipeline.registry.fetch import registered_uris
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.tracking.server import check_server, has_database
from pipeline.workflow.lease import Claim
from pipeline.workflow.run import recorded_keys
from pipeline.workflow.task import Manifest

CLAIM_FILE = re.compile(r"drivers/(?P<key>[0-9a-f]{64})/(?P<driver>[^/]+)\.json")
# A claim is renewed every few seconds. The clocks of this machine and of the storage may differ by minutes.
SILENT_HOURS = 1.0
SECONDS_PER_HOUR = 3600
Files = Mapping[str, pafs.FileInfo]
Keys = Mapping[str, Mapping[str, str]]
"""Keys of a run's tasks by name, by the key of the run."""


def files_below(storage: Storage, folder: str) -> Files:
    """All files below `folder`, by their path below the root of the storage."""
    selector = pafs.FileSelector(storage.fs_path(folder), recursive=True, allow_not_found=True)
    prefix = storage.fs_path("").rstrip("/") + "/"
    infos = storage.filesystem.get_file_info(selector)
    return {info.path.removeprefix(prefix): info for info in infos if info.type == pafs.FileType.File}


def hours_since(files: Files) -> float:
    """Hours since the last write to one of these files."""
    return (time.time() - max(info.mtime_ns or 0 for info in files.values()) / 1e9) / SECONDS_PER_HOUR


def age(hours: float) -> str:
    """As `3 h ago`."""
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"


@dataclass
class Kept:
    """Folders of tasks that stay, with notes for the person who cleans.

    Attributes:
        needed: Folders without which something that stays could not be made, understood or continued.
        whole: Those of them at which a driver may be working, so that all in them stays.
        notes: Sentences that say what stays in doubt, and what to do about it.
    """

    needed: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Registries:
    """Where versions are looked up: each in the registry that its run has recorded.

    Attributes:
        given: URI for the registry that was recorded so, but for the login, and for runs that recorded none.
        moved_from: What runs have recorded as the URI of the registry that is `given` now.
    """

    given: str | None = None
    moved_from: str | None = None

    def registered(self, manifests: Mapping[str, Manifest]) -> tuple[list[str], list[str]]:
        """Folders of the registrations whose version exists, or may exist, and notes.

        Raises:
            Exception: If the registry `given` cannot be asked: a ValueError, or an error of MLflow.
        """
        registrations = {folder: manifest for folder, manifest in manifests.items() if manifest["task"] == "register"}
        known: dict[str | None, set[str] | None] = {}
        notes, found = [], []
        same = {_without_login(uri) for uri in (self.given, self.moved_from) if uri}
        used = False
        for folder, manifest in registrations.items():
            recorded, version = (manifest["output"].get(name) for name in ("tracking_uri", "uri"))
            if self.given and (not recorded or _without_login(recorded) in same):
                used = True
                if self.given not in known:
                    known[self.given] = _versions(self.given)
                recorded = self.given
            elif recorded not in known:
                known[recorded], why = _try_versions(recorded)
                notes += [f"what its versions need stays, because the registry {why}"] if why else []
            versions = known[recorded]
            if versions is None or version is None or version in versions:
                found.append(folder)
        if self.given and registrations and not used:
            notes.append(f"--tracking-uri was not used, because no run has recorded the registry {mask(self.given)}")
        return found, notes


def _without_login(uri: str) -> str:
    """`uri` as it is compared: a run records it without the login, which may also have come from the environment."""
    uri = mask(uri).replace(f"://{MASK}@", "://").rstrip("/")
    if uri.startswith("sqlite:///"):
        file, mark, options = uri.removeprefix("sqlite:///").partition("?")
        return f"sqlite:///{os.path.realpath(file)}{mark}{options}"
    return uri


def _versions(uri: str) -> set[str]:
    if not uri.startswith("sqlite:"):
        check_server(uri)  # MLflow would wait for minutes for a database that does not answer
    return registered_uris(uri)


def _try_versions(recorded: str | None) -> tuple[set[str] | None, str | None]:
    """The versions in a registry that a run has recorded, or why it cannot be asked."""
    if not recorded:
        return None, "of some run was not recorded: give --tracking-uri"
    if MASK in recorded:
        return None, f"{recorded} was recorded without its login: give --tracking-uri"
    try:
        if not has_database(recorded):
            return None, (
                f"{mask(recorded)} is not there: if it has moved, give --tracking-uri and --moved-from {mask(recorded)}"
            )
        return _versions(recorded), None
    except Exception as error:  # of MLflow, of a database, or of its driver, which may not be installed
        said = " ".join(mask(str(error)).split())[:400]
        return None, f"{mask(recorded)} cannot be asked: {said}: clean again when it answers"


@dataclass(frozen=True)
class ClaimFile:
    """A claim of a driver at a run or a task.

    Attributes:
        key: Key of the run or the task.
        driver: Id of the driver.
        claim: What the file says; None if it is no claim.
        hours: Hours since it was renewed; None if the storage does not tell.
    """

    key: str
    driver: str
    claim: Claim | None
    hours: float | None


def claimed_keys(storage: Storage) -> set[str]:
    """Keys of the runs and tasks at which a driver works, or waits to work."""
    return {found["key"] for found in map(CLAIM_FILE.fullmatch, files_below(storage, "drivers")) if found}


def read_claims(storage: Storage) -> list[ClaimFile]:
    """The claims of all drivers, be they alive or not."""
    claims = []
    for path, info in sorted(files_below(storage, "drivers").items()):
        if found := CLAIM_FILE.fullmatch(path):
            claim = None
            try:
                claim = Claim.from_json(storage.read_json(path))
            except FileNotFoundError:
                continue  # it has just ended
            except ValueError:
                pass  # it is damaged, and its driver may be alive all the same
            claims.append(
                ClaimFile(found["key"], found["driver"], claim, hours_since({path: info}) if info.mtime_ns else None)
            )
    return claims


def find_kept(
    storage: Storage,
    claims: Collection[ClaimFile],
    folders: Collection[str],
    manifests: Mapping[str, Manifest],
    recent: Set[str],
    registries: Registries,
) -> Kept:
    """What stays of `folders`, apart from what is itself `recent`.

    Args:
        storage: Where they are.
        claims: Those that were there before `folders` were listed.
        folders: Folders of tasks.
        manifests: Manifests of those that are finished.
        recent: Those that were written to a short time ago.
        registries: Where versions are looked up.

    Raises:
        Exception: As `Registries.registered`.
    """
    kept, records = Kept(), recorded_keys(storage)
    registered, kept.notes = registries.registered(manifests)
    followers = [
        folder
        for folder, manifest in manifests.items()
        if f"tasks/register/{manifest['inputs'].get('register')}" in registered
    ]
    kept.notes += _notes_on(storage, claims)
    unknown = []
    for key in sorted({claim.key for claim in claims}):
        found = set(_folders_of(key, folders, records))
        kept.whole |= found
        if not found or any(_inputs(folder, manifests, records) is None for folder in found):
            unknown.append(f"the run or task {key[:12]}, at which a driver works,")
    unknown += [
        f"{folder[:-52]}, which is recent and not finished,"
        for folder in sorted(recent)
        if _inputs(folder, manifests, records) is None
    ]
    if unknown:
        # Runs of earlier versions do not say what an unfinished task reads.
        kept.needed = (set(folders) - recent) | kept.whole
        kept.notes.append(f"all tasks stay, because {unknown[0]} has left no record of what it reads: clean later")
        return kept
    waiting = [*registered, *followers, *kept.whole]
    for folder in recent:
        waiting += _inputs(folder, manifests, records) or ()
    while waiting:
        if (folder := waiting.pop()) not in kept.needed:
            kept.needed.add(folder)
            waiting += _inputs(folder, manifests, records) or ()
    return kept


def _folders_of(key: str, folders: Iterable[str], records: Keys) -> Iterator[str]:
    """The folders of all tasks of the run with this key, if there is one, and that of the task with this key."""
    yield from (folder for folder in folders if folder.endswith(f"/{key}"))
    for run, keys in records.items():
        yield from (f"tasks/{name}/{own}" for name, own in keys.items() if key in (run, own))


def _inputs(folder: str, manifests: Mapping[str, Manifest], records: Keys) -> list[str] | None:
    """Folders of the tasks whose outputs a task reads; None if it is not known."""
    if folder in manifests:
        return [f"tasks/{name}/{key}" for name, key in manifests[folder]["inputs"].items()]
    _, task, own = folder.split("/")
    keys = next((keys for keys in records.values() if keys.get(task) == own), None)
    if keys is None:
        return None
    # A run of a model of one's own has fewer tasks.
    names = next((each.inputs for each in TASKS if each.name == task), ())
    return [f"tasks/{name}/{keys[name]}" for name in names if name in keys]


def _notes_on(storage: Storage, claims: Iterable[ClaimFile]) -> list[str]:
    """A sentence for each driver that has claims."""
    notes = {}
    for each in claims:
        claim, files = each.claim, f"{storage.absolute('drivers')}/*/{each.driver}.json"
        if claim is None:
            notes[each.driver] = f"a run stays, though {files} is no claim of a driver: delete it if no run goes on"
            continue
        who = f"process {claim.pid} on {claim.host}"
        if claim.is_dead():
            notes[each.driver] = (
                f"the run of {who} stays, though that has ended: give its command again, or delete {files}"
            )
        elif each.hours is not None and each.hours >= SILENT_HOURS:
            notes[each.driver] = (
                f"the run of {who} stays, though that gave its last sign of life {age(each.hours)}: if it has ended, "
                f"give its command again, or delete {files}"
            )
        else:
            notes[each.driver] = f"the run of {who} stays, because that is at work"
    return list(notes.values())
