"""What a run knows about its tasks: their keys, which are done, which follow, and the identity of the run."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import ray
from workshop import CONFIG, Workshop, chain, changed

from pipeline.settings.command_line import TaskName
from pipeline.settings.config import PipelineConfig
from pipeline.storage import Storage
from pipeline.tasks.graph import TASKS
from pipeline.workflow.run import Run
from pipeline.workflow.runner import StopOnSignal, run_tasks
from pipeline.workflow.task import Context, Task

# Ray's workers cannot import the modules of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_key_depends_on_name_version_section_and_inputs(shop: Workshop) -> None:
    a, b, c = chain(shop)
    keys = shop.plan([a, b, c]).keys
    assert keys == shop.plan(chain(shop)).keys
    assert len({*keys.values(), *shop.plan([replace(a, name="d")]).keys.values()}) == 4

    def changed_keys(tasks: Sequence[Task], config: PipelineConfig = CONFIG) -> set[str]:
        return {name for name, key in shop.plan(tasks, config).keys.items() if key != keys[name]}

    assert changed_keys([a, replace(b, version=2), c]) == {"b", "c"}
    assert changed_keys([a, b, replace(c, inputs=("a", "b"))]) == {"c"}
    assert changed_keys([a, b, c], changed("data", seed=1)) == {"a", "b", "c"}
    assert changed_keys([replace(a, section=lambda config: {}), b, c]) == {"a", "b", "c"}
    assert changed_keys([a, b, c], changed("train", seed=1)) == set()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed("train", num_workers=1, cpus_per_worker=0.5, use_gpu=True, max_failures=0), set()),
        (changed("search", cpus_per_trial=0.5), set()),
        (changed("tracking", uri="sqlite:////elsewhere.db", experiment="e", model_name="m", alias="a"), set()),
        (replace(CONFIG, storage="/elsewhere"), set()),
        (changed("train", learning_rate=1e-3), {"search", "train", "evaluate", "register", "report"}),
        (changed("search", epochs=2), {"search", "train", "evaluate", "register", "report"}),
        (changed("data", num_shards=17), {task.name for task in TASKS} - {"ingest"}),
        (changed("data", seed=1), {task.name for task in TASKS}),
    ],
)
def test_settings_change_the_keys_of_what_depends_on_them(config: PipelineConfig, expected: set[str]) -> None:
    before, after = (Run(TASKS, each, Storage(each.storage)).keys for each in (CONFIG, config))
    assert {name for name in before if before[name] != after[name]} == expected


def test_the_report_follows_from_every_task_and_the_command_line_knows_them_all() -> None:
    names = [task.name for task in TASKS]
    assert set(TASKS[-1].inputs) | {"ingest"} == set(names[:-1])
    assert list(get_args(TaskName)) == names


def test_a_run_keeps_its_identity(shop: Workshop) -> None:
    tasks = chain(shop)
    identity = shop.plan(tasks).identity()
    same = Run(tuple(chain(shop)), changed("train", num_workers=1), Storage(shop.storage.uri))
    assert same.identity() == identity
    assert shop.plan(tasks, changed("data", seed=1)).identity() != identity
    shop.plan(tasks).forget([])
    assert shop.plan(tasks).identity() != identity


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_done_is_not_run_again(shop: Workshop) -> None:
    tasks = [
        shop.task("a", work=lambda context: 1),
        shop.task("b", "a", work=lambda context: context.inputs["a"]["result"] + 1),
    ]
    assert shop.plan(tasks).done() == {}
    first = shop.run(tasks)
    assert first["b"]["output"] == {"result": 2, "from": {"a": 1}}
    assert first["b"]["key"] == shop.plan(tasks).keys["b"]
    assert first["b"]["inputs"] == {"a": first["a"]["key"]}
    assert shop.observed == [("started", "a"), ("done", "a"), ("started", "b"), ("done", "b")]
    assert shop.run(tasks) == first == shop.plan(tasks).done()
    shop.run(tasks, changed("train", num_workers=1))
    assert shop.executions("a", "b") == [1, 1]
    shop.run([tasks[0], replace(tasks[1], version=2)])
    assert shop.executions("a", "b") == [1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_forgotten_runs_again_with_all_that_follows(shop: Workshop) -> None:
    def work(context: Context) -> bool:
        known = context.storage.exists(f"{context.state}/known")
        context.storage.write_bytes(f"{context.state}/known", b"")
        return known

    tasks = [shop.task("a"), shop.task("b", "a", work=work), shop.task("c", "b"), shop.task("d", "a")]
    shop.run(tasks)
    plan = shop.plan(tasks)
    identity = plan.identity()
    assert plan.following(["b"]) == {"b", "c"}
    assert plan.following(["c", "d"]) == {"c", "d"}
    assert [plan.preceding(name) for name in "abcd"] == [set(), {"a"}, {"a", "b"}, {"a"}]
    plan.forget(plan.following(["b"]))
    assert set(plan.done()) == {"a", "d"}
    assert shop.run(tasks)["b"]["output"]["result"] is False, "the state is forgotten too"
    assert shop.executions("a", "b", "c", "d") == [1, 2, 2, 1]
    assert plan.identity() != identity
    shop.plan(tasks, changed("data", seed=1)).forget(["c"])  # never done with these settings: no error


def of_an_alias(shop: Workshop) -> list[Task]:
    """Tasks of which b is current for one alias only; c has what b made of it."""
    return [
        shop.task("a"),
        shop.task(
            "b",
            "a",
            work=lambda context: context.config.tracking.alias,
            is_current=lambda config, output: output["result"] == config.tracking.alias,
        ),
        shop.task("c", "b"),
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_an_output_that_is_not_current_is_made_again_with_all_that_follows(shop: Workshop) -> None:
    tasks = of_an_alias(shop)
    shop.run(tasks)
    other = changed("tracking", alias="other")
    assert set(shop.plan(tasks, other).done()) == {"a"}
    manifests = shop.run(tasks, other)
    assert manifests["b"]["output"]["result"] == "other"
    assert manifests["c"]["output"]["from"] == {"b": "other"}
    assert shop.executions("a", "b", "c") == [1, 2, 2]
    for name in "bc":
        assert shop.storage.list(f"tasks/{name}/{manifests[name]['key']}") == ["manifest.json"]
    assert shop.plan(tasks, other).done() == manifests


@pytest.mark.usefixtures("ray_cluster")
def test_what_follows_from_a_new_output_is_not_done_if_the_driver_ends_before_it(shop: Workshop) -> None:
    tasks = of_an_alias(shop)
    shop.run(tasks)
    other = changed("tracking", alias="other")
    run_tasks(shop.plan(tasks, other), tasks[:2], StopOnSignal(), [])  # as a driver that is killed after b
    assert set(shop.plan(tasks, other).done()) == {"a", "b"}
    assert shop.run(tasks, other)["c"]["output"]["from"] == {"b": "other"}


@pytest.mark.usefixtures("ray_cluster")
def test_nothing_is_left_that_follows_from_what_was_forgotten(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [shop.task("a", keeps_state=True), shop.task("b", "a"), shop.task("c", "b")]
    plan = shop.plan(tasks)
    identity, delete = plan.identity(), Storage.delete
    for deletions in (1, 2, 4, 6):
        shop.run(tasks)
        deleted: list[str] = []

        def delete_some(storage: Storage, path: str, deleted: list[str] = deleted, most: int = deletions) -> None:
            if len(deleted) == most:
                raise KeyboardInterrupt  # the process is killed here
            deleted.append(path)
            delete(storage, path)

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "delete", delete_some)
            with suppress(KeyboardInterrupt):
                plan.forget({"c", "a", "b"})
        left = {task.name for task in tasks if plan.written(task)}
        assert left == set(plan.done()) == set("abc"[: 3 - deletions // 2]), deleted
        assert plan.identity() != identity


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_interrupted_force_of_an_earlier_version_left_does_not_count(shop: Workshop) -> None:
    tasks = [shop.task("a"), shop.task("b", "a", work=lambda context: context.out), shop.task("c", "b")]
    first = shop.run(tasks)
    shop.storage.delete(shop.plan(tasks).manifest_path("b"))  # killed before it came to c
    second = shop.run(tasks)
    assert second["b"]["output"] != first["b"]["output"]
    assert second["c"]["output"]["from"] == {"b": second["b"]["output"]["result"]}
    assert shop.plan(tasks).done() == second


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"identity": 3}'])
def test_a_damaged_identity_is_named(shop: Workshop, content: bytes) -> None:
    plan = shop.plan([shop.task("a")])
    plan.identity()
    shop.storage.write_bytes(f"runs/{plan.key}.json", content)
    with pytest.raises(ValueError, match=rf"{plan.key}\.json does not hold the identity of a run: delete it"):
        plan.identity()
