"""Memory that is exhausted, and a GPU that is missing, in the processes that train and classify: one message each."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from image_models import IMAGE_SHAPE, save_model

from perceiver.config import PerceiverConfig
from perceiver.model import Perceiver
from pipeline.data.image_files import Part, read_part
from pipeline.data.rows import Rows
from pipeline.devices import GpuError, OutOfMemoryError, memory_errors
from pipeline.inference import classifier
from pipeline.storage import Storage
from pipeline.training.config import TrainingConfig
from pipeline.training.worker import Worker
from pipeline.workers import in_process

OOM = "OOM when allocating tensor with shape[9,9] and type float on /job:localhost/device:GPU:0 by allocator GPU_0_bfc"


def exhausted(*_: object, **__: object) -> None:
    raise tf.errors.ResourceExhaustedError(None, None, f"Graph execution error:\n\n{OOM}\n\t [[{{{{node a}}}}]]")


@pytest.fixture(autouse=True)
def no_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow may run in this process already, and takes no settings then."""
    for module in (in_process, classifier):
        monkeypatch.setattr(module, "set_up_tensorflow", lambda *given, **named: None)


def train(**settings: Any) -> None:
    """What a trial, or a worker of Ray Train, runs."""
    shape: dict[str, Any] = {"stem": "patches", "patch_size": 4, "data_dim": 4, "num_latents": 2, "latent_dim": 4}
    model = PerceiverConfig(image_shape=(8, 8, 1), num_classes=3, num_self_attention_heads=1, **shape)
    rows = Rows(np.arange(8), np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32))
    config = TrainingConfig(num_workers=1, epochs=1, global_batch_size=8, **settings)
    in_process.train_in_process(model, config, rows, rows, Worker(report=lambda metrics, folder: None))


def test_a_trial_that_was_given_a_gpu_looks_for_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Perceiver, "fit", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(GpuError, match=r"^train\.use_gpu: .* sees none there"):
        train(use_gpu=True)


def test_an_actor_that_was_given_a_gpu_looks_for_it_first(tmp_path: Path) -> None:
    actor = classifier.Classifier({}, "model", Storage(str(tmp_path)), 1, batch_size=64, use_gpu=True)
    with pytest.raises(GpuError, match=r"^use_gpu: .* sees none there"):
        actor(pa.table({}))


def test_exhausted_memory_in_a_training_is_one_message_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Perceiver, "fit", exhausted)
    message = (
        rf"^the memory of .* on \S+ does not suffice: {re.escape(OOM)}: a worker has 8 rows of each step: take more "
        r"workers than 1, or give --train.precision mixed_bfloat16 .*--model.remat, or a smaller "
        r"--train.global-batch-size$"
    )
    with pytest.raises(OutOfMemoryError, match=message):
        train()


def test_exhausted_memory_in_an_actor_names_the_batch_size(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    files = {
        str(p.relative_to(tmp_path / "model")): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()
    }
    actor = classifier.Classifier(files, "model", Storage(str(tmp_path / "out")), 1, batch_size=64, use_gpu=False)
    actor._apply = exhausted  # type: ignore[assignment]
    np.savez(tmp_path / "images.npz", images=np.zeros((2, *IMAGE_SHAPE), np.uint8))
    rows = read_part(Part(0, 0, ("images.npz",), 0, 2), "npz", Storage(str(tmp_path)), IMAGE_SHAPE, resize=None)
    with pytest.raises(OutOfMemoryError, match=r"OOM .*: give fewer images at a time than --batch-size 64$"):
        actor(classifier.packed(rows))


def test_other_exhausted_resources_stay_what_they_are() -> None:
    too_long = tf.errors.ResourceExhaustedError(None, None, "Received message larger than max (9 vs. 4)")
    with pytest.raises(tf.errors.ResourceExhaustedError, match="larger than max"), memory_errors("remedy"):
        raise too_long
    with pytest.raises(OutOfMemoryError, match=r"remedy$"), memory_errors("remedy"):
        raise tf.errors.InternalError(None, None, "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
