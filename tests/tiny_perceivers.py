"""Small configs that between them use every switch of `PerceiverConfig`."""

from dataclasses import replace

from perceiver import PerceiverConfig

BASE = PerceiverConfig(
    image_shape=(8, 8, 3),
    num_classes=5,
    stem="patches",
    patch_size=2,
    data_dim=8,
    num_latents=4,
    latent_dim=12,
    num_iterations=2,
    num_self_attention_blocks=1,
    num_self_attention_heads=2,
)
TINY = {
    "patches": BASE,
    "pixels": replace(
        BASE,
        image_shape=(6, 4, 1),
        stem="pixels",
        data_dim=None,
        position_encoding="fourier",
        position_combination="concat",
        num_fourier_bands=3,
        num_iterations=1,
        num_self_attention_repeats=2,
        head="query",
    ),
    "conv": replace(
        BASE,
        stem="conv",
        conv_channels=6,
        position_combination="concat",
        learned_position_dim=4,
        num_cross_attention_heads=2,
        share_first_cross_attention=True,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=3,
        use_final_layer_norm=True,
        head_hidden_dim=7,
        approximate_gelu=True,
    ),
    "published": replace(
        BASE,
        resize_to=16,
        data_dim=12,
        share_first_cross_attention=True,
        cross_attention_scale="learned",
        cross_attention_output_projection=False,
        residual="normalised",
    ),
    "unshared": replace(
        BASE,
        position_encoding="fourier",
        num_fourier_bands=2,
        include_positions=False,
        share_weights=False,
        input_mlp_widening_factor=2,
        cross_attention_qk_dim=6,
        self_attention_qk_dim=4,
        self_attention_v_dim=8,
    ),
    "frugal": replace(
        BASE,
        position_encoding="none",
        share_first_latent_transformer=False,
        cross_attention_v_dim=10,
        attention_chunk_size=5,
        remat=True,
    ),
}
