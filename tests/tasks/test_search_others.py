"""What a search takes over from other searches in the same storage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.storage import Storage
from pipeline.tasks.search import COMPARABLE_FILE, _others


def test_a_search_that_has_left_a_damaged_file_is_passed_over(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    files = {"own": b'"digest"', "alike": b'"digest"', "other": b'"another"', "damaged": b'"dig', "empty": b""}
    for key, content in files.items():
        storage.write_bytes(f"tasks/search/{key}/state/trials/{COMPARABLE_FILE}", content)
    storage.write_bytes("tasks/search/begun/state/file", b"")
    context: Any = SimpleNamespace(storage=storage, key="own", state="tasks/search/own/state")
    assert _others(context, "digest") == ["tasks/search/alike/state/trials"]
