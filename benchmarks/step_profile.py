"""Profile of a training step: the share of each purpose in the time of TensorFlow's operations."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tensorflow as tf

# An operation's purpose is the first match of its kind, then of its name, which for a gradient holds the forward scope.
KINDS = (
    ("products", ("MatMul", "Conv2D")),
    ("softmax", ("Softmax",)),
    ("transposes", ("Transpose",)),
    ("random numbers", ("RandomUniform",)),
    ("casts", ("Cast",)),
    ("bias", ("BiasAdd",)),
)
SCOPES = (
    ("LayerNorm", "norm"),
    ("dropout", "dropout"),
    ("attention weights, less products and softmax", "attention"),
    ("GELU", "mlp"),
    ("optimizer", "adam"),
    ("stem", "stem"),
)


def print_profile(step: Callable[[], object]) -> None:
    """Traces three calls of `step` and prints the share of each purpose in the time of all operations."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for _ in range(2):
        step()
    with TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(3):
            step()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    spent: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                operation, _, kind = name.rpartition(":")
                if operation and "::" not in name and "Execute" not in name:  # the others are internal to TensorFlow
                    spent[_purpose(operation.lower(), kind)] += event.duration_ps
    total = sum(spent.values())
    for purpose, duration in spent.most_common():
        print(f"{duration / total:6.1%}  {purpose}")


def _purpose(operation: str, kind: str) -> str:
    for purpose, kinds in KINDS:
        if any(part in kind for part in kinds):
            return purpose
    return next((purpose for purpose, scope in SCOPES if scope in operation), "other")
