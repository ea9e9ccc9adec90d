"""What a trained model makes of a split: predictions of every row, once, and metrics from them."""

from typing import Any

import keras
import numpy as np

from pipeline.batches import ImageArrays


def predict(model: keras.Model, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Class probabilities (N, K) float32 of uint8 images (N, H, W, C), in order."""
    return np.asarray(keras.ops.softmax(model.predict(images, batch_size=batch_size, verbose=0), axis=-1))


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, cross-entropy and accuracy of each class.

    Args:
        probabilities: (N, K).
        labels: (N,) integers. A class without rows has the accuracy None.

    Raises:
        ValueError: if a probability is not finite; any comparison with it would count as a hit.
    """
    if not (finite := np.isfinite(probabilities).all(axis=1)).all():
        raise ValueError(f"the model gives {(~finite).sum()} of {len(labels)} images no finite probabilities")
    label = labels[:, None].astype(np.int64)
    of_label = np.take_along_axis(probabilities, label, axis=1)
    # Classes that come before the right one; of equally likely ones the first comes first, as in argmax.
    before = np.arange(probabilities.shape[1]) < label
    rank = ((probabilities > of_label) | ((probabilities == of_label) & before)).sum(axis=1)
    classes = range(probabilities.shape[1])
    correct = rank == 0
    return {
        "top1": float(correct.mean()),
        "top5": float((rank < 5).mean()),
        "loss": float(-np.log(np.maximum(of_label.astype(np.float64), np.finfo(np.float32).tiny)).mean()),
        "num_examples": len(labels),
        "per_class": [float(correct[labels == k].mean()) if (labels == k).any() else None for k in classes],
    }


def evaluate(model: keras.Model, data: ImageArrays) -> tuple[dict[str, Any], np.ndarray]:
    """`metrics` of a model that takes uint8 images and gives logits, and the probabilities (N, K) behind them."""
    probabilities = predict(model, data.images)
    return metrics(probabilities, data.labels), probabilities
