"""Parameters, multiply-accumulates and activation bytes of a config in closed form, without building the model.

Tests compare parameters with the built model and multiply-accumulates with TensorFlow's profiler; both are exact.
"""

from itertools import pairwise

from perceiver.config import PerceiverConfig, prior_width


def parameter_count(config: PerceiverConfig) -> int:
    """Number of weights of the model; all are trainable."""
    c = config
    count = _stem_parameters(c) + c.num_latents * c.latent_dim
    if c.position_encoding == "learned":
        count += c.num_inputs * c.position_dim
    elif c.position_encoding == "fourier" and c.position_combination == "add":
        count += _dense(c.position_dim, c.projected_dim)
    if c.input_mlp_widening_factor:
        count += _mlp_parameters(c.data_width, c.input_mlp_widening_factor)
    cross = _attention_parameters(c.latent_dim, c.data_width, c.cross_qk_dim, c.cross_v_dim)
    if not c.cross_attention_output_projection:
        cross -= _dense(c.cross_v_dim, c.latent_dim)
    cross += c.cross_attention_scale == "learned"
    cross += 4 * c.num_cross_attention_heads * c.num_latents * c.cross_attention_prior
    cross += 2 * c.latent_dim + 2 * c.data_width + _mlp_parameters(c.latent_dim, c.cross_attention_widening_factor)
    block = _attention_parameters(c.latent_dim, c.latent_dim, c.self_qk_dim, c.self_v_dim)
    block += 2 * c.latent_dim + _mlp_parameters(c.latent_dim, c.self_attention_widening_factor)
    count += cross * len(set(c.cross_attend_order))
    count += block * c.num_self_attention_blocks * len(set(c.latent_transformer_order))
    count += 2 * c.latent_dim * c.use_final_layer_norm
    if c.head == "query":
        count += c.latent_dim + _attention_parameters(*[c.latent_dim] * 4)
        count += 4 * c.latent_dim + _mlp_parameters(c.latent_dim, c.cross_attention_widening_factor)
    width = c.latent_dim
    if c.head_hidden_dim is not None:
        count += _dense(width, c.head_hidden_dim)
        width = c.head_hidden_dim
    return count + _dense(width, c.num_classes)


def macs_per_image(config: PerceiverConfig) -> int:
    """Multiply-accumulates of all matrix products and convolutions in the forward pass of one image.

    FLOPs are usually counted as twice this number, and a training step takes about three times as many. Keys and values
    of a cross-attend count once, however many iterations share it. The queries of the first cross-attend, which are the
    same for all images of a batch, and the projection of Fourier features count in full. The product of whitening and
    projection, which is computed once a batch, does not count.
    """
    c = config
    macs = _stem_macs(c)
    if c.position_encoding == "fourier" and c.position_combination == "add":
        macs += c.num_inputs * c.position_dim * c.projected_dim
    macs += _mlp_macs(c.num_inputs, c.data_width, c.input_mlp_widening_factor)
    macs += len(set(c.cross_attend_order)) * c.num_inputs * c.data_width * (c.cross_qk_dim + c.cross_v_dim)
    output = c.cross_attention_output_projection
    cross = _queries_macs(c.num_latents, c.latent_dim, c.num_inputs, c.cross_qk_dim, c.cross_v_dim, output)
    cross += _mlp_macs(c.num_latents, c.latent_dim, c.cross_attention_widening_factor)
    cross += _prior_width(c) * c.num_latents * c.num_inputs
    block = c.num_latents * c.latent_dim * (c.self_qk_dim + c.self_v_dim)
    block += _queries_macs(c.num_latents, c.latent_dim, c.num_latents, c.self_qk_dim, c.self_v_dim)
    block += _mlp_macs(c.num_latents, c.latent_dim, c.self_attention_widening_factor)
    macs += c.num_iterations * (cross + c.num_self_attention_repeats * c.num_self_attention_blocks * block)
    if c.head == "query":
        macs += 2 * c.num_latents * c.latent_dim**2
        macs += _queries_macs(1, c.latent_dim, c.num_latents, c.latent_dim, c.latent_dim)
        macs += _mlp_macs(1, c.latent_dim, c.cross_attention_widening_factor)
    hidden = c.head_hidden_dim
    return macs + (c.latent_dim * c.num_classes if hidden is None else hidden * (c.latent_dim + c.num_classes))


def activation_bytes_per_image(config: PerceiverConfig) -> int:
    """Estimate of the bytes per image that a training step in float32 keeps from the forward to the backward pass.

    Counts the inputs of every product, LayerNorm, softmax and GELU; with `remat`, only the inputs of the attention and
    the MLPs. Temporary buffers and gradients of the weights are not included.
    """
    c = config
    n, d = c.num_latents, c.latent_dim
    height, width = c.resized_shape
    values = height * width * c.image_shape[2]
    if c.stem == "conv":
        for layer, channels in enumerate(c.conv_widths[1:]):
            # before and after the pooling
            values += channels * (_cells(height, width, layer) + _cells(height, width, layer + 1))
        values += 2 * c.num_conv_residuals * c.num_inputs * c.projected_dim
    values += 2 * c.num_inputs * c.data_width  # data array, normalised data array
    if c.input_mlp_widening_factor:  # the normalised rows; before and after GELU; the sum
        values += 2 * c.num_inputs * (1 + c.input_mlp_widening_factor) * c.data_width
    values += len(set(c.cross_attend_order)) * c.num_inputs * (c.cross_qk_dim + _prior_width(c) + c.cross_v_dim)

    def block(num_inputs: int, heads: int, qk_dim: int, v_dim: int, widening_factor: int, chunk: int | None) -> int:
        kept = 4 * n * d  # the inputs of attention and MLP, before and after their LayerNorms
        if c.remat:
            return kept
        weights = n if chunk is not None else 2 * n * num_inputs  # the log-sum-exp, or logits and weights
        return kept + n * (qk_dim + v_dim) + heads * weights + 2 * n * widening_factor * d

    cross = block(
        c.num_inputs,
        c.num_cross_attention_heads,
        c.cross_qk_dim + _prior_width(c),
        c.cross_v_dim,
        c.cross_attention_widening_factor,
        c.attention_chunk_size,
    )
    attend = block(n, c.num_self_attention_heads, c.self_qk_dim, c.self_v_dim, c.self_attention_widening_factor, None)
    attend += n * (c.self_qk_dim + c.self_v_dim)
    values += c.num_iterations * (cross + c.num_self_attention_repeats * c.num_self_attention_blocks * attend)
    return 4 * values


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _attention_parameters(queries_dim: int, data_dim: int, qk_dim: int, v_dim: int) -> int:
    return _dense(queries_dim, qk_dim) + _dense(data_dim, qk_dim) + _dense(data_dim, v_dim) + _dense(v_dim, queries_dim)


def _mlp_parameters(dim: int, widening_factor: int) -> int:
    return 2 * dim + _dense(dim, widening_factor * dim) + _dense(widening_factor * dim, dim)


def _queries_macs(
    queries: int, queries_dim: int, inputs: int, qk_dim: int, v_dim: int, output_projection: bool = True
) -> int:
    projections = queries_dim * (qk_dim + v_dim * output_projection)
    return queries * (projections + inputs * (qk_dim + v_dim))


def _mlp_macs(rows: int, dim: int, widening_factor: int) -> int:
    return 2 * rows * widening_factor * dim**2


def _cells(height: int, width: int, layers: int) -> int:
    """Cells of the map after so many layers of the `conv` stem."""
    return -(-height // 2**layers) * -(-width // 2**layers)


def _stem_parameters(c: PerceiverConfig) -> int:
    if c.stem == "conv":
        residual = _dense(9 * c.projected_dim, c.projected_dim)
        return sum(_dense(9 * a, b) for a, b in pairwise(c.conv_widths)) + c.num_conv_residuals * residual
    return 0 if c.data_dim is None else _dense(_patch_width(c), c.data_dim)


def _stem_macs(c: PerceiverConfig) -> int:
    if c.stem == "conv":
        height, width = c.resized_shape
        products = [9 * a * b for a, b in pairwise(c.conv_widths)]
        residuals = c.num_conv_residuals * c.num_inputs * 9 * c.projected_dim**2
        return sum(_cells(height, width, layer) * product for layer, product in enumerate(products)) + residuals
    width = _patch_width(c)
    if c.data_dim is None:
        return c.num_inputs * width**2 if c.patch_whitening else 0
    return c.num_inputs * width * c.data_dim


def _prior_width(c: PerceiverConfig) -> int:
    """By how much queries and keys, all heads together, are wider with a `SpatialPrior`."""
    return prior_width(c.grid) * c.num_cross_attention_heads * c.cross_attention_prior


def _patch_width(c: PerceiverConfig) -> int:
    return c.image_shape[2] * (c.patch_size**2 if c.stem == "patches" else 1)
