"""ASHA for trials that were cut off and report their epochs once more."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tune.journal import AGAIN, SCORE


class ResumableASHA(ASHAScheduler):
    """Ray's ASHA, which does not judge an epoch a second time.

    A trial that continues reports the epochs of its checkpoint again, since the rungs of a search that was started
    again are empty but for the trials that had ended. It went past these epochs in the attempt before, but perhaps for
    the last. The rungs have filled up since then, so a trial that begins slowly would be stopped far behind where it
    is, and its training lost. A result with `again` is therefore recorded and does not stop the trial; a new one may.

    Args:
        epochs: epochs of a trial that is not stopped; a trial that has them has nothing left to train.
        grace_period: epochs before the first rung.
        reduction_factor: about one in this many trials goes on at each rung.
    """

    def __init__(self, epochs: int, grace_period: int, reduction_factor: float) -> None:
        super().__init__(
            time_attr="epoch",
            metric=SCORE,
            mode="max",
            max_t=epochs,
            grace_period=grace_period,
            reduction_factor=reduction_factor,
        )
        self.epochs = epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Records the result; returns whether the trial goes on."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if result.get(AGAIN) and result["epoch"] < self.epochs:
            return TrialScheduler.CONTINUE
        return decision
