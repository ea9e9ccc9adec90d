"""Search space, proposals, cost arithmetic, journal and figures: the parts of a search that need no Ray."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from perceiver.config import PerceiverConfig
from perceiver.cost import macs_per_image, parameter_count
from pipeline.storage import Storage
from tune.config import SearchConfig
from tune.figures import draw, figures
from tune.journal import Journal, Trial, seconds_left
from tune.proposals import propose
from tune.resources import concurrent_trials
from tune.space import DIMENSIONS, Space, gflops_per_image, to_model, training_values

BASE = PerceiverConfig(num_latents=16, latent_dim=64, num_self_attention_heads=4)
CLOSED: dict[str, Any] = {d.name: () for d in DIMENSIONS}


def space_of(base: PerceiverConfig = BASE, **settings: Any) -> Space:
    """A space with only these dimensions, around `base`."""
    return Space.of(SearchConfig(**(CLOSED | settings)), base)


def trial(name: str, values: dict[str, Any], *accuracies: float, status: Any = "finished", **more: Any) -> Trial:
    history = [{"epoch": float(i), "val_accuracy": value} for i, value in enumerate(accuracies, 1)]
    return Trial(name, values, **({"gflops": 0.1, "parameters": 1000} | more), status=status, history=history)


def test_dimensions_are_fixed_open_or_closed() -> None:
    space = space_of(num_latents=(16, 8, 16), num_iterations=(3, 3), learning_rate=(1e-4, 1e-2))
    assert [d.name for d in space.open] == ["num_latents", "learning_rate"]
    assert space.fixed == {"num_iterations": 3}
    assert space.values == {"num_latents": (8, 16), "num_iterations": (3,), "learning_rate": (1e-4, 1e-2)}
    sample = space.draw(random.Random(0))
    assert list(sample) == ["num_latents", "num_iterations", "learning_rate"]
    model = to_model(sample, BASE)
    assert (model.num_iterations, model.latent_dim, model.num_self_attention_heads) == (3, 64, 4)
    assert training_values(sample) == {"learning_rate": sample["learning_rate"]}


def test_heads_that_do_not_divide_the_width_are_never_drawn() -> None:
    widths, heads = (24, 32, 36), (2, 3, 8)
    space = space_of(latent_dim=widths, num_self_attention_heads=heads)
    drawn = Counter(tuple(space.draw(random.Random(i)).values()) for i in range(300))
    assert set(drawn) == {(width, number) for width in widths for number in heads if width % number == 0}
    assert min(drawn.values()) > 20
    settings = SearchConfig(**(CLOSED | {"latent_dim": widths, "num_self_attention_heads": heads}))
    known = [trial(str(i), {"latent_dim": 36, "num_self_attention_heads": 2}, 0.1 * i) for i in range(12)]
    for number in range(20):  # TPE would favour a width of 36 with 8 heads
        proposed = propose(space, settings, number, known)
        assert proposed is not None
        assert proposed["latent_dim"] % proposed["num_self_attention_heads"] == 0
    with pytest.raises(ValueError, match=r"space is empty: model\.num_self_attention_heads = 5 does not divide"):
        space_of(latent_dim=(32, 64), num_self_attention_heads=(5, 7))


def test_a_budget_keeps_models_out() -> None:
    choices: dict[str, Any] = {"num_latents": (8, 16, 32), "num_iterations": (1, 2, 4)}
    everything = [to_model(shape, BASE) for shape in space_of(**choices).shapes()]
    limit = sorted(gflops_per_image(model) for model in everything)[4]
    assert limit == 2 * sorted(map(macs_per_image, everything))[4] / 1e9
    space = space_of(**choices, max_gflops=limit)
    assert sum(map(space.allows, space.shapes())) == 5
    assert all(gflops_per_image(to_model(space.draw(random.Random(i)), BASE)) <= limit for i in range(50))
    parameters = min(map(parameter_count, everything))
    assert {to_model(s, BASE).num_latents for s in space_of(**choices, max_parameters=parameters).grid(1)} == {8}
    with pytest.raises(ValueError, match=r"space is empty: search\.max_parameters = 10 is less than"):
        space_of(**choices, max_parameters=10)


def test_grid_has_every_allowed_point_once() -> None:
    settings = SearchConfig(
        **CLOSED | {"latent_dim": (24, 32), "num_self_attention_heads": (3, 4), "learning_rate": (1e-4, 1e-2)},
        algorithm="grid",
        grid_points=3,
    )
    space = Space.of(settings, BASE)
    proposed = list(itertools.takewhile(bool, (propose(space, settings, i, []) for i in itertools.count())))
    expected = [(w, h, lr) for w, h in ((24, 3), (24, 4), (32, 4)) for lr in (1e-4, 1e-3, 1e-2)]
    found = sorted((s["latent_dim"], s["num_self_attention_heads"], s["learning_rate"]) for s in proposed if s)
    assert [point[:2] for point in found] == [point[:2] for point in expected]
    assert [point[2] for point in found] == pytest.approx([point[2] for point in expected])


def test_proposals_are_repeatable_and_begin_with_the_preset() -> None:
    settings = SearchConfig(
        **CLOSED | {"num_latents": (8, 16, 32), "learning_rate": (1e-4, 1e-2)}, num_startup_trials=4
    )
    space = Space.of(settings, BASE)
    assert propose(space, settings, 0, [], {"num_latents": 20, "learning_rate": 0.5}) == {
        "num_latents": 16,
        "learning_rate": 1e-2,
    }
    known = [
        trial(str(i), sample, sample["learning_rate"]) for i in range(6) if (sample := propose(space, settings, i, []))
    ]
    assert len({sample.values["learning_rate"] for sample in known}) == 6
    assert propose(space, settings, 6, known) == propose(space, settings, 6, known)
    assert propose(space, settings, 6, known) != propose(space, settings, 7, known)


def test_tpe_goes_where_trials_were_good_and_not_where_they_failed() -> None:
    settings = SearchConfig(**CLOSED | {"learning_rate": (1e-5, 1.0)}, num_startup_trials=5)
    space = Space.of(settings, BASE)

    def mean_exponent(known: list[Trial]) -> float:
        import math

        drawn = [propose(space, settings, number, known) for number in range(30, 60)]
        return sum(math.log10(sample["learning_rate"]) for sample in drawn if sample) / 30

    rates = [10 ** (-5 + k / 4) for k in range(21)]
    good_low = [trial(str(k), {"learning_rate": rate}, 1 - rate) for k, rate in enumerate(rates)]
    assert mean_exponent(good_low) < -3.5
    # High rates were stopped after one epoch, where they looked best; as pruned trials they rank after the others.
    stopped_high = [
        trial(str(k), {"learning_rate": rate}, 0.9, status="stopped early")
        if rate > 1e-2
        else trial(str(k), {"learning_rate": rate}, 0.1, 0.5 - abs(rate - 1e-4))
        for k, rate in enumerate(rates)
    ]
    assert mean_exponent(stopped_high) < -2.5
    failed_high = [
        trial(str(k), {"learning_rate": rate}, status="failed")
        if rate > 1e-3
        else trial(str(k), {"learning_rate": rate}, 0.5)
        for k, rate in enumerate(rates)
    ]
    assert mean_exponent(failed_high) < -2.5


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "cpus_per_worker", "gpus_per_worker", "limit", "expected"),
    [
        (2, 0, 1, 1.0, 0, 0, 2),
        (2, 0, 2, 1.0, 0, 0, 1),
        (8, 0, 2, 1.5, 0, 0, 2),
        (2, 0, 1, 0.1, 0, 0, 20),
        (3, 0, 3, 0.1, 0, 0, 10),  # 3 / 0.3 is not 10 in floating point
        (64, 8, 1, 4.0, 1, 0, 8),
        (64, 8, 4, 4.0, 1, 0, 2),
        (16, 8, 4, 4.0, 1, 0, 1),
        (64, 0, 1, 1.0, 0, 5, 5),
        (4, 0, 1, 1.0, 0, 5, 4),
        (
            1,
            0,
            1,
            2.0,
            0,
            0,
            r"search\.cpus_per_trial = 2 take 2 CPUs, but the cluster has 1 .*--search.cpus-per-trial 1",
        ),
        (2, 0, 3, 1.0, 0, 0, r"workers_per_trial = 3 .* take 3 CPUs, .* has 2 .*fewer workers, or .* 0\.666"),
        (8, 1, 2, 1.0, 1, 0, r"take 2 GPUs, but the cluster has 1 GPUs: take fewer workers, or --train\.no-use-gpu"),
    ],
)
def test_concurrent_trials(
    cpus: float,
    gpus: float,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    limit: int,
    expected: int | str,
) -> None:
    each: dict[str, Any] = {"cpus_per_worker": cpus_per_worker, "gpus_per_worker": gpus_per_worker}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            concurrent_trials(cpus, gpus, workers=workers, limit=limit, **each)
    else:
        assert concurrent_trials(cpus, gpus, workers=workers, limit=limit, **each) == expected


def test_seconds_left() -> None:
    ended = [trial(name, {}, started=0.0) for name in "ab"]
    assert seconds_left(ended, 4, 2) is None
    for done, took in zip(ended, (10.0, 30.0), strict=True):
        done.ended = took
    assert seconds_left(ended, 6, 2) == 40  # 4 trials of 20 s, two at a time
    assert seconds_left(ended, 2, 2) == 0


def test_the_journal_stores_trials_and_takes_over_those_of_its_space(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    space = space_of(num_latents=(8, 16), learning_rate=(1e-3, 1e-2))
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "trial-0001": ({"num_latents": 8, "learning_rate": 2e-3}, "finished"),
        "trial-0002": ({"num_latents": 16, "learning_rate": 1e-2}, "stopped early"),
        "trial-0003": ({"num_latents": 8, "learning_rate": 5e-3}, "running"),
        "trial-0004": ({"num_latents": 32, "learning_rate": 5e-3}, "finished"),
        "trial-0005": ({"num_latents": 8, "learning_rate": 5e-2}, "finished"),
        "trial-0006": ({"num_latents": 8}, "finished"),
    }
    old = Journal(store, "old")
    for name, (values, status) in rows.items():
        old.write(trial(name, values, 0.5, status=status))
    assert [(t.name, t.status) for t in old.trials()] == [(name, status) for name, (_, status) in rows.items()]
    new = Journal(store, "new", ["old"])
    assert [t.name for t in new.earlier(space)] == ["trial-0001", "trial-0002"]
    old.write(trial("trial-0003", rows["trial-0003"][0], 0.5))
    assert len(new.earlier(space)) == 2, "a restarted search uses the earlier trials that it started with"
    assert new.trials() == []


def test_figures_of_a_search(tmp_path: Path) -> None:
    settings = SearchConfig(**CLOSED | {"num_latents": (8, 16, 32), "learning_rate": (1e-4, 1e-2)})
    space, rng = Space.of(settings, BASE), random.Random(0)
    trials = []
    for number in range(12):
        done = Trial.of(f"trial-{number:04d}", space.draw(rng), space)
        for epoch in (1, 2):
            done.add_epoch({"epoch": epoch, "val_accuracy": done.values["num_latents"] / 40 + 0.001 * number})
        done.end("finished")
        trials.append(done)
    trials.append(trial("trial-0012", trials[0].values, status="failed"))
    (page,) = draw(trials, space, settings, tmp_path)
    assert page.name == "search.html"
    assert page.read_text().count('class="plotly-graph-div"') == 5
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page.read_text()), "works offline"

    def names(trace: Any) -> list[str]:
        return [name for text in trace.text for name in re.findall(r"trial-\d+", text)]

    coordinates, history, _, cost, importance = figures(trials, space, settings)
    assert set(coordinates.layout.xaxis.ticktext) == {"val_accuracy", "num_latents", "learning_rate"}
    best = [max(t.best_value or 0 for t in trials[: i + 1]) for i in range(len(trials))]
    assert list(history.data[1].y) == best
    assert list(importance.data[0].y) == ["learning_rate", "num_latents"]
    assert importance.data[0].x[1] > 0.9
    by_name = {t.name: t for t in trials}
    front = [by_name[name] for name in names(cost.data[-1])]
    assert sorted(t.values["num_latents"] for t in front) == [8, 16, 32]
    front[0].status = "stopped early"
    stopped, _, finished = figures(trials, space, settings)[3].data
    assert names(stopped) == [front[0].name]
    assert front[0].name not in names(finished)
    assert draw([trials[-1]], space, settings, tmp_path) == []


def test_models_beyond_the_cost_limit_are_drawn_as_infeasible() -> None:
    settings = SearchConfig(**CLOSED | {"num_latents": (8, 16)}, objective="accuracy_at_cost", cost_limit_gflops=0.2)
    values = {"num_latents": 8}
    trials = [trial("trial-0001", values, 0.3, gflops=0.1), trial("trial-0002", values, 0.9, gflops=0.3)]
    _, history, _, cost = figures(trials, Space.of(settings, BASE), settings)
    best, infeasible = history.data[1:]
    assert list(best.y) == [0.3, 0.3]
    assert list(infeasible.y) == [0.9]
    assert cost.layout.shapes[0].x0 == 0.2
