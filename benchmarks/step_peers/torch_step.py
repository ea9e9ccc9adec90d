"""A process that trains the Perceiver in PyTorch: `torch_step.py PRESET PRECISION BATCH adamw WAY`.

The way is `eager` or `compile`, with `+math` for attention by products and a softmax, not the flash attention that
PyTorch chooses on CPUs too, whose backward pass in bfloat16 took half of the step where there are no matrix units.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from timed_steps import run

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from torch_perceiver import TorchPerceiver

from perceiver import presets


def main() -> None:
    preset, precision, batch, optimizer_name, way = sys.argv[1:]
    assert optimizer_name == "adamw", optimizer_name
    config = getattr(presets, preset)()
    compiler, _, attention = way.partition("+")
    if attention == "math":  # the switches of CUDA count on CPUs too
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.manual_seed(0)
    model = TorchPerceiver(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (int(batch), *config.image_shape), dtype=np.uint8))
    labels = torch.from_numpy(random.integers(0, config.num_classes, int(batch)))
    forward: Any = torch.compile(model) if compiler == "compile" else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed_bfloat16"):
            logits = forward(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    run(step, sum(each.numel() for each in model.parameters() if each.requires_grad))


if __name__ == "__main__":
    main()
