"""One process of several that run the cases of tests/test_multiworker_features.py, or the only one.

Reads its orders as JSON from its argument, and writes the results of every case to `<out>/<rank>.npz`. A case is the
same for any number of processes.
"""

import time
from pathlib import Path

import multiworker_keras_cases  # noqa: F401  registers its cases
import multiworker_perceiver_cases  # noqa: F401
import numpy as np
from multiworker_setting import CASES, ORDERS, RANK, Result


def main() -> None:
    results: Result = {}
    for name in ORDERS["cases"] or CASES:
        start = time.perf_counter()
        results |= {f"{name}/{key}": np.asarray(value) for key, value in CASES[name]().items()}
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    np.savez(Path(ORDERS["out"]) / f"{RANK}.npz", **results)


if __name__ == "__main__":
    main()
