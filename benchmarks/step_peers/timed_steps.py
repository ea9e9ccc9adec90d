"""What every process of the comparison of training steps does: it trains when it is asked to, and says how long."""

import json
import sys
import time
from collections.abc import Callable

WARM_UP_STEPS = 3


def run(step: Callable[[], float], parameters: int) -> None:
    """Answers on standard output, a line of JSON each: the number of parameters when it is ready, then seconds.

    Args:
        step: Runs a training step and returns its loss.
        parameters: Weights that are trained.
    """
    losses = [step() for _ in range(WARM_UP_STEPS)]
    print(json.dumps({"parameters": parameters, "losses": losses}), flush=True)
    for line in sys.stdin:  # a number of steps
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(json.dumps((time.perf_counter() - start) / int(line)), flush=True)
