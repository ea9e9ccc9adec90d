"""What is asked of every node of a cluster: its storage, its code and its versions."""

import importlib
import sys
from pathlib import Path

import pytest

from pipeline.storage import Storage
from pipeline.workflow import nodes
from pipeline.workflow.nodes import SOURCES, check_file, check_nodes


@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_lacks_the_code_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(
        "from pipeline.storage import Storage\n\n\nclass Here(Storage):\n"
        "    def __reduce__(self):\n        return Here, (self.uri,)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # Ray's workers have started with that of before
    storage = importlib.import_module("only_here").Here(str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=r"node [\d.]+ cannot .*No module named 'only_here'.*: install this project"):
        check_nodes(storage)
    assert storage.list("") == [], "the probe is left behind"


@pytest.mark.usefixtures("ray_cluster")
def test_a_node_with_other_versions_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers look for themselves; what this process finds stands in for another machine."""
    said: list[str] = []
    check_nodes(Storage(str(tmp_path)), ("keras", "no-such-package"), said.append)
    assert said == []
    found = nodes.versions(("keras", "tensorflow"))
    monkeypatch.setattr(nodes, "versions", lambda packages: found | {"keras": "3.0.0", SOURCES: "0123abcd"})
    check_nodes(Storage(str(tmp_path)), ("keras", "tensorflow"), said.append)
    (warning,) = said
    assert warning.startswith("warning: node ")
    assert f"{SOURCES} {found[SOURCES]} (here 0123abcd), keras {found['keras']} (here 3.0.0): install" in warning
    assert list(tmp_path.iterdir()) == []


def test_any_other_source_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "ROOT", tmp_path)
    found = set()
    for name, code in (("pipeline/a.py", "x = 1\n"), ("pipeline/a.py", "x = 2\n"), ("tune/b.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
        nodes._digest_of_sources.cache_clear()
        found.add(nodes.versions(())[SOURCES])
    nodes._digest_of_sources.cache_clear()
    assert len(found) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_does_not_see_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of another machine are given, since there is none here; test_hosts.py has one."""
    (tmp_path / "a.png").write_bytes(bytes(100))
    root, remedy = Storage(str(tmp_path)), "mount the same folder on all nodes, or give an object store"
    check_file(root, "a.png", "input")
    check_file(root, "b.png", "input")  # which nobody can read
    for answer, why in (
        ("No such file", r"cannot read \S+/a.png \(No such file\)"),
        (nodes.DIGEST, "sees another file"),
    ):
        monkeypatch.setattr(nodes, "ask_every_node", lambda *_, answer=answer, **__: [("10.0.0.2", answer)])
        with pytest.raises(ValueError, match=rf"^input = '{tmp_path}': node 10\.0\.0\.2 {why}.*: {remedy}"):
            check_file(root, "a.png", "input")
