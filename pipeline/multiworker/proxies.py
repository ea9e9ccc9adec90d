"""Keeps HTTP proxies out of the way of the workers."""

import os

from .tf_config import cluster


def bypass_proxies() -> None:
    """Takes the workers in TF_CONFIG off the HTTP proxy of the environment, where gRPC would look for them in vain."""
    hosts = [address.rpartition(":")[0].strip("[]") for address in cluster().workers]
    for name in ("no_proxy", "no_grpc_proxy"):  # gRPC reads the second alone where it is set
        present = os.environ.get(name) or (os.environ.get("NO_PROXY", "") if name == "no_proxy" else "")
        if hosts and (present or name == "no_proxy"):
            listed = [entry for entry in present.split(",") if entry]
            os.environ[name] = ",".join([*listed, *(host for host in dict.fromkeys(hosts) if host not in listed)])
