"""The report tells the best trial from one of the same name, since every search counts its trials from 1."""

from typing import Any

from test_report import Outline, report_inputs

from pipeline.report.render import render


def row(number: int, value: float | None, num_latents: int = 8) -> dict[str, Any]:
    return {
        "name": f"trial-{number:04d}",
        "values": {"num_latents": num_latents},
        "status": "failed" if value is None else "finished",
        "history": [{"epoch": 1}],
        "gflops": 0.1,
        "best_value": value,
    }


def page(trials: list[dict[str, Any]], number: int, value: float, num_latents: int = 8) -> str:
    """The report of a search whose best trial has this number, value and hyperparameter."""
    best = {"best": {"num_latents": num_latents}, "best_value": value, "best_trial": f"trial-{number:04d}"}
    outputs = dict(report_inputs().outputs) | {"search": {"trials": trials, "earlier": 3, "figures": [], **best}}
    return render(report_inputs(outputs=outputs))


def test_a_best_trial_of_an_earlier_search_is_not_taken_for_the_one_of_its_name() -> None:
    trials = [row(1, 0.5), row(2, 0.25, 16)]
    earlier = "The best, trial 0002 of an earlier search, reached a validation top-1 of {}"
    assert earlier.format("75%") in page(trials, 2, 0.75, 16), "another value"
    assert earlier.format("25%") in page(trials, 2, 0.25, 32), "another point, of the same value by chance"
    assert "The best, trial 0001, reached a validation top-1 of 50%" in page(trials, 1, 0.5)


def test_a_search_that_adds_nothing_to_an_earlier_one_has_its_section() -> None:
    for trials, words in (
        ([row(1, None)], "1 trials, of which 1 gave no value. The best, trial 0001 of an earlier search, reached"),
        ([], "No new trials, since earlier searches have tried all points. The best, trial 0001 of an earlier search,"),
    ):
        html = page(trials, 1, 0.5)
        assert words in html
        assert "trials with a value" not in html
        outline = Outline(html)
        assert "Search" in outline.headings
        assert outline.open == []
