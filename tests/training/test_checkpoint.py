"""The content of checkpoints; a damaged one is never restored."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import keras
import numpy as np
import pytest

from perceiver.config import PerceiverConfig
from pipeline.settings.config import ModelConfig
from pipeline.storage import Storage
from pipeline.training import checkpoint
from pipeline.training.checkpoint import TrainingState
from pipeline.training.checkpoint_store import (
    COMMIT_FILE,
    STATE_FILE,
    CheckpointError,
    CheckpointsDamaged,
    CheckpointStore,
)
from pipeline.training.config import TrainingConfig
from pipeline.training.own_model import OwnModel

DISK_BYTES = 2 << 20  # size of `small_disk`


@pytest.fixture(params=["folder", "mock"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """`mock` takes the code paths of an object store."""
    return Storage({"folder": str(tmp_path / "runs"), "mock": "mock:///bucket/runs"}[request.param])


def written(folder: Path, content: str, size: int = 1000) -> Path:
    """A folder with the files of a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "weights").write_bytes(content.encode() * size)
    (folder / "state.json").write_text(content)
    return folder


def committed(storage: Storage, store: CheckpointStore, folder: Path, *positions: tuple[int, int]) -> list[str]:
    return [store.commit(written(folder, f"{epoch}-{step}"), epoch, step) for epoch, step in positions]


def newest(store: CheckpointStore, target: Path) -> str | None:
    """Content of the checkpoint from which a training would continue."""
    return (target / "state.json").read_text() if store.restore_newest(target) else None


def test_the_newest_checkpoint_is_restored(storage: Storage, tmp_path: Path) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=2)
    assert store.restore_newest(tmp_path / "target") is None
    committed(storage, store, tmp_path / "made", (1, 0), (1, 90), (1, 100))
    assert newest(store, tmp_path / "target") == "1-100"
    committed(storage, store, tmp_path / "made", (10, 0))
    assert newest(store, tmp_path / "target") == "10-0"
    assert sorted(file.name for file in (tmp_path / "target").iterdir()) == [COMMIT_FILE, "state.json", "weights"]


def cut(storage: Storage, path: str) -> None:
    storage.write_bytes(path, storage.read_bytes(path)[:-2])


def flip(storage: Storage, path: str) -> None:
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 1
    storage.write_bytes(path, bytes(data))


@pytest.mark.parametrize("file", ["weights", "state.json", COMMIT_FILE])
@pytest.mark.parametrize("damage", [cut, flip, Storage.delete])
def test_a_damaged_checkpoint_is_skipped(
    storage: Storage, file: str, damage: Callable[[Storage, str], None], tmp_path: Path
) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=2)
    names = committed(storage, store, tmp_path / "made", (1, 0), (2, 0))
    damage(storage, f"{store.path(names[1])}/{file}")
    assert not store.restore(names[1], tmp_path / "target")
    assert newest(store, tmp_path / "target") == "1-0"
    # It does not count among those that are kept.
    committed(storage, store, tmp_path / "made", (1, 5))
    assert [name[:16] for name in storage.list("checkpoints")] == ["000001-000000000", "000001-000000005"]


@pytest.mark.parametrize(
    ("damaged", "epoch", "step", "said"),
    [
        (1, 2, 7, " is damaged and removed: the training goes on after step 7 of epoch 3"),
        (2, 2, 0, " are damaged and removed: the training goes on after epoch 2"),
        (3, 0, 0, " are damaged and removed, and none is intact: the training starts from the beginning"),
    ],
)
def test_what_is_lost_with_damaged_checkpoints_is_said_once(
    storage: Storage, damaged: int, epoch: int, step: int, said: str, tmp_path: Path
) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=3)
    names = committed(storage, store, tmp_path / "made", (2, 0), (2, 7), (3, 0))
    for name in names[-damaged:]:
        cut(storage, f"{store.path(name)}/weights")
    events: list[CheckpointsDamaged] = []
    found = store.restore_newest(tmp_path / "target", events.append)
    paths = tuple(storage.absolute(store.path(name)) for name in names[-damaged:])
    assert events == [CheckpointsDamaged(paths, epoch, step)]
    assert events[0].warning.endswith(f"{paths[-1]}{said}")
    assert store.restore_newest(tmp_path / "target", events.append) == found
    assert len(events) == 1


def test_a_checkpoint_whose_writer_was_killed_is_not_called_damaged(storage: Storage, tmp_path: Path) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=2)
    names = committed(storage, store, tmp_path / "made", (1, 0), (2, 0))
    storage.delete(f"{store.path(names[1])}/{COMMIT_FILE}")
    events: list[CheckpointsDamaged] = []
    assert store.restore_newest(tmp_path / "target", events.append) == names[0]
    assert not events
    assert storage.list("checkpoints") == names[:1]


def test_the_last_and_the_best_are_kept(storage: Storage, tmp_path: Path) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=2)
    for epoch, score in enumerate([0.5, 0.2, 0.3, 0.4], start=1):
        store.commit(written(tmp_path / "made", str(epoch)), epoch, 0, score)
    for step in (1, 2, 3):
        store.commit(written(tmp_path / "made", "within"), 4, step)
    kept = [tuple(int(part) for part in name.split("-")[:2]) for name in storage.list("checkpoints")]
    assert kept == [(2, 0), (4, 2), (4, 3)]


def test_a_full_disk_leaves_the_earlier_checkpoints_intact(small_disk: Path, tmp_path: Path) -> None:
    store = CheckpointStore(Storage(str(small_disk / "runs")), "checkpoints", kept=2)
    store.commit(written(tmp_path / "made", "1-0"), 1, 0)
    with pytest.raises(CheckpointError, match=rf"{small_disk}/runs/checkpoints/000002-000000000-\w+ .*No space left"):
        store.commit(written(tmp_path / "made", "2-0", size=DISK_BYTES), 2, 0)
    assert newest(store, tmp_path / "target") == "1-0"
    store.commit(written(tmp_path / "made", "2-0"), 2, 0)
    assert newest(store, tmp_path / "target") == "2-0"


def made_model(policy: str, units: int = 4) -> keras.Model:
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(units, dtype=keras.DTypePolicy(policy))(inputs))
    with_scale = keras.optimizers.AdamW(0.1)
    model.compile(
        optimizer=keras.optimizers.LossScaleOptimizer(with_scale) if policy == "mixed_float16" else with_scale,
        loss="mse",
        jit_compile=False,
    )
    return model


def test_a_full_temporary_folder_is_named(small_disk: Path) -> None:
    model = made_model("float32", units=DISK_BYTES // 4)
    with pytest.raises(CheckpointError, match=rf"the checkpoint {small_disk} could not be written"):
        checkpoint.save(small_disk, model, TrainingState())


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_checkpoint_holds_all_that_training_changes(policy: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), np.zeros((8, 4), np.float32)
    model = made_model(policy)
    model.fit(x, y, epochs=3, verbose=0)
    model.fit(x * 1e30, y, epochs=1, verbose=0) if policy == "mixed_float16" else None  # lowers the loss scale
    model.optimizer.learning_rate = 0.01
    state = TrainingState(
        epoch=3,
        step=2,
        history=[{"epoch": 1, "val_loss": 0.5}],
        callbacks={"EarlyStopping": {"wait": 2.0, "best": 0.5}},
        best_weights=model.get_weights(),
        metrics=[np.array(1.5)],
        order=[0, 8, 8],
        seconds=1.5,
    )
    checkpoint.save(tmp_path, model, state)
    other = made_model(policy)
    found = checkpoint.load(tmp_path, other)
    for variable, expected in zip(other.variables, model.variables, strict=True):
        np.testing.assert_array_equal(variable, expected, err_msg=variable.path)
    for variable, expected in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable, expected, err_msg=variable.path)
    if policy == "mixed_float16":
        scale = model.optimizer.dynamic_scale.numpy()
        assert other.optimizer.dynamic_scale.numpy() == scale < model.optimizer.initial_scale
    for name in ("epoch", "step", "finished", "history", "callbacks", "order", "seconds"):
        assert getattr(found, name) == getattr(state, name)
    for name in ("best_weights", "metrics"):
        for value, expected in zip(getattr(found, name), getattr(state, name), strict=True):
            np.testing.assert_array_equal(value, expected)


def test_a_checkpoint_from_before_the_seconds_were_kept_is_read(tmp_path: Path) -> None:
    model = made_model("float32")
    model.optimizer.build(model.trainable_variables)
    checkpoint.save(tmp_path, model, TrainingState(epoch=1, step=2, seconds=3.0))
    kept = json.loads((tmp_path / STATE_FILE).read_text())
    del kept["seconds"]
    (tmp_path / STATE_FILE).write_text(json.dumps(kept))
    found = checkpoint.load(tmp_path, model)
    assert (found.epoch, found.step, found.seconds) == (1, 2, 0.0)


def test_a_checkpoint_that_cannot_be_written_is_named_though_its_rest_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path / "runs"))

    def fail(self: Storage, *_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Storage, "upload", fail)
    monkeypatch.setattr(Storage, "delete", fail)
    with pytest.raises(CheckpointError, match=r"checkpoints/000001-000000000-\w+ could not be written: .*Input/output"):
        CheckpointStore(storage, "checkpoints", kept=2).commit(written(tmp_path / "made", "1-0"), 1, 0)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_training(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(storage, "checkpoints", kept=1)
    committed(storage, store, tmp_path / "made", (1, 0))
    with monkeypatch.context() as patched:

        def fail(self: Storage, path: str) -> None:
            raise OSError(13, "Permission denied", path)

        patched.setattr(Storage, "delete", fail)
        committed(storage, store, tmp_path / "made", (2, 0))
    assert "checkpoints could not be removed: [Errno 13] Permission denied" in caplog.text
    assert newest(store, tmp_path / "target") == "2-0"
    committed(storage, store, tmp_path / "made", (3, 0))
    assert [name[:6] for name in storage.list("checkpoints")] == ["000003"], "the next one removes them"


CHANGED: list[tuple[dict[str, object], dict[str, object], str]] = [
    ({"learning_rate": 0.004}, {}, "train.learning_rate = 0.002, this one has 0.004: give the settings of then"),
    (
        {"weight_decay": 0.0, "epochs": 20},
        {},
        "train.epochs = 10, this one has 20; with train.weight_decay = 0.05, this",
    ),
    ({}, {"layer_norm_epsilon": 1e-3}, "model.layer_norm_epsilon = 1e-05, this one has 0.001"),
    ({}, {"pixel_mean": (0.1, 0.2, 0.3)}, "model.pixel_mean = None, this one has (0.1, 0.2, 0.3)"),
]


@pytest.mark.parametrize(("train", "model", "said"), CHANGED)
def test_a_training_goes_on_with_its_own_settings_alone(
    train: dict[str, object], model: dict[str, object], said: str
) -> None:
    """All of these have the same shapes and the same order of rows."""
    config, shape = TrainingConfig(num_workers=1), PerceiverConfig()
    state = read_again(TrainingState(settings=checkpoint.settings_of(shape, config)))
    checkpoint.check_settings(state, shape, config)
    checkpoint.check_settings(state, ModelConfig(), replace(config, num_workers=2, checkpoint_every_steps=5))
    with pytest.raises(ValueError, match=re.escape(said)):
        checkpoint.check_settings(state, replace(shape, **model), replace(config, **train))  # type: ignore[arg-type]


def test_settings_that_a_checkpoint_does_not_know_had_their_defaults() -> None:
    config, shape = TrainingConfig(num_workers=1), PerceiverConfig()
    checkpoint.check_settings(TrainingState(), shape, replace(config, learning_rate=1.0))  # from before they were kept
    known = checkpoint.settings_of(shape, config)
    state = read_again(TrainingState(settings={n: known[n] for n in known if n not in ("train.cutmix", "model.stem")}))
    checkpoint.check_settings(state, shape, config)
    with pytest.raises(ValueError, match=r"train.cutmix = 0.0, this one has 0.5"):
        checkpoint.check_settings(state, shape, replace(config, cutmix=0.5))


def test_arguments_of_a_model_of_ones_own_are_kept() -> None:
    config = TrainingConfig(num_workers=1)
    own = OwnModel(made_model, {"units": 3, "dtype": np.float32}, image_shape=(8, 8, 1), num_classes=3)
    state = read_again(TrainingState(settings=checkpoint.settings_of(own, config)))
    checkpoint.check_settings(state, own, config)
    with pytest.raises(ValueError, match=r"model.arguments\['units'\] = 3, this one has 4"):
        checkpoint.check_settings(state, replace(own, arguments={"units": 4}), config)


def read_again(state: TrainingState) -> TrainingState:
    return TrainingState(**json.loads(json.dumps(asdict(state))))
