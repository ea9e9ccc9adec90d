"""Runs cases in one and in several processes, and judges what they found."""

import argparse
import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from case_registry import CASES, EQUAL, Case
from case_table import load_cases

TOLERANCE = 1e-4  # of a number's size, or absolute if it is below 1
LIMIT = 240  # seconds of a case; a worker that waits for ever is ended
PARTING_LIMIT = 30  # seconds from the moment at which the workers part

Found = dict[str, Any]
"""What one worker wrote: `result` or `error`, and `seconds`, since the workers parted if they have."""


@dataclass(frozen=True)
class Verdict:
    """A row of the table that a run prints.

    Attributes:
        fault: What is not as expected; empty if everything is.
        numbers: The largest difference, or the message.
    """

    case: str
    processes: int
    fault: str
    numbers: str

    def __str__(self) -> str:
        result = f"NOT AS EXPECTED: {' '.join(self.fault.split())}" if self.fault else "as expected"
        return f"{self.case:44} {self.processes}  {result:12}  {self.numbers}"


class CaseServer:
    """The process that the workers of all cases are forked from."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("case_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
        )

    def run(self, case: Case, folder: Path, processes: tuple[int, ...]) -> dict[int, list[Found]]:
        """Runs a case, and returns what each worker found, by the number of workers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"case": case.name, "folder": str(folder), "processes": processes, "limit": LIMIT, "parts": case.parts}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer == "done\n", f"the server of the cases has ended, its answer is {answer!r}"
        return {number: [_found(folder / str(number), rank) for rank in range(number)] for number in processes}

    def close(self) -> None:
        self.process.communicate()


@contextlib.contextmanager
def case_server() -> Iterator[CaseServer]:
    server = CaseServer()
    try:
        yield server
    finally:
        server.close()


def _found(folder: Path, rank: int) -> Found:
    file = folder / f"{rank}.pickle"
    if file.exists():
        found: Found = pickle.loads(file.read_bytes())
        if (parted := folder / "parted").exists():
            found["seconds"] = file.stat().st_mtime - parted.stat().st_mtime
        return found
    log = (folder / f"{rank}.log").read_text(errors="replace").strip()
    return {"error": f"the process died: {log[-2000:]}", "seconds": float(LIMIT)}


def run_case(server: CaseServer, case: Case, folder: Path) -> list[Verdict]:
    """Runs a case in one process and in several, and judges each number of processes."""
    processes = case.workers if case.parts else (1, *case.workers)
    found = server.run(case, folder, processes)
    return [judged(case, found.get(1, [{}])[0], found[number]) for number in case.workers]


def judged(case: Case, one: Found, several: list[Found]) -> Verdict:
    if "error" in one:
        fault, numbers = f"one process: {one['error']}", ""
    elif case.expected == EQUAL:
        fault, numbers = _compared(case, one["result"], several)
    else:
        fault, numbers = _refused(case, several)
    return Verdict(case.name, len(several), fault, numbers)


def _refused(case: Case, several: list[Found]) -> tuple[str, str]:
    """The fault and the message of a case that is to end with an error on every worker."""
    expected = case.expected if isinstance(case.expected, tuple) else (case.expected,) * len(several)
    for rank, (message, found) in enumerate(zip(expected, several, strict=True)):
        if not message:
            continue
        if "error" not in found:
            return f"rank {rank} has raised nothing", _brief(found["result"])
        if not re.search(message, found["error"], re.DOTALL):
            return f"rank {rank} has raised {found['error']}", ""
        if case.parts and found["seconds"] > PARTING_LIMIT:
            return f"rank {rank} ended after {found['seconds']:.0f} s", ""
    return "", f"{several[0]['error'][:110]}"


def _compared(case: Case, one: dict[str, Any], several: list[Found]) -> tuple[str, str]:
    """The fault and the largest difference of a case that is to find the same in every worker."""
    for rank, found in enumerate(several):
        if "error" in found:
            return f"rank {rank}: {found['error']}", ""
        if found["result"].keys() != one.keys():
            return f"rank {rank} has {sorted(found['result'])} instead of {sorted(one)}", ""
    if fault := _trivial(case, one):
        return fault, ""
    worst: tuple[str, float] = ("", 0.0)
    faults: list[str] = []
    for rank, found in enumerate(several):
        for name, expected in one.items():
            a, b = np.asarray(expected, np.float64), np.asarray(found["result"][name], np.float64)
            if a.shape != b.shape:
                faults.append(f"rank {rank} {name}: shape {b.shape} instead of {a.shape}")
                continue
            difference = np.max(np.abs(a - b) / np.maximum(np.abs(a), 1), initial=0.0)
            if not difference <= TOLERANCE:  # also if it is NaN
                faults.append(f"rank {rank} {name}: {_number(b)} instead of {_number(a)}")
            worst = max(worst, (name, float(difference)), key=lambda pair: pair[1])
    # The losses and metrics say more than the weights.
    faults.sort(key=lambda fault: " weights " in fault)
    return "; ".join(faults[:3]), f"{worst[1]:.1e} in {worst[0]}" + f"; {_brief(one)}"


def _trivial(case: Case, one: dict[str, Any]) -> str:
    """Why a comparison would prove nothing; empty if it does."""
    if not one or all(not np.any(value) for value in one.values()):
        return "one process finds nothing but zeros"
    if case.learns:
        losses = np.asarray(next((value for name, value in one.items() if "loss" in name), []), np.float64)
        if losses.size < 2 or not abs(losses[0] - losses[-1]) > 10 * TOLERANCE:
            return f"the losses do not change: {losses.tolist()}"
    return ""


def _number(value: np.ndarray) -> str:
    return str(np.round(value.ravel()[:4], 4).tolist())


def _brief(result: dict[str, Any]) -> str:
    logs = {name: np.asarray(value) for name, value in result.items() if not name.startswith("weights ")}
    return " ".join(f"{name} {_number(value.astype(np.float64))}" for name, value in list(logs.items())[:2])


def main() -> None:
    """Runs the cases that are named, or all, and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--folder", type=Path, help="where the workers' logs are to stay, a new folder")
    options = parser.parse_args()
    load_cases()
    with case_server() as server, tempfile.TemporaryDirectory() as temporary:
        for name in options.cases or CASES:
            path = (options.folder or Path(temporary)) / name
            path.mkdir(parents=True)
            for verdict in run_case(server, CASES[name], path):
                print(verdict, flush=True)


if __name__ == "__main__":
    main()
