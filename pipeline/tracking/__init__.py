"""Keeps what happens in a run in MLflow, so that a slow or absent tracking server costs neither time nor a metric.

config.py       settings: tracking URI, experiment, name of the registered model, alias of its best version
errors.py       which errors of the tracking store are worth another try
tracker.py      the MLflow client: runs, parameters, metrics, artifacts and data sets, each written once
outbox.py       records wait on disk until the tracking server has them
sender.py       a thread that sends the records of an outbox
artifacts.py    checks that the store of the artifacts takes files; calls to it that end in any case
server.py       checks that a tracking server answers, without importing MLflow
provenance.py   code version, packages, machine, energy and cost of a run
"""
