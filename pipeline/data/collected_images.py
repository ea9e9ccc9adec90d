"""Images as they are found: their places, splits and labels, whatever the labels are called at first."""

import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.masking import CONTROL

TRAIN, VALIDATION, TEST = "train", "validation", "test"
MAX_CLASSES = 100_000
# Of no width: a soft hyphen, blanks and marks of the order of bytes. Joiners and tags tell emoji and words apart.
_UNSEEN = re.compile("[\u00ad\u180e\u200b\u2060\ufe0e\ufe0f\ufeff]")
LONGEST_NAME = 1000
"""Characters of the name of a class, or of an image in a tar."""


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


@dataclass
class Collected:
    """Images as they are found, before their classes have numbers."""

    path: str
    coarse_names: list[str] | None = None
    """Names of the coarse classes if coarse labels are numbers; None: as for classes."""
    _columns: dict[str, "_Columns"] = field(default_factory=dict)
    _number_of: dict[str | int, int] = field(default_factory=dict)
    _coarse_of: dict[str | int, str | int] = field(default_factory=dict)

    def add(self, split: str, label: str | int, name: str, file: str, start: int = 0, size: int = 0) -> None:
        """Adds an image; a label is the name of its class, or its number."""
        if isinstance(label, str) and label not in self._number_of:
            self._check_class(label, name)
        columns = self._columns.setdefault(split, _Columns())
        columns.names.append(name)
        columns.files.append(file)
        columns.starts.append(start)
        columns.sizes.append(size)
        columns.labels.append(self._number_of.setdefault(label, len(self._number_of)))

    def _check_class(self, label: str, name: str) -> None:
        """Refuses names that are none, or that a terminal or a file of text would not show as they are."""
        if not label.strip():
            raise self.fail(f"{name} has no label: give it one, or leave it out")
        if CONTROL.search(label) or "\t" in label or "\n" in label:
            raise self.fail(f"{name!r} has the class {label!r}, with control characters: rename it")

    def group(self, label: str | int, coarse: str | int | None, name: str) -> None:
        """Notes the coarse class of a class, of which all images must have the same.

        Args:
            label, coarse: names or numbers.
            name: how a message names the image.
        """
        if coarse is None or coarse == "":
            raise self.fail(f"{name} has no coarse label, and others have: give it one, or leave out the column")
        if (known := self._coarse_of.setdefault(label, coarse)) != coarse:
            raise self.fail(
                f"{name} of the class {label!r} has the coarse label {coarse!r}, and others have {known!r}: give all "
                "images of a class the same"
            )

    def check_name(self, name: str | int | None, file: str) -> None:
        """Refuses names that are too long to be meant as such, which would fill memory and messages."""
        if isinstance(name, str) and len(name) > LONGEST_NAME:
            raise self.fail(
                f"{file} has a name of {len(name):,} characters, more than {LONGEST_NAME:,}: write it again"
            )

    def text(self, data: bytes, name: str) -> str:
        """The text of a file, which must be UTF-8: names in another encoding would become others without a word."""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.fail(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None

    def fail(self, message: str) -> ValueError:
        return ValueError(f"data.path = {self.path!r}: {message}")

    def finish(self, names: Sequence[str] | None) -> tuple[list[str], dict[str, SplitFiles]]:
        """Names of the classes in order, and the splits with their labels.

        Args:
            names: names of the classes if labels are numbers; None: text sorted, or the numbers themselves.
        """
        ordered, texts = self._in_order(list(self._number_of), names, "labels")
        place = {label: number for number, label in enumerate(ordered)}
        number_to_label = np.array([place[label] for label in self._number_of], np.int32)
        splits = {name: self._columns[name].split(number_to_label) for name in _IN_ORDER if name in self._columns}
        return texts, splits

    def coarse(self, names: Sequence[str] | None) -> tuple[list[str], np.ndarray] | tuple[None, None]:
        """Names of the coarse classes, and the coarse label of each class, int32 (classes,); or None twice.

        Args:
            names: as for `finish`.
        """
        if not self._coarse_of:
            return None, None
        if missing := [label for label in self._number_of if label not in self._coarse_of]:
            raise self.fail(f"the class {missing[0]!r} has no coarse label, and others have: give all one, or none")
        labels, _ = self._in_order(list(self._number_of), names, "labels")
        coarse = list(dict.fromkeys(self._coarse_of.values()))
        ordered, texts = self._in_order(coarse, self.coarse_names, "coarse labels")
        place = {label: number for number, label in enumerate(ordered)}
        # A class without images has none; whoever checks the classes says so.
        return texts, np.array([place.get(self._coarse_of.get(label, ""), 0) for label in labels], np.int32)

    def _in_order(
        self, found: list[str | int], names: Sequence[str] | None, what: str
    ) -> tuple[list[str | int], list[str]]:
        """The labels in order of their numbers, and their names."""
        if len({type(label) for label in found}) > 1:
            raise self.fail(f"some {what} are numbers and some are text: give one of the two")
        if all(isinstance(label, int) for label in found):
            low, high = min(map(int, found), default=0), max(map(int, found), default=0)
            top = MAX_CLASSES if names is None else len(names)
            if low < 0 or high >= top:
                raise self.fail(
                    f"{what} are from {low} to {high}, expected 0 to {top - 1}: leave out rows without a label"
                )
            for name in names or []:
                self._check_class(name, f"the list of the {what}")
            self._check_alike(names or [], f"names of the {what}")
            numbers: list[str | int] = list(range(high + 1 if names is None else top))
            return numbers, [str(label) for label in numbers] if names is None else list(names)
        ordered = sorted(found, key=str)
        texts = [str(label) for label in ordered]
        self._check_alike(texts, what)
        return ordered, texts

    def _check_alike(self, names: Sequence[str], what: str) -> None:
        """Refuses two names that a person takes for one: which accents an operating system writes, blanks, and
        characters that are not seen.
        """
        alike: dict[str, str] = {}
        for name in names:
            shown = " ".join(unicodedata.normalize("NFC", _UNSEEN.sub("", name)).split())
            if shown not in alike:
                alike[shown] = name
            elif alike[shown] == name:
                raise self.fail(f"the {what} have {name!r} twice: give each class a name of its own")
            else:
                raise self.fail(
                    f"the {what} {alike[shown]!r} and {name!r} differ in blanks, in characters that are not seen or in "
                    f"how accents are written ({alike[shown]!a}, {name!a}): rename one"
                )


def alike_but_for_case(names: Sequence[str]) -> str | None:
    """A warning of classes whose names differ in upper and lower case alone, as letters do, and mistakes of typing."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    if not (alike := [group for group in groups.values() if len(group) > 1]):
        return None
    first = " and ".join(map(repr, alike[0][:2]))
    others = f", and so do {len(alike) - 1:,} others" if len(alike) > 1 else ""
    return f"warning: the classes {first} differ in upper and lower case alone{others}: each is a class of its own"


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
