"""A process that trains a Perceiver in PyTorch, compiled by `torch.compile`; for `benchmarks/gpu.py`.

    python benchmarks/gpu_torch.py '{"model": {...}, "precision": "mixed_bfloat16", "batch": 512, ...}'

The argument has the fields of `Orders`. The last line that it prints is JSON: `parameters`, and `images_per_second` of
each turn. It imports no TensorFlow, since both bring a cuDNN of the same name and one would serve both; where the two
were loaded into one process, it crashed.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # else the package of the Perceiver's settings imports TensorFlow
sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as functional
from torch_perceiver import TorchPerceiver

from perceiver import PerceiverConfig

DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16, "float32": torch.float32}
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Orders:
    """What is measured.

    Attributes:
        model: Fields of a `PerceiverConfig`.
        precision: Keras's name of it.
        label_smoothing: Of the loss.
        batch: Images of a step.
        steps: Steps of a turn.
        turns: Number of turns.
        compiled: Whether by `torch.compile`.
    """

    model: dict[str, Any]
    precision: str
    label_smoothing: float
    batch: int
    steps: int
    turns: int
    compiled: bool


def main() -> None:
    orders = Orders(**json.loads(sys.argv[1]))
    model_settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in orders.model.items()}
    config = PerceiverConfig(**model_settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = TorchPerceiver(config).to(device)
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (orders.batch, *config.image_shape), dtype=np.uint8)).to(device)
    labels = torch.from_numpy(random.integers(0, config.num_classes, orders.batch)).to(device)
    forward: Any = torch.compile(model) if orders.compiled else model
    dtype = DTYPES[orders.precision]

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=orders.label_smoothing)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(WARM_UP_STEPS):
        step().item()
    rates = []
    for _ in range(orders.turns):
        start = time.perf_counter()
        for _ in range(orders.steps):
            loss = step()
        assert np.isfinite(loss.item())  # waits for the device
        rates.append(orders.batch * orders.steps / (time.perf_counter() - start))
    print(json.dumps({"parameters": parameters, "images_per_second": rates}))


if __name__ == "__main__":
    main()
