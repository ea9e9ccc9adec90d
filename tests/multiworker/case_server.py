"""Runs cases in processes that are forked from one in which TensorFlow has been imported.

    python tests/multiworker/case_server.py

reads orders from its standard input, one JSON object a line, and answers each with a line when all its processes have
ended. `run_case` in case_runs.py starts it.
"""

import json
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from case_registry import CASES, Worker
from case_table import load_cases


def free_addresses(number: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def run_worker(order: dict[str, Any], folder: Path, rank: int, addresses: list[str], all_done: int) -> None:
    """Runs the case in this process, and writes what it found to `<folder>/<rank>.pickle`."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(order["limit"])  # ends this process, whatever it waits for
    num_workers = len(addresses)
    if num_workers > 1:
        os.environ["TF_CONFIG"] = json.dumps(
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        )
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    start = time.monotonic()
    found: dict[str, Any]
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy() if num_workers > 1 else tf.distribute.get_strategy()
        case = CASES[order["case"]]
        worker = Worker(rank, num_workers, folder, num_workers == 1 and case.stock, strategy)
        keras.utils.set_random_seed(1)
        found = {"result": case.function(worker)}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    found["seconds"] = time.monotonic() - start
    (folder / f"{rank}.partial").write_bytes(pickle.dumps(found))
    (folder / f"{rank}.partial").rename(folder / f"{rank}.pickle")
    if order["parts"]:
        sys.exit()  # as a script does that has ended
    os.read(all_done, 1)  # until the others have ended too: TensorFlow ends a worker whose peer has gone
    os._exit(0)


def run(order: dict[str, Any]) -> None:
    """Starts all workers of an order, for each number of them, and waits until they have ended."""
    all_done, write = os.pipe()
    children: dict[int, Path] = {}
    for num_workers in order["processes"]:
        folder = Path(order["folder"]) / str(num_workers)
        folder.mkdir()
        addresses = free_addresses(num_workers)
        for rank in range(num_workers):
            pid = os.fork()
            if pid == 0:
                os.close(write)
                run_worker(order, folder, rank, addresses, all_done)
            children[pid] = folder / f"{rank}.pickle"
    released = False
    while children:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        children.pop(pid, None)
        if not released and all(result.exists() for result in children.values()):
            os.close(write)
            released = True
        time.sleep(0.02)
    if not released:
        os.close(write)
    os.close(all_done)


def main() -> None:
    load_cases()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not come between the answers
    for line in sys.stdin:
        run(json.loads(line))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
