"""The studies of ablations.py: a base configuration each, and the variants that change some of its settings."""

from dataclasses import dataclass, replace
from typing import Any

from pipeline.settings.config import PipelineConfig
from pipeline.settings.presets import PRESETS
from pipeline.storage import sha256_of_file

Changes = dict[str, Any]
# 16 bands give 66 features. With 126 channels the data array is as wide as the latents, which four heads divide.
FOURIER_POSITIONS: Changes = {
    "model.position_encoding": "fourier",
    "model.position_combination": "concat",
    "model.data_dim": 126,
}


@dataclass(frozen=True)
class Study:
    """A base configuration and its variants.

    Attributes:
        preset: Name of the pipeline preset that `base` changes.
        base: Settings that all variants share, by name: `model.num_latents`, `train.optimizer`.
        variants: Name of each variant, and the settings that it changes in addition to `base`.
    """

    preset: str
    base: Changes
    variants: dict[str, Changes]


STUDIES = {
    "cifar100": Study(
        "cifar100",
        {},
        {
            "4 latents": {"model.num_latents": 4},
            "16 latents": {"model.num_latents": 16},
            "latents of 128": {"model.latent_dim": 128},
            "latents of 256": {"model.latent_dim": 256},
            "4 iterations of 1 block": {"model.num_iterations": 4, "model.num_self_attention_blocks": 1},
            "1 iteration of 4 blocks": {"model.num_iterations": 1, "model.num_self_attention_blocks": 4},
            "iterations share": {"model.share_weights": True},
            "no spatial prior": {"model.cross_attention_prior": False},
            "4 heads in the cross-attention": {"model.num_cross_attention_heads": 4},
            "32 channels in the stem": {"model.conv_channels": 32},
            "128 channels in the stem": {"model.conv_channels": 128},
            "128 channels of the data array": {"model.data_dim": 128},
            "256 channels of the data array": {"model.data_dim": 256},
            "no convolution at 8 x 8": {"model.num_conv_residuals": 0},
            "2 convolutions at 8 x 8": {"model.num_conv_residuals": 2},
            "pooling does not overlap": {"model.conv_pool_size": 2},
            "4 x 4 patches": {"model.stem": "patches", "model.num_conv_residuals": 0},
            "MLP on the rows": {"model.input_mlp_widening_factor": 2},
            "Fourier positions": FOURIER_POSITIONS,
            "CutMix in a quarter": {"train.cutmix": 0.25},
            "CutMix until 0.8": {"train.cutmix_until": 0.8},
            "flips at random": {"train.alternating_flip": False},
            "5 steps of Muon": {"train.muon_steps": 5},
            "query head": {"model.head": "query"},
            "tanh GELU": {"model.approximate_gelu": True},
            "dropout 0.1": {"model.dropout": 0.1},
            "AdamW": {"train.optimizer": "adamw", "train.learning_rate": 2e-3},
            "AdamW, 1e-3": {"train.optimizer": "adamw", "train.learning_rate": 1e-3},
            "AdamW, 4e-3": {"train.optimizer": "adamw", "train.learning_rate": 4e-3},
            "LAMB": {"train.optimizer": "lamb", "train.learning_rate": 1e-2},
            "LAMB, 5e-3": {"train.optimizer": "lamb", "train.learning_rate": 5e-3},
            "LAMB, 2e-2": {"train.optimizer": "lamb", "train.learning_rate": 2e-2},
            "2e-3": {"train.learning_rate": 2e-3},
            "8e-3": {"train.learning_rate": 8e-3},
            "weight decay 0.05": {"train.weight_decay": 0.05},
            "weight decay 0.4": {"train.weight_decay": 0.4},
            "batch of 64": {"train.global_batch_size": 64},
            "batch of 256": {"train.global_batch_size": 256},
            "no label smoothing": {"train.label_smoothing": 0.0},
            "no CutMix": {"train.cutmix": 0.0},
            "CutMix in all images": {"train.cutmix": 1.0},
            "no crop": {"train.random_crop_padding": 0},
            "no mirroring": {"train.random_flip": False},
            "zoom": {"train.random_zoom": 0.2},
            "float32": {"train.precision": "float32"},
            "XLA": {"train.jit_compile": True},
        },
    ),
    "cifar100_pixels": Study(
        "cifar100_pixels",
        {},
        {
            "no whitening": {"model.patch_whitening": False},
            "no spatial prior": {"model.cross_attention_prior": False},
            "neither": {"model.patch_whitening": False, "model.cross_attention_prior": False},
            "no MLP on the rows": {"model.input_mlp_widening_factor": 0},
            "wider MLP on the rows": {"model.input_mlp_widening_factor": 4},
            "Fourier positions": FOURIER_POSITIONS,
            "2 x 2 patches of 64": {
                "model.patch_size": 2,
                "model.data_dim": 64,
                "model.cross_attention_qk_dim": 192,
            },
            "16 latents": {"model.num_latents": 16},
            "4 heads in the cross-attention": {"model.num_cross_attention_heads": 4},
            "iterations share": {"model.share_weights": True},
            "1 block": {"model.num_self_attention_blocks": 1},
            "CutMix in half of the images": {"train.cutmix": 0.5},
            "no CutMix": {"train.cutmix": 0.0},
            "CutMix until 0.8": {"train.cutmix_until": 0.8},
            "alternating flip": {"train.alternating_flip": True},
            "5 steps of Muon": {"train.muon_steps": 5},
            "2e-3": {"train.learning_rate": 2e-3},
            "8e-3": {"train.learning_rate": 8e-3},
            "weight decay 0.2": {"train.weight_decay": 0.2},
        },
    ),
    # A small Perceiver on pixels, to see whether the trends of the paper's ablations hold at this size.
    "paper": Study(
        "cifar100",
        {
            "model.stem": "pixels",
            "model.conv_channels": 64,
            "model.num_conv_residuals": 0,
            "model.cross_attention_prior": False,
            "model.resize_to": 16,
            "model.data_dim": None,
            "model.position_encoding": "fourier",
            "model.position_combination": "concat",
            "model.num_fourier_bands": 8,
            "model.num_latents": 32,
            "model.latent_dim": 64,
            "model.num_iterations": 4,
            "model.num_self_attention_blocks": 1,
            "model.num_cross_attention_heads": 1,
            "model.num_self_attention_heads": 4,
            "model.share_weights": True,
            "model.share_first_cross_attention": False,
            "train.optimizer": "lamb",
            "train.learning_rate": 8e-3,
            "train.weight_decay": 0.05,
            "train.global_batch_size": 128,
            "train.label_smoothing": 0.0,
            "train.cutmix": 0.0,
            "train.muon_steps": 5,
            "train.alternating_flip": False,
            "train.precision": "mixed_bfloat16",
        },
        {
            "learned positions": {"model.position_encoding": "learned"},
            # As wide as the Fourier features. The variant above is as wide as a pixel.
            "learned positions, 34 wide": {"model.position_encoding": "learned", "model.learned_position_dim": 34},
            "no positions": {"model.position_encoding": "none"},
            "iterations do not share": {"model.share_weights": False},
            "the first cross-attend shares too": {"model.share_first_cross_attention": True},
            "1 iteration": {"model.num_iterations": 1},
            "2 iterations": {"model.num_iterations": 2},
            "8 iterations": {"model.num_iterations": 8},
            "8 latents": {"model.num_latents": 8},
            "16 latents": {"model.num_latents": 16},
            "64 latents": {"model.num_latents": 64},
        },
    ),
    "digits": Study(
        "quickstart",
        {},
        {
            "2 x 2 patches": {"model.stem": "patches", "model.patch_size": 2},
            "pixels": {"model.stem": "pixels"},
            "16 latents": {"model.num_latents": 16},
        },
    ),
}


def configure(study: Study, changes: Changes, archive: str | None) -> PipelineConfig:
    """The configuration of a variant.

    Args:
        study: The study, whose preset and base the variant changes.
        changes: Settings of the variant by name; empty for the base.
        archive: Path of the CIFAR-100 archive; not used by a study on another data set.

    Raises:
        ValueError: if the study needs an archive and `archive` is None.
    """
    config = PRESETS[study.preset]()
    sections: dict[str, Changes] = {"model": {}, "train": {}}
    for name, value in (study.base | changes).items():
        section, _, field = name.partition(".")
        sections[section][field] = value
    config = replace(
        config,
        model=replace(config.model, **sections["model"]),
        train=replace(config.train, num_workers=1, **sections["train"]),
    )
    if config.data.source != "cifar100":
        return config
    if archive is None:
        raise ValueError("this study needs --archive")
    return replace(config, data=replace(config.data, archive=archive, sha256=sha256_of_file(archive)))
