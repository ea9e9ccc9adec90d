"""TFRecord through tf.data: shuffled files, a shuffle buffer of the window, batches that are parsed as a whole.

It neither verifies content beyond TFRecord's own CRC32C nor resumes: a step is reached by reading what comes before.
"""

import os
from pathlib import Path

import numpy as np
from contest import BATCH_ROWS, SEED, WINDOW_MIB, Batches, run

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import tensorflow as tf

FILES_AT_A_TIME = 16


def write(images: np.ndarray, folder: Path, shards: int) -> None:
    for number, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        with tf.io.TFRecordWriter(str(folder / f"{number:05d}.tfrecord")) as file:
            for row in rows.tolist():
                image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[images[row].tobytes()]))
                label = tf.train.Feature(int64_list=tf.train.Int64List(value=[row]))
                features = tf.train.Features(feature={"image": image, "label": label})
                file.write(tf.train.Example(features=features).SerializeToString())


def read(folder: Path, shape: tuple[int, ...], epoch: int, step: int) -> Batches:
    description = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}
    _, height, width, channels = shape

    def parse(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        found = tf.io.parse_example(records, description)
        pixels = tf.io.decode_raw(found["image"], tf.uint8, fixed_length=height * width * channels)
        return tf.reshape(pixels, (BATCH_ROWS, height, width, channels)), found["label"]

    files = sorted(map(str, folder.glob("*.tfrecord")))
    names = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=SEED + epoch)
    records = names.interleave(tf.data.TFRecordDataset, cycle_length=min(FILES_AT_A_TIME, len(files)))
    window = WINDOW_MIB * 2**20 // (height * width * channels)
    batches = records.shuffle(window, seed=SEED + epoch).batch(BATCH_ROWS, drop_remainder=True)
    yield from batches.skip(step).map(parse).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


if __name__ == "__main__":
    run(write, read)
