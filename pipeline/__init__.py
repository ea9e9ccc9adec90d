"""Trains and registers a Perceiver image classifier: moves data through `perceiver` and `tune` as durable tasks on Ray.

Packages:

data/         sources, ingest, preprocessing, shards, and rows in memory
settings/     the settings of all packages put together, presets, and the command line
training/     the training of one worker: batches, optimizer, `fit`, checkpoints; without Ray
workers/      Ray Train around `training`
workflow/     durable tasks on Ray: keys, manifests, lease, events; knows no machine learning
tasks/        the seven tasks of the pipeline and their order
driver/       the process of the command: runs the tasks, shows and records their progress
evaluation/   the metrics by which a trained model is judged
registry/     versions of the registered model, their promotion, export and download
tracking/     runs in MLflow, sent through an outbox that outlasts a server that is down
report/       the HTML page of a run
inference/    batch inference with a registered model
multiworker/  makes Keras 3 train on several workers; can be used without the rest of the project

Commands:

run.py                the pipeline
own_model.py          trains and evaluates a Keras model of one's own; a function, no command
predict.py            classifies images with a registered model
evaluate_version.py   evaluates a registered model
clean.py              lists the storage folder and deletes what no registered model needs

Modules without a package:

kept.py          what `clean.py` leaves in storage, and why
storage.py       a folder or an object store behind one interface, with verified reads
contact.py       how a folder or an object store that may never answer is asked first
fields.py        which settings are part of a task's key, and range checks
command.py       how a command ends: its exit code and its messages
devices.py       what depends on the device: what TensorFlow is told, and the checks of a GPU
masking.py       hides passwords and keys in what leaves a process
"""

import os

# Keras takes its backend when it is first imported, in each process for itself. The environment and the keras.json of
# the user may name another one for other work, and the one of the driver does not reach the workers of a cluster.
os.environ["KERAS_BACKEND"] = "tensorflow"
