"""The model of `benchmarks/scaling.py`: seconds of a training step on N workers that sum gradients in a ring.

A ring of N workers takes 2 (N - 1) turns. In each of them every worker sends an Nth of the vector, a part, to the next
one and gets as much from the one before. A turn takes a fixed time, and for each byte first the time of the wire and
then that of the hosts, which copy and add what has come before they send it on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

BACKWARD_SHARE = 2 / 3
"""Share of the computation that is the backward pass: gradients of activations and of weights, beside the forward."""


@dataclass(frozen=True)
class Network:
    """What connects the workers.

    Attributes:
        bytes_per_second: Payload that a link carries in each direction while it carries as much in the other.
        turn_seconds: Fixed time of a turn of the ring.
        host_seconds_per_byte: Work of a host for each byte that it sends and receives.
    """

    bytes_per_second: float
    turn_seconds: float
    host_seconds_per_byte: float


@dataclass(frozen=True)
class Step:
    """A training step of one worker.

    Attributes:
        compute_seconds: Without communication.
        gradient_bytes: Of all gradients together.
    """

    compute_seconds: float
    gradient_bytes: float


@dataclass(frozen=True)
class Remedies:
    """What makes the sum of the gradients cheaper.

    Attributes:
        bytes_factor: Size of what is sent, relative to float32; 0.5 is bfloat16.
        buckets: Parts of the vector. All but the last go while the backward pass computes the next.
        accumulated: Batches whose gradients a worker adds before they are summed over the workers.
    """

    bytes_factor: float = 1.0
    buckets: int = 1
    accumulated: int = 1


def ring_seconds(size: float, workers: int, network: Network) -> float:
    """Seconds to sum a vector of `size` bytes over the workers."""
    if workers == 1:
        return 0.0
    turns, part = 2 * (workers - 1), size / workers
    return turns * (network.turn_seconds + part * (1 / network.bytes_per_second + network.host_seconds_per_byte))


def step_seconds(step: Step, workers: int, network: Network, remedies: Remedies = Remedies()) -> float:
    """Seconds for a batch, with its share of the communication."""
    size, buckets = step.gradient_bytes * remedies.bytes_factor, remedies.buckets
    each = ring_seconds(size / buckets, workers, network)
    backward = BACKWARD_SHARE * step.compute_seconds / buckets
    # Bucket i is complete after i + 1 parts of the backward pass, and goes when the bucket before it is through.
    end = 0.0
    for number in range(buckets):
        end = max(end, (number + 1) * backward) + each
    exposed = end - buckets * backward
    return step.compute_seconds + exposed / remedies.accumulated


def efficiency(step: Step, workers: int, network: Network, remedies: Remedies = Remedies()) -> float:
    """Throughput relative to as many workers that need not communicate."""
    return step.compute_seconds / step_seconds(step, workers, network, remedies)


def calibrated(times: Mapping[float, float], workers: int, bytes_per_second: float) -> Network:
    """The network whose ring comes closest, by relative squared errors, to the given seconds.

    Args:
        times: Seconds of the sum of a vector by its size in bytes; at least two.
        workers: Number of workers that took part.
        bytes_per_second: What the link carries.
    """
    turns = 2 * (workers - 1)
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    rows = np.stack([np.full(len(sizes), turns), turns * sizes / workers], axis=1) / seconds[:, None]
    (fixed, for_bytes), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    return Network(bytes_per_second, max(float(fixed), 0.0), max(float(for_bytes) - 1 / bytes_per_second, 0.0))


def at_speed(network: Network, bytes_per_second: float) -> Network:
    return replace(network, bytes_per_second=bytes_per_second)
