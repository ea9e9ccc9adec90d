"""Records of the benchmarks: what is whole is kept, what a kill has cut off is left out, what is damaged is said."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accuracy
import comparison
import json_lines
import pytest
import worker_memory

from pipeline.settings.command_line import parse


def test_reading_changes_no_file(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    for text, rows in (
        ('{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]),
        ('{"a": 1}\n{"cut', [{"a": 1}]),
        ("", []),
        ("no record, no end of line", []),
    ):
        record.write_text(text)
        assert json_lines.read(record) == rows
        assert record.read_text() == text


def test_a_line_is_not_added_to_the_rest_of_another(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    for before, kept in (('{"a": 1}\n{"cut', [{"a": 1}]), ('{"a": 1}', [{"a": 1}]), ("", [])):
        record.write_text(before)
        json_lines.add(record, {"b": 2})
        assert record.read_text() == "".join(json.dumps(row) + "\n" for row in [*kept, {"b": 2}])


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    record, row = tmp_path / "record.jsonl", {"long": "x" * 50_000}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: json_lines.add(record, row | {"number": number}), range(40)))
    assert sorted(each["number"] for each in json_lines.read(record)) == list(range(40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\nx\n{"a": 2}\n', "line 2 of the record"),
        ('{"other": 1}\n', "is not a JSON object with a:"),
        ('{"a": 1}\n{"other": 1}', "line 2"),  # whole though its end of line is missing, so it is another kind
        ("[1]\n", "line 1"),
        (None, "No such file"),
    ],
)
def test_what_is_no_record_is_said(text: str | None, message: str, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    if text is not None:
        record.write_text(text)
    with pytest.raises(ValueError, match=message):
        json_lines.read(record, ["a"])


def test_a_record_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    assert json_lines.begin(tmp_path / "new" / "record.jsonl") == []
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        json_lines.begin(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        json_lines.begin(tmp_path / "file" / "record.jsonl")


def test_accuracies_of_other_settings_are_not_averaged_though_the_name_is_the_same() -> None:
    def row(seed: int, epochs: int) -> dict[str, Any]:
        return {"name": "cifar100", "seed": seed, "settings": {"train": {"seed": seed, "epochs": epochs}}}

    long, short = [row(0, 33), row(1, 33)], [row(0, 2)]
    published = [{"name": "published", "seed": seed, "settings": {"minutes": 60}} for seed in (0, 1)]
    assert accuracy.grouped([long[0], short[0], long[1], *published]) == [long, short, published]


def test_a_comparison_with_other_rows_or_another_model_is_another_one() -> None:
    def settings(*arguments: str) -> dict[str, Any]:
        return comparison.settings_of(parse(["quickstart", *arguments])[1].config, {})

    plain = settings()
    assert plain["data"].keys() == {"source", "sha256", "seed"}, "the records that there are stay valid"
    assert settings("--data.validation-fraction", "0.2") != plain
    assert settings("--train.use-gpu") != plain
    row = {"parameters": 1000, "mmacs": 5.0}
    assert comparison.is_of_size(row, {"parameters": 1000, "macs": 5_001_000})
    assert not comparison.is_of_size(row, {"parameters": 1001, "macs": 5_000_000})
    assert not comparison.is_of_size(row, {"parameters": 1000, "macs": 5_100_000})


def test_images_that_cannot_be_written_end_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "train-00000.part").mkdir()
    with pytest.raises(IsADirectoryError):
        worker_memory.write(tmp_path, 20)
