"""`keras.applications`"""

import keras
import numpy as np
from case_registry import CLASSES, CROSSENTROPY, Result, Worker, case, fitted

PICTURES = np.random.default_rng(7).uniform(size=(18, 32, 32, 3)).astype(np.float32) * 255
LABELS = CLASSES[:18]


def resnet() -> keras.Model:
    return keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=2)


@case('batch_norm="synchronize"')
def resnet_without_the_remedy(worker: Worker) -> Result:
    """ResNet50 from scratch without `batch_norm="synchronize"`"""
    return fitted(worker.compiled(resnet, CROSSENTROPY), PICTURES, LABELS, batch_size=9)
