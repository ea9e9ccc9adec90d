"""Finds out what lies at `data.path`: which images there are, of which class and in which split.

The kind follows from the files: Parquet, WebDataset tars, npz files, a `metadata.csv`, or else folders of classes.
Names, labels and places are read, and no pixels; `image_containers.py` reads those.
"""

import csv
import io
import os
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from pipeline.data.file_tree import IMAGE_SUFFIXES, FileTree, list_files, suffix_of

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[/_.-])({'|'.join(SPLIT_NAMES)})(?=[/_.-]|$)", re.IGNORECASE)
METADATA = "metadata.csv"
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class SplitFiles:
    """The images of one split, in the order of the listing.

    Attributes:
        names: how messages name each image.
        files: path of the file that has it.
        starts: int64 (N,), its first byte in a tar, its row in a Parquet or npz file; else 0.
        sizes: int64 (N,), its bytes; 0 where only reading it would tell.
        labels: int32 (N,).
    """

    names: Sequence[str]
    files: Sequence[str]
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> "SplitFiles":
        """The images at these positions, in this order."""
        names, files = ([column[i] for i in positions] for column in (self.names, self.files))
        return SplitFiles(names, files, self.starts[positions], self.sizes[positions], self.labels[positions])


@dataclass(frozen=True)
class Listing:
    """All images at `data.path`.

    Attributes:
        path: value of `data.path`.
        kind: `folders`, `metadata.csv`, `parquet`, `tar` or `npz`.
        tree: all files, and what was left out of them.
        label_names: in the order of the labels.
        splits: `train`, and `validation` and `test` where the source has them.
        files: all files that belong to it.
        fingerprint: SHA-256 over their names, sizes and times.
        bytes: their size.
    """

    path: str
    kind: str
    tree: FileTree
    label_names: list[str]
    splits: dict[str, SplitFiles]
    files: list[str]
    fingerprint: str
    bytes: int


@dataclass
class Collected:
    """Images as they are found, before their classes have numbers."""

    path: str
    _columns: dict[str, "_Columns"] = field(default_factory=dict)
    _number_of: dict[str | int, int] = field(default_factory=dict)

    def add(self, split: str, label: str | int, name: str, file: str, start: int = 0, size: int = 0) -> None:
        """Adds an image; a label is the name of its class, or its number."""
        columns = self._columns.setdefault(split, _Columns())
        columns.names.append(name)
        columns.files.append(file)
        columns.starts.append(start)
        columns.sizes.append(size)
        columns.labels.append(self._number_of.setdefault(label, len(self._number_of)))

    def fail(self, message: str) -> ValueError:
        return ValueError(f"data.path = {self.path!r}: {message}")

    def finish(self, names: Sequence[str] | None) -> tuple[list[str], dict[str, SplitFiles]]:
        """Names of the classes in order, and the splits with their labels.

        Args:
            names: names of the classes if labels are numbers; None: text sorted, or the numbers themselves.
        """
        found = list(self._number_of)
        if len({type(label) for label in found}) > 1:
            raise self.fail("some labels are numbers and some are text: give one of the two")
        if all(isinstance(label, int) for label in found):
            low, high = min(map(int, found), default=0), max(map(int, found), default=0)
            top = MAX_CLASSES if names is None else len(names)
            if low < 0 or high >= top:
                raise self.fail(
                    f"labels are from {low} to {high}, expected 0 to {top - 1}: leave out rows without a label"
                )
            ordered: list[str | int] = list(range(high + 1 if names is None else top))
            texts = [str(label) for label in ordered] if names is None else list(names)
        else:
            ordered = sorted(found, key=str)
            texts = [str(label) for label in ordered]
        place = {label: number for number, label in enumerate(ordered)}
        number_to_label = np.array([place[label] for label in found], np.int32)
        splits = {name: self._columns[name].split(number_to_label) for name in _IN_ORDER if name in self._columns}
        return texts, splits


_IN_ORDER = (TRAIN, VALIDATION, TEST)


@dataclass
class _Columns:
    names: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    starts: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("l"))

    def split(self, number_to_label: np.ndarray) -> SplitFiles:
        labels = number_to_label[np.array(self.labels)]
        return SplitFiles(self.names, self.files, np.array(self.starts), np.array(self.sizes), labels)


Reader = Callable[[FileTree, list[str], Collected], Sequence[str] | None]


def list_images(path: str) -> Listing:
    """Lists what lies at `path`.

    Raises:
        ValueError: if there is nothing that is understood; names `data.path` and the remedy.
    """
    from pipeline.data.image_containers import list_npz, list_parquet, list_tars

    tree, collected = list_files(path, "data.path"), Collected(path)
    suffixes = {suffix_of(name) for name in tree.files}
    tables = [name for name in tree.files if os.path.basename(name) == METADATA]
    readers: tuple[tuple[str, Sequence[str], Reader], ...] = (
        ("parquet", (".parquet",), list_parquet),
        ("tar", (".tar",), list_tars),
        ("npz", (".npz",), list_npz),
        (METADATA, (*IMAGE_SUFFIXES, ".csv") if tables else (), _list_metadata),
        ("folders", IMAGE_SUFFIXES, _list_folders),
    )
    usable = [reader for reader in readers if suffixes & set(reader[1])]
    if not usable:
        raise collected.fail(
            f"holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor Parquet, tar or npz files: give another folder"
        )
    kind, wanted, read = usable[0]
    chosen = [name for name in tree.files if suffix_of(name) in wanted]
    for name in sorted(set(tree.files) - set(chosen)):
        tree.leave_out(f"file of another kind ({suffix_of(name) or 'no suffix'})", name)
    label_names, splits = collected.finish(read(tree, chosen, collected))
    if TRAIN not in splits:
        raise collected.fail(f"has no images in {TRAIN}/, but in {', '.join(splits) or 'nothing'}: add them")
    size = sum(tree.files[name][0] for name in chosen)
    return Listing(path, kind, tree, label_names, splits, chosen, tree.fingerprint(chosen), size)


def split_of_files(names: Sequence[str], collected: Collected) -> list[str]:
    """The split of each file by its name, such as `data/train-00000-of-00002.parquet`; `train` if no name has one.

    Raises:
        ValueError: if some names have one and some have none.
    """
    splits: list[str | None] = []
    for name in names:
        found = _SPLIT_IN_NAME.findall(PurePosixPath(name).name) or _SPLIT_IN_NAME.findall(
            str(PurePosixPath(name).parent)
        )
        splits.append(SPLIT_NAMES[found[-1].lower()] if found else None)
    if any(splits) and None in splits:
        raise collected.fail(f"{names[splits.index(None)]} has no split in its name, and others have: rename it")
    return [split or TRAIN for split in splits]


def _split_folders(names: Iterable[str], collected: Collected) -> bool:
    """Whether the folders at the top are splits and not classes."""
    top = {name.partition("/")[0] for name in names if "/" in name}
    of_splits = {folder for folder in top if folder.lower() in SPLIT_NAMES}
    if top and of_splits == top:
        return True
    nested = any(name.partition("/")[0] in of_splits and name.count("/") >= 2 for name in names)
    if len(of_splits) > 1 and nested:
        raise collected.fail(
            f"holds the splits {', '.join(sorted(of_splits))} and also {', '.join(sorted(top - of_splits)[:3])}: move "
            "the other folders away"
        )
    return False


def _list_folders(tree: FileTree, chosen: list[str], collected: Collected) -> None:
    splits = _split_folders(chosen, collected)
    with_images: set[str] = set()
    for name in chosen:
        parts = name.split("/")
        split = SPLIT_NAMES[parts[0].lower()] if splits and len(parts) > 1 else TRAIN
        folders = parts[1:-1] if splits else parts[:-1]
        if not folders:
            tree.leave_out("image outside of the folders of classes", name)
            continue
        with_images.add("/".join(parts[: 2 if splits else 1]))
        collected.add(split, folders[0], name, name, size=tree.files[name][0])
    if not with_images:
        raise collected.fail(f"holds {len(chosen)} images, but in no folders of classes: put each class in a folder")
    depth = 1 if splits else 0
    empty = sorted(f for f in tree.folders if f.count("/") == depth and f not in with_images)
    # The folder of a class without an image is no data, but the person may think that it is.
    if empty := [folder for folder in empty if not splits or folder.partition("/")[0].lower() in SPLIT_NAMES]:
        others = f", nor have {len(empty) - 1} others" if len(empty) > 1 else ""
        raise collected.fail(f"the folder {empty[0]} has no images{others}: fill or remove them")


def _list_metadata(tree: FileTree, chosen: list[str], collected: Collected) -> None:
    tables = [name for name in chosen if PurePosixPath(name).name == METADATA]
    images = {name for name in chosen if suffix_of(name) in IMAGE_SUFFIXES}
    listed: set[str] = set()
    for table in tables:
        folder = str(PurePosixPath(table).parent)
        default = SPLIT_NAMES.get(PurePosixPath(table).parent.name.lower(), TRAIN)
        text = io.StringIO(tree.root.read_bytes(table).decode("utf-8-sig", "backslashreplace"), newline="")
        rows = csv.DictReader(text)
        if missing := {"file_name", "label"} - set(rows.fieldnames or ()):
            raise collected.fail(f"{table} has no column {sorted(missing)[0]}: it must have file_name and label")
        for number, row in enumerate(rows, 2):
            name = str(PurePosixPath(folder) / (row["file_name"] or ""))
            split = (row.get("split") or "").strip().lower()
            problem = (
                "is not among the images"
                if name not in images
                else "is listed twice"
                if name in listed
                else "has no label"
                if not row["label"]
                else f"has the split {split!r}, which is none of {', '.join(SPLIT_NAMES)}"
                if split and split not in SPLIT_NAMES
                else None
            )
            if problem:
                raise collected.fail(f"{table}, line {number}: {row['file_name']!r} {problem}: mend the line")
            listed.add(name)
            collected.add(SPLIT_NAMES[split] if split else default, row["label"], name, name, size=tree.files[name][0])
    for name in sorted(images - listed):
        tree.leave_out(f"not in {METADATA}", name)
