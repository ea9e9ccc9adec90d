"""The Perceiver against Hugging Face's, an independent implementation in PyTorch, with the same weights.

Skipped unless `torch` and `transformers` are installed; neither is a dependency.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from perceiver import Perceiver, PerceiverConfig

torch = pytest.importorskip("torch")
perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
configuration = pytest.importorskip("transformers.models.perceiver.configuration_perceiver")

_CONFIG = PerceiverConfig(
    image_shape=(6, 5, 1),
    num_classes=7,
    stem="pixels",
    data_dim=None,
    position_encoding="fourier",
    position_combination="concat",
    num_fourier_bands=3,
    num_latents=9,
    latent_dim=16,
    num_iterations=1,
    num_self_attention_blocks=3,
    num_self_attention_repeats=2,
    num_cross_attention_heads=1,
    num_self_attention_heads=4,
    cross_attention_widening_factor=2,
    self_attention_widening_factor=3,
    head="query",
)


@pytest.fixture(scope="module")
def models() -> tuple[Perceiver, Any]:
    """Our model and theirs, with the same random weights."""
    config = configuration.PerceiverConfig(
        num_latents=_CONFIG.num_latents,
        d_latents=_CONFIG.latent_dim,
        d_model=_CONFIG.data_width,
        num_blocks=_CONFIG.num_self_attention_repeats,
        num_self_attends_per_block=_CONFIG.num_self_attention_blocks,
        num_self_attention_heads=_CONFIG.num_self_attention_heads,
        num_cross_attention_heads=_CONFIG.num_cross_attention_heads,
        cross_attention_shape_for_attention="kv",
        cross_attention_widening_factor=_CONFIG.cross_attention_widening_factor,
        self_attention_widening_factor=_CONFIG.self_attention_widening_factor,
        num_labels=_CONFIG.num_classes,
    )
    decoder = perceiver.PerceiverClassificationDecoder(
        config,
        num_channels=config.d_latents,
        trainable_position_encoding_kwargs={"num_channels": config.d_latents, "index_dims": 1},
        use_query_residual=True,
        num_heads=_CONFIG.num_cross_attention_heads,
        widening_factor=_CONFIG.cross_attention_widening_factor,
    )
    theirs = perceiver.PerceiverModel(config, decoder=decoder).eval()
    ours = Perceiver(**asdict(_CONFIG), name="model")
    ours.build()
    random = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(random.normal(size=parameter.shape, scale=0.3)))
    _copy(theirs, ours)
    return ours, theirs


def _copy(theirs: Any, ours: Perceiver) -> None:
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    modules = {
        "model/cross_attend_0": "encoder.cross_attention",
        "model/decoder": "decoder.decoder.decoding_cross_attention",
        **{f"model/self_attend_0_{i}": f"encoder.self_attends.{i}" for i in range(_CONFIG.num_self_attention_blocks)},
    }
    layers = {
        "norm": "attention.self.layernorm1",
        "latents_norm": "attention.self.layernorm1",
        "data_norm": "attention.self.layernorm2",
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/output_projection": "attention.output.dense",
        "mlp_norm": "layernorm",
        "mlp/hidden": "mlp.dense1",
        "mlp/output_projection": "mlp.dense2",
    }
    kinds = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
    names = {
        "model/latents": "embeddings.latents",
        "model/output_query": "decoder.decoder.output_position_encodings.position_embeddings",
        "model/logits/kernel": "decoder.decoder.final_layer.weight",
        "model/logits/bias": "decoder.decoder.final_layer.bias",
    }
    for our_block, their_block in modules.items():
        for our_layer, their_layer in layers.items():
            for our_kind, their_kind in kinds.items():
                names[f"{our_block}/{our_layer}/{our_kind}"] = f"{their_block}.{their_layer}.{their_kind}"
    copied = {names[weight.path] for weight in ours.weights}
    assert copied == state.keys()
    for weight in ours.weights:
        value = state[names[weight.path]]
        weight.assign(value.T if weight.path.endswith("kernel") else value)


def test_same_number_of_weights(models: tuple[Perceiver, Any]) -> None:
    ours, theirs = models
    assert ours.count_params() == sum(parameter.numel() for parameter in theirs.parameters())


def test_fourier_features(models: tuple[Perceiver, Any]) -> None:
    encoding = perceiver.PerceiverFourierPositionEncoding(
        num_bands=3, max_resolution=(6, 5), concat_pos=True, sine_only=False
    )
    theirs = encoding(index_dims=(6, 5), batch_size=1, device="cpu", dtype=torch.float32)
    data = models[0].data_array(np.zeros((1, 6, 5, 1), "uint8"))
    np.testing.assert_allclose(data[0, :, 1:], theirs[0].numpy(), atol=1e-6)


def test_blocks_and_the_whole_model(models: tuple[Perceiver, Any]) -> None:
    ours, theirs = models
    images = np.random.default_rng(1).integers(0, 256, (4, 6, 5, 1)).astype("uint8")
    data = np.asarray(ours.data_array(images))
    latents = np.random.default_rng(2).normal(size=(4, 9, 16)).astype("float32")
    with torch.no_grad():
        cross = theirs.encoder.cross_attention(torch.tensor(latents), inputs=torch.tensor(data))[0]
        attend = theirs.encoder.self_attends[1](torch.tensor(latents))[0]
        outputs = theirs(torch.tensor(data))
    np.testing.assert_allclose(ours.cross_attends[0](latents, data), cross, atol=1e-5)
    np.testing.assert_allclose(ours.latent_transformers[0][1](latents), attend, atol=1e-5)
    np.testing.assert_allclose(ours.encode(data)[0], outputs.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(ours(images), outputs.logits, atol=1e-5)
