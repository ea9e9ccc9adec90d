"""An elastic training on a Ray cluster that gains a node and loses it, started by test_survival.py.

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

from pipeline.data.ingest import ingest
from pipeline.data.preprocess import preprocess
from pipeline.settings.config import trained_configs
from pipeline.settings.presets import quickstart
from pipeline.storage import Storage
from pipeline.training.worker import EpochEnded
from pipeline.workers import train as training
from pipeline.workflow.channel import Channel

NOTICE_SECONDS = 120  # as on AWS; the node stays until the training has left it


def main(orders: dict[str, Any]) -> None:
    training.RESIZE_SECONDS = 2.0
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    storage, channel = Storage(orders["storage"]), Channel()
    data = quickstart().data
    manifest = preprocess(data, ingest(data, storage, "ingested"), storage, "data")
    model, settings = trained_configs(quickstart(), manifest)
    model, settings = replace(model, dropout=0.0), replace(settings, num_workers=(1, 4), **orders["train"])
    output: dict[str, Any] = {}

    def run() -> None:
        output.update(training.train(model, settings, manifest, storage, state="elastic", channel=channel))

    def wait_for(num_workers: int) -> None:
        while True:
            epochs = [event.metrics for event in channel.take() if isinstance(event, EpochEnded)]
            for metrics in epochs:
                print(metrics["epoch"], metrics["num_workers"], flush=True)
            if any(metrics["num_workers"] == num_workers for metrics in epochs):
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
    """Tells Ray that the node will be gone soon, as one does when a spot host is reclaimed."""
    options = ["--address", cluster.address, "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "spot notice", "--deadline-remaining-seconds", str(NOTICE_SECONDS)]
    ray_command = str(Path(sys.executable).with_name("ray"))
    subprocess.run([ray_command, "drain-node", *options], check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
