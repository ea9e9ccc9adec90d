"""One worker's training, without Ray: batches, optimizer, `fit`, checkpoints and throughput.

config.py             `TrainingConfig`
worker.py             `Worker`: rank, reports, stop request; imports no TensorFlow
fit.py                trains a model as one worker
kept_models.py        models that are used again by the next training, since tracing takes seconds
own_model.py          `OwnModel`: a Keras model of one's own in the place of a Perceiver; imports no TensorFlow
builders.py           what makes a builder of models another one: its file, its place there, its package
models.py             builds either
outputs.py            whether the outputs of a model of one's own can be logits
macs.py               counts multiply-accumulates
recorder.py           the callback that reports epochs and writes checkpoints
parts.py              divides a batch among the threads of a worker
batches.py            which rows a worker trains on at which step
augmentation.py       random crops, flips and zooms, CutMix
input_pipeline.py     `tf.data` datasets of the batches
optimization.py       loss, metrics, optimizer and learning-rate schedule
muon.py               the Muon optimizer, for convolutions too
checkpoint.py         what a training needs to continue, as files
checkpoint_store.py   commits checkpoints to storage, and verifies them when they are read
throughput.py         measures a step: images/s, waiting time, share of the matmul peak
"""
