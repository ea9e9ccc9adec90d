"""Training steps of the Perceiver beside the same model in PyTorch and JAX, for `benchmarks/model_step.py --peers`.

`benchmarks/step_peers` has a script for each framework, with what is set. PyTorch and JAX run in environments of their
own, which the first run makes below `--cache` with the versions of `PACKAGES`; that takes some minutes and 7 GB. Each
case is a process, and the processes compute in turns, so that a change in the load of the machine affects all alike. In
a turn a process has all of the machine's cores, or those of `--cores`.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import environment
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "step_peers"
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "keras": (),  # the project's own environment has TensorFlow
    "jax": ("jax==0.10.2", "keras==3.15.1", "numpy==2.4.6"),
    "torch": ("torch==2.14.1", "numpy==2.4.6"),
}
"""Pinned packages of the environment of each."""
AIM = 1.3
"""Least images/s of this project's step, as a multiple of those of the quickest peer, both with AdamW."""
MUON_AIM = 1.1
"""Most time of a step with Muon, as a multiple of that with AdamW."""


@dataclass(frozen=True)
class Case:
    """A way to train the Perceiver.

    Attributes:
        name: Name in the table.
        framework: Key of `PACKAGES`.
        script: File of `step_peers`.
        optimizer: `adamw` or `muon`.
        way: How the script compiles.
    """

    name: str
    framework: str
    script: str
    optimizer: str
    way: str


OWN, OWN_MUON = "this project", "this project, Muon"
CASES = (
    Case(OWN, "keras", "keras_step.py", "adamw", "parts"),
    Case(OWN_MUON, "keras", "keras_step.py", "muon", "parts"),
    Case("JAX", "jax", "keras_step.py", "adamw", "xla"),
    Case("PyTorch", "torch", "torch_step.py", "adamw", "eager"),
    Case("PyTorch, plain attention", "torch", "torch_step.py", "adamw", "eager+math"),
    Case("PyTorch, plain attention, torch.compile", "torch", "torch_step.py", "adamw", "compile+math"),
    Case("PyTorch, plain attention, a process a core", "torch", "torch_step.py", "adamw", "processes+math"),
)


def compare_steps(
    peers: Sequence[str],
    cache: Path,
    precisions: Sequence[str],
    *,
    preset: str,
    batch: int,
    rounds: int,
    steps: int,
    cores: Sequence[int],
) -> dict[str, Any]:
    """Measures the cases of this project and of `peers`, and prints a table.

    Returns:
        `cases` (name, precision, parameters, median and fastest images/s), and for each precision `ratio` to the
        quickest peer and `muon_step`, the time of a step with Muon over that with AdamW.
    """
    chosen = [case for case in CASES if case.framework in ("keras", *peers)]
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        rows += _measure(chosen, cache, precision, preset, batch, rounds, steps, cores)
    ratios = {precision: ratios_of([row for row in rows if row["precision"] == precision]) for precision in precisions}
    table = Table("case", "precision", "parameters", "images/s", "fastest turn", title=f"{preset}, batch {batch}")
    for row in rows:
        speeds = (f"{row[name]:.1f}" for name in ("images_per_second", "fastest"))
        table.add_row(row["case"], row["precision"], f"{row['parameters']:,}", *speeds)
    Console(width=110).print(table)
    for precision, found in ratios.items():
        print(f"{precision}: Muon's step / AdamW's {found['muon_step']:.2f} (aim: at most {MUON_AIM:g})")
        if "ratio" in found:
            print(f"{precision}: this project / {found['quickest_peer']} {found['ratio']:.2f} (aim: at least {AIM:g})")
    return {"cases": rows, "ratios": ratios}


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `compare_steps` returns of one precision."""
    speeds = {row["case"]: row["images_per_second"] for row in rows}
    own, muon = speeds.pop(OWN), speeds.pop(OWN_MUON)
    found = {"muon_step": own / muon}
    if not speeds:
        return found
    quickest = max(speeds, key=lambda name: speeds[name])
    return found | {"ratio": own / speeds[quickest], "quickest_peer": quickest}


def _measure(
    cases: Sequence[Case],
    cache: Path,
    precision: str,
    preset: str,
    batch: int,
    rounds: int,
    steps: int,
    cores: Sequence[int],
) -> list[dict[str, Any]]:
    processes: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    try:
        ready = {}
        for case in cases:  # one after the other: they compile
            python = environment(case.framework, PACKAGES[case.framework], cache)
            arguments = [preset, precision, str(batch), case.optimizer, case.way]
            processes[case.name] = subprocess.Popen(
                [str(python), str(SCRIPTS / case.script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_variables(case.framework, len(cores)),
                preexec_fn=lambda: os.sched_setaffinity(0, cores),  # before it imports anything
            )
            ready[case.name] = _answer(case.name, processes[case.name])
        for _ in range(rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
                seconds[name].append(_answer(name, process))
    finally:
        for process in processes.values():
            process.kill()
            with process:  # closes its pipes
                pass
    return [
        {
            "case": case.name,
            "precision": precision,
            "parameters": ready[case.name]["parameters"],
            "images_per_second": batch / statistics.median(seconds[case.name]),
            "fastest": batch / min(seconds[case.name]),
            "losses": ready[case.name]["losses"],
        }
        for case in cases
    ]


def _answer(name: str, process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line[:1] in "{0123456789":  # not a message of a library
            return json.loads(line)
    raise SystemExit(f"the process of {name} ended with exit code {process.wait()}, see above")


def _variables(framework: str, threads: int) -> dict[str, str]:
    """The environment of a process, in which each framework takes as many threads as it has cores."""
    own = {"KERAS_BACKEND": "jax" if framework == "jax" else "tensorflow", "PYTHONPATH": str(ROOT)}
    own |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    return os.environ | own | {"OMP_NUM_THREADS": str(threads)}
