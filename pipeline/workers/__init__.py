"""Ray Train around `pipeline.training.fit`: data-parallel workers that survive lost processes and hosts.

train.py                starts the workers, and what each of them runs
environment.py          how their processes allocate memory, and what they import ahead
streaming.py            which splits the workers stream, and the checks before that
in_process.py           the same training in the calling process
tensorflow_backend.py   tells the workers each other's addresses
failures.py             what a person is told of a training that has failed
reserve.py              processes that have imported TensorFlow, for workers that have to be started again
port_filter.py          closes TensorFlow's port to everybody else
ray_internals.py        the private names of Ray that this project relies on
"""
