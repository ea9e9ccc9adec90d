"""The closed forms of cost.py against built models and TensorFlow's profiler."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from tiny_perceivers import BASE, TINY

from perceiver import Perceiver, PerceiverConfig, presets
from perceiver.cost import activation_bytes_per_image, macs_per_image, parameter_count

CONFIGS = {**TINY, "quickstart": presets.quickstart(), "cifar100": presets.cifar100()}
CONFIGS["odd sides"] = replace(
    TINY["conv"], image_shape=(13, 9, 1), num_conv_layers=3, conv_channels=8, conv_channel_growth=2, conv_pool_size=3
)

CONFIGS["a prior on a large grid"] = replace(
    TINY["conv"], image_shape=(20, 36, 3), stem="patches", patch_size=2, cross_attention_prior=True
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters(config: PerceiverConfig) -> None:
    model = Perceiver(**asdict(config))
    model.build()
    assert parameter_count(config) == model.count_params()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_macs_equal_the_profiler(config: PerceiverConfig) -> None:
    model = Perceiver(**asdict(config))
    function = tf.function(model).get_concrete_function(tf.TensorSpec((1, *config.image_shape), tf.uint8))
    graph = convert_variables_to_constants_v2(function).graph
    with graph.as_default():
        options = tf.compat.v1.profiler.ProfileOptionBuilder(
            tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
        )
        options.with_accounted_types(["MatMul", "BatchMatMulV2", "Conv2D", "Einsum"]).with_empty_output()
        profile = tf.compat.v1.profiler.profile(graph, cmd="op", options=options.build())
    width = config.image_shape[2] * (config.patch_size**2 if config.stem == "patches" else 1)
    once_a_batch = width**2 * config.data_dim if config.patch_whitening and config.data_dim else 0
    assert profile.total_float_ops == 2 * (macs_per_image(config) + once_a_batch)


def test_keys_and_values_of_a_shared_cross_attend_are_computed_once() -> None:
    shared = replace(BASE, share_first_cross_attention=True)
    one, two, three = (macs_per_image(replace(shared, num_iterations=n)) for n in (1, 2, 3))
    assert three - two == two - one
    unshared = macs_per_image(replace(shared, num_iterations=3, share_weights=False))
    assert unshared - three == 2 * shared.num_inputs * shared.data_width * (shared.cross_qk_dim + shared.cross_v_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"remat": True},
        {"stem": "pixels"},
        {"num_conv_residuals": 2, "cross_attention_prior": True},
        {"stem": "patches", "input_mlp_widening_factor": 2},
        {"stem": "pixels", "attention_chunk_size": 256, "num_latents": 128},
    ],
    ids=str,
)
def test_activation_bytes_are_close_to_what_the_backward_pass_reads(changes: dict[str, Any]) -> None:
    config = replace(presets.cifar100(), **changes)
    model = Perceiver(**asdict(config))
    model.build()
    num_forward_operations = []

    @tf.function
    def step(images: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images, training=True))
        num_forward_operations.append(len(tf.compat.v1.get_default_graph().get_operations()))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    batch = 5  # not the side of a kernel
    graph = step.get_concrete_function(tf.TensorSpec((batch, *config.image_shape), tf.uint8)).graph
    operations = graph.get_operations()
    forward = set(operations[: num_forward_operations[-1]])
    kept = set()
    for operation in operations[len(forward) :]:
        for tensor in operation.inputs:
            while tensor.op.type in ("Reshape", "Identity", "IdentityN", "ExpandDims", "Squeeze"):  # no copies
                tensor = tensor.op.inputs[0]
            if tensor.op in forward and tensor.dtype == tf.float32 and tensor.shape[:1] == (batch,):
                kept.add(tensor.ref())
    measured = 4 * sum(tensor.deref().shape.num_elements() for tensor in kept) / batch
    assert 0.6 < activation_bytes_per_image(config) / measured < 1.4
