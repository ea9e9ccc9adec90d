"""An elastic training on a Ray cluster that gains a node and loses it, started by tests/test_survival.py.

Reads its orders as JSON from its argument: `storage` and `train`, fields of the training. Prints the history as one
line of JSON, last.
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from pipeline import train as training
from pipeline.board import Board
from pipeline.preprocess import ingest, preprocess
from pipeline.presets import quickstart
from pipeline.storage import Storage
from pipeline.tasks import trained_configs

NOTICE_SECONDS = 120  # what AWS gives; the node stays until the training has left it


def main(orders: dict[str, Any]) -> None:
    training.RESIZE_SECONDS = 2.0
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    storage, board = Storage(orders["storage"]), Board()
    data = quickstart().data
    manifest = preprocess(data, ingest(data, storage, "ingested"), storage, "data")
    model, settings = trained_configs(quickstart(), manifest)
    model, settings = replace(model, dropout=0.0), replace(settings, num_workers=(1, 4), **orders["train"])
    output: dict[str, Any] = {}

    def run() -> None:
        output.update(training.train(model, settings, manifest, storage, state="elastic", board=board))

    def wait_for(num_workers: int) -> None:
        while True:
            events = [event for event in board.take() if "metrics" in event]  # the others are of steps
            for event in events:
                print(event["metrics"]["epoch"], event["metrics"]["num_workers"], flush=True)
            if any(event["metrics"]["num_workers"] == num_workers for event in events):
                return
            assert thread.is_alive(), "ended too early"
            time.sleep(0.1)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(1)
    node = cluster.add_node(num_cpus=1)
    wait_for(2)
    cluster.remove_node(node, allow_graceful=False)
    wait_for(1)
    node = cluster.add_node(num_cpus=1)
    wait_for(2)
    give_notice(cluster, node)
    wait_for(1)  # has left the node on its own
    cluster.remove_node(node, allow_graceful=False)
    thread.join()
    print(json.dumps(output["history"]))
    ray.shutdown()
    cluster.shutdown()


def give_notice(cluster: Cluster, node: Any) -> None:
    """Tells Ray, as one does on the notice of a spot host, that the node will be gone soon."""
    options = ["--address", cluster.address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "spot notice", "--deadline-remaining-seconds", str(NOTICE_SECONDS)]
    ray_command = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray_command, "drain-node", *options], check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
