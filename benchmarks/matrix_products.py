"""The matrix products of a Perceiver's training step on their own, whose speed is an upper bound for the step."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import tensorflow as tf

from perceiver import PerceiverConfig


def product_shapes(config: PerceiverConfig, batch_size: int) -> list[tuple[int, int, int, int]]:
    """Shapes of the matrix products in a forward pass, without the head.

    Returns:
        (count, m, k, n) of the products (m, k) x (k, n), where `count` is the size of the batched product, for instance
        over heads. A convolution counts as the product of its patches and filters.
    """
    c, b = config, batch_size
    n, d, m, width = c.num_latents, c.latent_dim, c.num_inputs, c.data_width
    shapes = []
    if c.stem == "conv":
        height, columns = c.resized_shape
        for layer, (before, after) in enumerate(pairwise(c.conv_widths)):
            cells = -(-height // 2**layer) * -(-columns // 2**layer)
            shapes.append((1, b * cells, 9 * before, after))
        shapes += [(1, b * m, 9 * c.conv_widths[-1], c.conv_widths[-1])] * c.num_conv_residuals
    elif c.data_dim is not None:
        patch = c.patch_size**2 if c.stem == "patches" else 1
        shapes.append((1, b * m, c.image_shape[2] * patch, c.data_dim))
    if hidden := c.input_mlp_widening_factor * width:
        shapes += [(1, b * m, width, hidden), (1, b * m, hidden, width)]
    for _ in set(c.cross_attend_order):
        shapes += [(1, b * m, width, c.cross_qk_dim), (1, b * m, width, c.cross_v_dim)]

    def attend(
        inputs: int, heads: int, qk_dim: int, v_dim: int, widening_factor: int, images: int, features: int = 0
    ) -> None:
        shapes.append((1, images * n, d, qk_dim))
        shapes.append((b * heads, n, qk_dim // heads + features, inputs))
        shapes.append((b * heads, n, inputs, v_dim // heads))
        if c.cross_attention_output_projection or inputs == n:
            shapes.append((1, b * n, v_dim, d))
        shapes.append((1, b * n, d, widening_factor * d))
        shapes.append((1, b * n, widening_factor * d, d))

    for iteration in range(c.num_iterations):
        # The queries of the first iteration are the same for all images.
        attend(
            m,
            c.num_cross_attention_heads,
            c.cross_qk_dim,
            c.cross_v_dim,
            c.cross_attention_widening_factor,
            images=1 if iteration == 0 else b,
            features=4 if c.cross_attention_prior else 0,
        )
        for _ in range(c.num_self_attention_repeats * c.num_self_attention_blocks):
            attend(n, c.num_self_attention_heads, c.self_qk_dim, c.self_v_dim, c.self_attention_widening_factor, b)
            shapes += [(1, b * n, d, c.self_qk_dim), (1, b * n, d, c.self_v_dim)]
    return shapes


def products(shapes: Sequence[tuple[int, int, int, int]], dtype: str) -> Callable[[], object]:
    """A function that runs the products of `shapes`, and with more than one shape also those of their gradients."""
    distinct = Counter(shapes)
    arrays = {
        shape: (
            tf.cast(tf.random.normal((shape[0], shape[1], shape[2])), dtype),
            tf.cast(tf.random.normal((shape[0], shape[2], shape[3])), dtype),
            tf.cast(tf.random.normal((shape[0], shape[1], shape[3])), dtype),
        )
        for shape in distinct
    }

    def flat(x: tf.Tensor) -> tf.Tensor:
        return x[0] if x.shape[0] == 1 else x

    # One call per product: within one graph, TensorFlow would merge equal products.
    @tf.function(autograph=False)
    def product(a: tf.Tensor, b: tf.Tensor, of_first: bool, of_second: bool) -> tf.Tensor:
        return tf.matmul(a, b, transpose_a=of_first, transpose_b=of_second)

    def run() -> None:
        for shape, count in distinct.items():
            a, b, c = map(flat, arrays[shape])
            for _ in range(count):
                product(a, b, False, False)
                if len(distinct) > 1:
                    product(c, b, False, True)
                    product(a, c, True, False)

    return run
