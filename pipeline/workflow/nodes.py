"""Checks that every node of a cluster sees the same storage, and has this project and the same versions."""

import functools
import hashlib
import importlib.metadata
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.storage import Storage

ANSWER_SECONDS = 60.0
"""Time for one process on every node to start and to answer."""
LONGEST_REASON = 400
SOURCES = "the sources of this project"
DIGEST = "sha256:"
ROOT = Path(__file__).resolve().parents[2]


def ask_every_node(
    function: Callable[..., Any], *arguments: Any, say: Callable[[str], None] = lambda text: None
) -> Iterator[tuple[str, Any]]:
    """Calls a function in a process of each node of the cluster.

    A node that does not answer in time is skipped, since it may be leaving.

    Args:
        function: A function of this project.
        arguments: Its arguments.
        say: Gets a line if some nodes have not answered after half of that time.

    Yields:
        The address of a node, and what the function has returned there.

    Raises:
        ValueError: if a node lacks the code; names the node.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = ray.remote(num_cpus=0, max_retries=0)(function)
    on = {
        asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments): address
        for node, address in nodes.items()
    }
    answered, silent = ray.wait(list(on), num_returns=len(on), timeout=ANSWER_SECONDS / 2)
    if silent:
        names = ", ".join(on[answer] for answer in silent)
        say(f"waits for an answer of the nodes {names}, up to {ANSWER_SECONDS / 2:g} s more")
        answered, _ = ray.wait(list(on), num_returns=len(on), timeout=ANSWER_SECONDS / 2)
    for answer in answered:
        try:
            yield on[answer], ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            reason = str(error).strip().rpartition("\n")[2][:LONGEST_REASON]
            raise ValueError(
                f"node {on[answer]} cannot run the code of this project: {reason}: install this project and the "
                "packages of its requirements.txt there, in the versions that this machine has"
            ) from error
        except ray.exceptions.RayError:
            continue  # the node has gone meanwhile


def check_nodes(
    storage: Storage,
    packages: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    option: str = "storage",
) -> None:
    """Checks that every node of the cluster can read what this process has just written, and compares versions.

    Args:
        storage: Storage that every node must see, given as `option`.
        packages: Names of the packages whose versions are compared, beside the sources of this project.
        say: Gets what `ask_every_node` says, and a warning for each node that has other versions, with which it may
            compute other numbers.

    Raises:
        ValueError: if a node cannot read it, or lacks the code that would; names the node.
    """
    probe, word = f"probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    storage.write_bytes(probe, word.encode())
    here = versions(packages)
    try:
        for node, (why, there) in ask_every_node(_look, storage, probe, word, packages, say=say):
            if why:
                raise ValueError(f"{option} = {storage.uri!r}: node {node} {why}")
            if others := [f"{name} {there[name]} (here {here[name]})" for name in here if there[name] != here[name]]:
                say(
                    f"warning: node {node} has {', '.join(others)}: install the same everywhere, since another version "
                    "may compute other numbers, and those of this machine are recorded"
                )
    finally:
        storage.delete(probe)


def check_file(root: Storage, file: str, option: str, say: Callable[[str], None] = lambda text: None) -> None:
    """Checks that every node of the cluster reads in a file what this process reads there.

    Args:
        root: Storage of the file, given as `option`.
        file: Its path in `root`. Its first megabyte is compared.
        say: Gets what `ask_every_node` says.

    Raises:
        ValueError: if a node cannot read it, or reads something else; names the node.
    """
    here = _digest_of_file(root, file)
    if not here.startswith(DIGEST):
        return  # nobody can read it, which is said where its rows are read
    for node, there in ask_every_node(_digest_of_file, root, file, say=say):
        if there != here:
            what = "sees another file at" if there.startswith(DIGEST) else "cannot read"
            why = "" if there.startswith(DIGEST) else f" ({there})"
            raise ValueError(
                f"{option} = {root.uri!r}: node {node} {what} {root.absolute(file)}{why}: mount the same folder on all "
                "nodes, or give an object store"
            )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages` in this process, and the beginning of a hash of this project's sources as `SOURCES`."""
    found = {SOURCES: _digest_of_sources()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@functools.cache
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for package in ("perceiver", "pipeline", "tune"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:8]


def _digest_of_file(root: Storage, file: str) -> str:
    """A hash of the first megabyte, which begins with `DIGEST`, or why it cannot be read."""
    try:
        with root.filesystem.open_input_file(root.fs_path(file)) as source:
            return DIGEST + hashlib.sha256(source.read(1 << 20)).hexdigest()
    except OSError as error:
        return str(error)[:LONGEST_REASON]


def _look(storage: Storage, probe: str, word: str, packages: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What `_why_unseen` and `versions` find on the node that runs this."""
    return _why_unseen(storage, probe, word), versions(packages)


def _why_unseen(storage: Storage, probe: str, word: str) -> str:
    """Why this node cannot read `word` from the file `probe`; empty if it can."""
    try:
        if storage.read_bytes(probe).decode() == word:
            return ""
    except FileNotFoundError:
        if storage.is_local:
            return (
                "sees another folder under this path than the driver: mount the same folder on all nodes, or give an "
                "object store"
            )
    except OSError as error:
        return f"cannot read there: {error}"
    return "does not see what the driver writes there: give all nodes the same store"
