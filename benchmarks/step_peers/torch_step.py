"""A process that trains the Perceiver in PyTorch: `torch_step.py PRESET PRECISION BATCH adamw WAY`.

The way is `eager`, `compile` or `processes`. The last one is DistributedDataParallel with a process of one thread for
each core. With `+math` attention is made of products and a softmax. PyTorch chooses flash attention on CPUs too, whose
backward pass in bfloat16 took half of the step where there are no matrix units.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
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
    rank = _join(len(os.sched_getaffinity(0))) if compiler == "processes" else 0
    model = TorchPerceiver(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (int(batch), *config.image_shape), dtype=np.uint8))
    labels = torch.from_numpy(random.integers(0, config.num_classes, int(batch)))
    forward: Any = torch.compile(model) if compiler == "compile" else model
    if compiler == "processes":
        number = torch.distributed.get_world_size()
        images, labels = images.tensor_split(number)[rank], labels.tensor_split(number)[rank]
        forward = torch.nn.parallel.DistributedDataParallel(model)

    def step() -> float:
        if compiler == "processes":
            torch.distributed.broadcast(torch.zeros(1), 0)  # the others wait here for the first one's turn
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed_bfloat16"):
            logits = forward(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    with contextlib.suppress(RuntimeError):  # the first process has ended
        while rank:
            step()
    if rank:
        return
    run(step, sum(each.numel() for each in model.parameters() if each.requires_grad))


def _join(processes: int) -> int:
    """Starts the other processes, if this is the first one, and connects them; the rank of this one.

    They end when the first one does, because it no longer answers.
    """
    torch.set_num_threads(1)
    # Names of its own, because the user's environment may have those of torchrun.
    rank, port = int(os.environ.get("STEP_PEERS_RANK", "0")), os.environ.get("STEP_PEERS_PORT", "")
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        for other in range(1, processes):
            variables = os.environ | {"STEP_PEERS_RANK": str(other), "STEP_PEERS_PORT": port}
            subprocess.Popen([sys.executable, *sys.argv], stdin=subprocess.DEVNULL, env=variables)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    return rank


if __name__ == "__main__":
    main()
