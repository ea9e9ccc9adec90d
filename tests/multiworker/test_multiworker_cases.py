"""Each case in several processes gives the numbers of one process, or is refused with a message.

The modules `cases_*.py` contain the cases. A run prints what it has found as one table.
`python tests/multiworker/case_runs.py NAME...` runs cases without pytest.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from case_registry import CASES, EQUAL, Case, Result, Worker
from case_runs import CaseServer, Found, Verdict, case_server, judged, run_case
from case_table import DOCUMENT, load_cases, written

load_cases()


@pytest.fixture(scope="module")
def server() -> Iterator[CaseServer]:
    with case_server() as running:
        yield running


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Verdict]]:
    """Collects the verdicts, and prints them after the last case."""
    verdicts: list[Verdict] = []
    yield verdicts
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    assert terminal is not None
    terminal.section("cases of several workers")
    for verdict in verdicts:
        terminal.write_line(str(verdict))


def parameter(case: Case) -> object:
    # A slow case takes some seconds; all of them take minutes.
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


@pytest.mark.parametrize("case", [parameter(case) for case in CASES.values()])
def test_case(server: CaseServer, table: list[Verdict], case: Case, tmp_path: Path) -> None:
    verdicts = run_case(server, case, tmp_path)
    table += verdicts
    assert not [verdict for verdict in verdicts if verdict.fault]


def test_the_document_has_the_table_of_these_cases() -> None:
    assert DOCUMENT.read_text() == written(DOCUMENT.read_text()), "run: python tests/multiworker/case_table.py"


def unused(worker: Worker) -> Result:
    """Stands for the code of a case whose results are given."""
    pytest.fail("the results of this case are given, so nothing may run it")


ONE = {"result": {"loss": [2.0, 1.0], "weights 0": np.ones(3)}}


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"result": {"loss": [2.0, 1.0], "weights 0": np.ones(3)}}, ""),
        ({"result": {"loss": [2.0, 1.001], "weights 0": np.ones(3)}}, "rank 1 loss: "),
        ({"result": {"loss": [2.0, 1.0], "weights 0": np.full(3, np.nan)}}, "rank 1 weights 0"),
        ({"result": {"loss": [2.0, 1.0], "weights 0": np.ones(2)}}, r"shape \(2,\)"),
        ({"result": {"loss": [2.0, 1.0]}}, "rank 1 has .* instead of"),
        ({"error": "ValueError: no"}, "rank 1: ValueError: no"),
    ],
)
def test_a_worker_that_differs_is_found(found: Found, fault: str) -> None:
    case = Case(unused, EQUAL)
    verdict = judged(case, ONE, [ONE, found])
    assert bool(verdict.fault) == bool(fault)
    assert re.search(fault, verdict.fault)


def test_a_case_that_does_not_learn_is_found() -> None:
    constant = {"result": {"loss": [1.0, 1.0], "weights 0": np.ones(3)}}
    assert "do not change" in judged(Case(unused, EQUAL), constant, [constant]).fault


def test_a_refusal_is_expected_of_every_worker() -> None:
    case = Case(unused, "synchronize")
    refused = {"error": "ValueError: synchronize it"}
    assert not judged(case, ONE, [refused, refused]).fault
    assert "rank 1 has raised nothing" in judged(case, ONE, [refused, ONE]).fault
    assert "rank 0 has raised" in judged(case, ONE, [{"error": "KeyError: 3"}, refused]).fault
