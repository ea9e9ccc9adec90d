"""A training step of the Perceiver in PyTorch, compiled by `torch.compile`; for `benchmarks/gpu.py`."""

import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from gpu_steps import WARM_UP_STEPS, Job, Speed, noise, speed_of
from torch_perceiver import TorchPerceiver

DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16, "float32": torch.float32}


def measure_torch(job: Job, peak: float, steps: int, turns: int, compiled: bool) -> Speed:
    """Speed of the PyTorch model on a job, as `gpu_steps.measure_steps`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = TorchPerceiver(job.model).to(device)
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda")
    images, labels = (torch.from_numpy(array.astype(kind)).to(device) for array, kind in _arrays(job))
    forward: Any = torch.compile(model) if compiled else model
    dtype = DTYPES[job.train.precision]

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=job.train.label_smoothing)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(WARM_UP_STEPS):
        step()
    rates = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        assert np.isfinite(loss.item())  # waits for the device
        rates.append(job.batch * steps / (time.perf_counter() - start))
    assert statistics.median(rates) > 0
    return speed_of(job, "PyTorch, torch.compile" if compiled else "PyTorch", parameters, rates, peak)


def _arrays(job: Job) -> list[tuple[np.ndarray, type]]:
    images, labels = noise(job)
    return [(images, np.uint8), (labels, np.int64)]
