"""A request to stop that all workers see after the same step."""

import tensorflow as tf


class StopSignal:
    """A request to stop that all workers see after the same step.

    Any thread of any worker may call `request`. The requests are summed over the workers together with the gradients of
    the next training step, so that no worker starts a collective operation that the others never join.
    """

    def __init__(self) -> None:
        # Created outside any strategy scope, so that they are plain variables of this process.
        self.requested = tf.Variable(0.0, trainable=False)
        self.sum_over_workers = tf.Variable(0.0, trainable=False)

    def request(self) -> None:
        self.requested.assign(1.0)

    def reset(self) -> None:
        """Forgets all requests, for the next training of a single worker."""
        self.requested.assign(0.0)
        self.sum_over_workers.assign(0.0)

    @property
    def agreed(self) -> bool:
        """Whether the last step found a request on any worker; all workers get the same answer."""
        return bool(self.sum_over_workers.numpy() > 0)
