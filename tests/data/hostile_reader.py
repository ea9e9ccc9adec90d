"""Reads files as the pipeline does, in a process whose memory is limited; a line of JSON says what came of each.

    python hostile_reader.py MIB [FILE ...]      or the names of the files, one a line, on standard input

`.keras` files are read as initial weights if `--keras` is the only name.

A line has `path`, `outcome` (`read`, or `refused` with an error of ours), `message` and `mib`, how much the highest
memory of the process has grown. Any other exception ends the process with a traceback.
"""

import functools
import json
import re
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from perceiver.config import PerceiverConfig
from pipeline.data.archives import read_pickles
from pipeline.data.cifar import CIFAR100, decode_archive
from pipeline.data.image_files import list_parts, read_part
from pipeline.data.image_rows import Decoding
from pipeline.data.image_survey import read_headers
from pipeline.data.labelled_images import list_images
from pipeline.training.config import TrainingConfig

SHAPE = (8, 6, 3)
MIB = 1 << 20
SMALL_MODEL = PerceiverConfig(image_shape=(8, 8, 1), num_classes=10, num_latents=4, latent_dim=16, num_iterations=1)


def highest_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_file(path: Path) -> str:
    """Reads a file in each way in which the pipeline would."""
    if path.suffix == ".keras":
        return weights_of(path)
    if path.name.endswith(".tar.gz"):
        data = path.read_bytes()
        members = read_pickles(data, {"train", "test", "meta"})
        decode_archive(data, replace(CIFAR100, train_rows=200, test_rows=100))
        return f"{len(members)} members"
    said, refused = [], 0
    for read in (classify, train_on):
        try:
            said.append(read(path))
        except ValueError as error:
            said.append(str(error))
            refused += 1
    if refused == 2:
        raise ValueError(" | ".join(said))
    return " | ".join(said)


def weights_of(path: Path) -> str:
    """As `--train.initial-model`."""
    from pipeline.training.fit import _set_initial_weights
    from pipeline.training.worker import InitialModelError

    try:
        _set_initial_weights(small_perceiver(), SMALL_MODEL, path, TrainingConfig(initial_model="models:/fuzzed/1"))
    except InitialModelError as error:
        raise ValueError(str(error)) from error
    return "weights"


@functools.cache
def small_perceiver() -> Any:
    from perceiver.model import Perceiver

    model = Perceiver(**asdict(SMALL_MODEL))
    model.build((None, 8, 8, 1))
    return model


def classify(path: Path) -> str:
    """As batch inference."""
    source = list_parts(str(path), 64)
    rows = errors = 0
    for part in source.parts:
        table = read_part(part, source.kind, source.root, SHAPE, "stretch")
        rows += len(table)
        errors += len(table) - table["error"].null_count
    return f"{rows} rows, {errors} without an image"


def train_on(path: Path) -> str:
    """As `--data.source files`."""
    listing = list_images(str(path))
    headers = read_headers(listing, listing.tree.root, keep=False)
    decoding = Decoding(listing.tree.root, listing.kind, SHAPE, "stretch")
    images = [image for rows in listing.splits.values() for image, _, _ in decoding(rows)]
    return f"{len(images)} images, {len(headers.corrupt)} without a header"


def main(mib: str, *files: str) -> None:
    if files == ("--keras",):
        import pipeline.training.fit  # noqa: F401  before the limit, for TensorFlow reserves much

        small_perceiver()
        files = ()
    size = int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + int(mib) * MIB,) * 2)
    before = highest_mib()
    paths: Iterable[str] = files or (line.rstrip("\n") for line in sys.stdin)
    for path in paths:
        began = time.monotonic()
        try:
            outcome, message = "read", read_file(Path(path))
        except ValueError as error:
            outcome, message = "refused", str(error)
        grew, seconds = highest_mib() - before, time.monotonic() - began
        print(json.dumps({"path": path, "outcome": outcome, "message": message, "mib": round(grew), "s": seconds}))
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
