"""A Perceiver and a training of digits that take seconds: settings of `PerceiverConfig` and `TrainingConfig`."""

from typing import Any

MODEL: dict[str, Any] = {
    "image_shape": (8, 8, 1),
    "num_classes": 10,
    "stem": "patches",
    "patch_size": 2,
    "data_dim": 16,
    "num_latents": 4,
    "latent_dim": 16,
    "num_self_attention_blocks": 1,
    "num_self_attention_heads": 2,
    "use_final_layer_norm": True,
}
TRAIN: dict[str, Any] = {
    "epochs": 3,
    "global_batch_size": 50,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "learning_rate_schedule": "constant",
    "weight_decay": 0.0,
    "random_crop_padding": 1,
    "random_flip": False,
}
