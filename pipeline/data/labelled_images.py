"""Finds out what lies at `data.path`: which images there are, of which class and in which split.

The kind follows from the files: Parquet, WebDataset tars, npz files, a `metadata.csv`, or else folders of classes.
Names, labels and places are read, and no pixels; `image_containers.py` reads those.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from pipeline.data.collected_images import TEST, TRAIN, VALIDATION, Collected, SplitFiles
from pipeline.data.excerpt import excerpt
from pipeline.data.file_tree import IMAGE_SUFFIXES, FileTree, check_unchanged, list_files, suffix_of

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[/_.-])({'|'.join(SPLIT_NAMES)})(?=[/_.-]|$)", re.IGNORECASE)
_PACKED_TAR = re.compile(r"\.(?:tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
METADATA = "metadata.csv"


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
        coarse_label_names: names of the classes of classes; None if there are none.
        coarse_of_class: int32 (classes,), the coarse label of each class; None likewise.
    """

    path: str
    kind: str
    tree: FileTree
    label_names: list[str]
    splits: dict[str, SplitFiles]
    files: list[str]
    fingerprint: str
    bytes: int
    coarse_label_names: list[str] | None = None
    coarse_of_class: np.ndarray | None = None

    def check_unchanged(self) -> None:
        """Raises a ValueError if a file has changed since, or is gone."""
        files = {name: self.tree.files[name] for name in self.files}
        check_unchanged(self.path, "data.path", files, "give the command again")


Reader = Callable[[FileTree, list[str], Collected], Sequence[str] | None]


def list_images(path: str) -> Listing:
    """Lists what lies at `path`.

    Raises:
        ValueError: if there is nothing that is understood; names `data.path` and the remedy.
    """
    from pipeline.data.image_containers import list_npz, list_parquet, list_tars

    tree, collected = list_files(path, "data.path"), Collected(path)
    suffixes = {suffix_of(name) for name in tree.files}
    tables = [name for name in tree.files if _is_table(name)]
    readers: tuple[tuple[str, Sequence[str], Reader], ...] = (
        ("parquet", (".parquet",), list_parquet),
        ("tar", (".tar",), list_tars),
        ("npz", (".npz",), list_npz),
        (METADATA, (*IMAGE_SUFFIXES, ".csv") if tables else (), _list_metadata),
        ("folders", IMAGE_SUFFIXES, _list_folders),
    )
    usable = [reader for reader in readers if suffixes & set(reader[1])]
    packed = [name for name in tree.files if _PACKED_TAR.search(name)]
    if packed and (not usable or usable[0][0] == "tar"):
        raise collected.fail(
            f"{packed[0]} is a compressed tar, of which no part can be read without the rest: unpack it to a .tar"
        )
    if not usable:
        left = "; ".join(f"{len(names):,}: {reason}" for reason, names in sorted(tree.left_out.items()))
        raise collected.fail(
            f"holds neither images ({', '.join(IMAGE_SUFFIXES)}) nor Parquet, tar or npz files"
            + f", but what is left out ({excerpt(left)})" * bool(left)
            + ": give another folder"
        )
    kind, wanted, read = usable[0]
    chosen = [name for name in tree.files if suffix_of(name) in wanted]
    tree.leave_out_others(chosen)
    names = read(tree, chosen, collected)
    label_names, splits = collected.finish(names)
    if not splits:
        left = "; ".join(f"{len(names):,}: {reason}" for reason, names in sorted(tree.left_out.items()))
        raise collected.fail(f"has no images{f' but what is left out ({excerpt(left)})' if left else ''}: add some")
    if TRAIN not in splits:
        raise collected.fail(f"has no images in {TRAIN}/, but in {', '.join(splits)}: add them")
    size = sum(tree.files[name][0] for name in chosen)
    coarse = collected.coarse(names)
    return Listing(path, kind, tree, label_names, splits, chosen, tree.fingerprint(chosen), size, *coarse)


def split_of_files(names: Sequence[str], collected: Collected) -> list[str | None]:
    """The split of each file by its name, such as `data/train-00000-of-00002.parquet`; None of all if no name has one.

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
    return splits


def check_no_split(image: str, name: str, remedy: str, collected: Collected) -> None:
    """Refuses an image of no known split in a folder that has the name of one: it would be trained, whatever its split.

    Args:
        image: Path of the image within the source.
        name: How a message names it.
        remedy: How to say the split.
    """
    if of_split := next((part for part in PurePosixPath(image).parts[:-1] if part.lower() in SPLIT_NAMES), None):
        raise collected.fail(f"{name} lies in the folder {of_split} of a split, which would not count: {remedy}")


def _split_folders(names: Sequence[str], collected: Collected) -> bool:
    """Whether the folders at the top are splits and not classes. A class may have the name of a split.

    Raises:
        ValueError: if folders of splits lie beside others, or in the folders of classes.
    """
    top = {name.partition("/")[0] for name in names if "/" in name}
    of_splits = {folder for folder in top if folder.lower() in SPLIT_NAMES}
    if top and of_splits == top:
        return True
    nested = sorted({name.partition("/")[0] for name in names if name.count("/") > 1} & of_splits)
    if nested:
        raise collected.fail(
            f"holds the splits {', '.join(nested)} and also {', '.join(sorted(top - of_splits)[:3])}: move "
            "the other folders away"
        )
    inner: dict[str, set[str]] = {}
    for name in names:
        if name.count("/") > 1:
            folder, below, _ = name.split("/", 2)
            inner.setdefault(folder, set()).add(below)
    for folder, below_it in sorted(inner.items()):
        if all(below.lower() in SPLIT_NAMES for below in below_it):
            split = min(below_it)
            raise collected.fail(
                f"has a split in the folder of a class, {folder}/{split}, where it would not count: move it to "
                f"{split}/{folder}, and the others likewise"
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
        raise collected.fail(
            f"holds {len(chosen)} images, but in no folders of classes: put each class in a folder, "
            f"or write {METADATA} with file_name and label{_other_tables(tree)}"
        )
    depth = 1 if splits else 0
    empty = sorted(f for f in tree.folders if f.count("/") == depth and f not in with_images)
    # The folder of a class without an image is no data, but the person may think that it is.
    if empty := [folder for folder in empty if not splits or folder.partition("/")[0].lower() in SPLIT_NAMES]:
        others = f", nor have {len(empty) - 1} others" if len(empty) > 1 else ""
        raise collected.fail(f"the folder {empty[0]} has no images{others}: fill or remove them")


def _other_tables(tree: FileTree) -> str:
    """What to say of a table of another name or kind, which is perhaps meant to say the classes."""
    others = tree.left_out.keys() & {
        f"file of another kind ({suffix})" for suffix in (".csv", ".json", ".jsonl", ".tsv")
    }
    found = sorted(name for reason in others for name in tree.left_out[reason])
    return f"; {found[0]} is not read" if found else ""


def _is_table(name: str) -> bool:
    return os.path.basename(name).lower() == METADATA


def _split(row: dict[str, str | None]) -> str:
    """What a row of a table says of its split; empty if it says nothing."""
    return (row.get("split") or "").strip().lower()


def _splits_of_folders(names: Sequence[str], table: str, collected: Collected) -> dict[str, str]:
    """The split of each image of a table that says none: that of the table's folder, or of the image's folder below it.

    Raises:
        ValueError: if some images lie in folders of splits and some do not, so that it is not known what is meant.
    """
    folder = PurePosixPath(table).parent
    if split_of_table := SPLIT_NAMES.get(folder.name.lower()):
        return dict.fromkeys(names, split_of_table)
    below = {name: name.removeprefix(f"{folder}/").split("/") for name in names}
    found = {name: SPLIT_NAMES.get(parts[0].lower()) if parts[1:] else None for name, parts in below.items()}
    within = [name for name, split in found.items() if split]
    if within and (without := next((name for name, split in found.items() if not split), None)):
        raise collected.fail(
            f"{table} lists {excerpt(within[0])} in the folder of a split and {excerpt(without)} in none: add a column "
            "split, or move the images"
        )
    for name in names if not within else ():
        check_no_split(name, excerpt(name), f"add a column split to {table}", collected)
    return {name: split or TRAIN for name, split in found.items()}


def _list_metadata(tree: FileTree, chosen: list[str], collected: Collected) -> None:
    tables = [name for name in chosen if _is_table(name)]
    images = {name for name in chosen if suffix_of(name) in IMAGE_SUFFIXES}
    listed: set[str] = set()
    for table in tables:
        folder = str(PurePosixPath(table).parent)
        try:
            text = io.StringIO(collected.text(tree.root.read_bytes(table), table), newline="")
            reader = csv.DictReader(text)
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]  # a field may have several lines
        except csv.Error as error:  # a field without an end, or a byte that is no text
            raise collected.fail(f"{table} is no table: {error}: write it again") from error
        except OSError as error:
            raise collected.fail(f"{table} cannot be read: {error}") from error
        if missing := {"file_name", "label"} - set(columns):
            raise collected.fail(
                f"{table} has no column {sorted(missing)[0]}, but {excerpt(columns)}: it must have file_name and "
                "label, with commas between"
            )
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise collected.fail(f"{table} has two columns {excerpt(repr(twice[0]))}: leave one out")
        listed_here = [str(PurePosixPath(folder) / (row["file_name"] or "")) for _, row in rows]
        split_of = {} if any(_split(row) for _, row in rows) else _splits_of_folders(listed_here, table, collected)
        for (number, row), name in zip(rows, listed_here, strict=True):
            collected.check_name(row["label"], table)
            split = _split(row)
            problem = (
                "is not among the images"
                if name not in images
                else "is listed twice"
                if name in listed
                else "has more fields than there are columns, perhaps because of a comma without quotes around"
                if None in row
                else "has no label"
                if not row["label"]
                else f"has the split {excerpt(repr(split))}, which is none of {', '.join(SPLIT_NAMES)}"
                if split and split not in SPLIT_NAMES
                else "has no split, and others have"
                if not split and not split_of
                else None
            )
            if problem:
                raise collected.fail(
                    f"{table}, line {number}: {excerpt(repr(row['file_name']))} {problem}: mend the line"
                )
            listed.add(name)
            if "coarse_label" in row:
                collected.group(row["label"], row["coarse_label"], f"{table}, line {number}: {excerpt(name)!r}")
            taken = SPLIT_NAMES[split] if split else split_of[name]
            collected.add(taken, row["label"], name, name, size=tree.files[name][0])
    tops = {name.partition("/")[0] for name in images if "/" in name}
    of_splits = {folder for folder in tops if folder.lower() in SPLIT_NAMES}
    if without := sorted(of_splits - {name.partition("/")[0] for name in listed}):
        raise collected.fail(
            f"{tables[0]} lists no image of {without[0]}/, and no other {METADATA} does: write one there, or move the "
            "folder away"
        )
    for name in sorted(images - listed):
        tree.leave_out(f"not in {METADATA}", name)
