"""diffusers' UNets, autoencoders and transformers, made tiny by hand where their defaults cannot be shrunk by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hzo_lab.zoo.case import Case, NotBuiltError
from hzo_lab.zoo.imports import library

BATCH, SIDE, WORDS, TEXT = 2, 8, 5, 16
Inputs = Callable[[Callable[..., Tensor]], dict[str, Any]]


def _image(normal: Callable[..., Tensor], channels: int = 4, side: int = SIDE) -> Tensor:
    return normal(BATCH, channels, side, side)


def _denoiser(channels: int = 4, side: int = SIDE, text: int | None = TEXT, name: str = "sample") -> Inputs:
    def inputs(normal: Callable[..., Tensor]) -> dict[str, Any]:
        given: dict[str, Any] = {name: _image(normal, channels, side), "timestep": torch.tensor([3, 7])}
        if text is not None:
            given["encoder_hidden_states"] = normal(BATCH, WORDS, text)
        return given

    return inputs


def _video(
    channels: int = 4, frames: int = 4, side: int = SIDE, text: int | None = TEXT, name: str = "sample"
) -> Inputs:
    def inputs(normal: Callable[..., Tensor]) -> dict[str, Any]:
        given: dict[str, Any] = {name: normal(BATCH, channels, frames, side, side), "timestep": torch.tensor([3, 7])}
        if text is not None:
            given["encoder_hidden_states"] = normal(BATCH, WORDS, text)
        return given

    return inputs


def _autoencoder(channels: int = 3, side: int = 16, frames: int | None = None) -> Inputs:
    def inputs(normal: Callable[..., Tensor]) -> dict[str, Any]:
        shape = (1, channels, side, side) if frames is None else (1, channels, frames, side, side)
        return {"sample": normal(*shape)}

    return inputs


_BLOCKS2 = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_UNET2D = {
    **_BLOCKS2,
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
_CROSS = {
    **_BLOCKS2,
    "sample_size": SIDE,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 4,
}
_VAE = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def _pooled(**extra: Any) -> Inputs:
    def inputs(normal: Callable[..., Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": _image(normal),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
            "pooled_projections": normal(BATCH, TEXT),
            **extra,
        }

    return inputs


def _flux(normal: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": normal(BATCH, 16, 4),
        "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
        "pooled_projections": normal(BATCH, TEXT),
        "timestep": normal(BATCH).abs(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(WORDS, 3),
    }


def _sdxl(normal: Callable[..., Tensor]) -> dict[str, Any]:
    conditions = {"text_embeds": normal(BATCH, TEXT), "time_ids": torch.ones(BATCH, 6)}
    return {**_denoiser()(normal), "added_cond_kwargs": conditions}


def _labelled(normal: Callable[..., Tensor]) -> dict[str, Any]:
    return {"hidden_states": _image(normal), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}


def _controlled(normal: Callable[..., Tensor]) -> dict[str, Any]:
    return {**_denoiser()(normal), "controlnet_cond": normal(BATCH, 3, 8 * SIDE, 8 * SIDE)}


def _masked(**names: tuple[int, ...]) -> Inputs:
    def inputs(normal: Callable[..., Tensor]) -> dict[str, Any]:
        return {k: normal(*v) for k, v in names.items()} | {"timestep": torch.tensor([3, 7])}

    return inputs


# family -> (class, arguments, inputs)
_FAMILIES: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "unet/2d": ("UNet2DModel", _UNET2D, _denoiser(text=None)),
    "unet/2d-scale-shift": ("UNet2DModel", {**_UNET2D, "resnet_time_scale_shift": "scale_shift"}, _denoiser(text=None)),
    "unet/2d-resnet-sampling": (
        "UNet2DModel",
        {**_UNET2D, "downsample_type": "resnet", "upsample_type": "resnet"},
        _denoiser(text=None),
    ),
    "unet/2d-skip": (
        "UNet2DModel",
        {
            **_UNET2D,
            "block_out_channels": (32, 32),
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "time_embedding_type": "fourier",
            "norm_num_groups": 8,
            "in_channels": 3,
            "out_channels": 3,
        },
        _denoiser(3, text=None),
    ),
    "unet/1d": (
        "UNet1DModel",
        {
            "block_out_channels": (32, 32, 64),
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        },
        lambda normal: {"sample": normal(BATCH, 2, 64), "timestep": torch.tensor([3, 7])},
    ),
    "unet/condition": ("UNet2DConditionModel", _CROSS, _denoiser()),
    "unet/condition-linear": (
        "UNet2DConditionModel",
        {**_CROSS, "use_linear_projection": True, "only_cross_attention": True},
        _denoiser(),
    ),
    "unet/condition-simple": (
        "UNet2DConditionModel",
        {
            **_CROSS,
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        },
        _denoiser(),
    ),
    "unet/sdxl": (
        "UNet2DConditionModel",
        {
            **_CROSS,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT + 48,
            "transformer_layers_per_block": (1, 2),
        },
        _sdxl,
    ),
    "unet/3d": (
        "UNet3DConditionModel",
        {
            **_CROSS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        _video(),
    ),
    "unet/motion": (
        "UNetMotionModel",
        {
            **{k: v for k, v in _CROSS.items() if k != "attention_head_dim"},
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "temporal_transformer_layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "motion_max_seq_length": 8,
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "use_motion_mid_block": False,
        },
        _video(),
    ),
    "unet/spatio-temporal": (
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": SIDE,
            "in_channels": 4,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "layers_per_block": 1,
            "cross_attention_dim": TEXT,
            "num_attention_heads": 2,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        lambda normal: {
            "sample": normal(BATCH, 2, 4, SIDE, SIDE),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": normal(BATCH, 1, TEXT),
            "added_time_ids": torch.ones(BATCH, 3),
        },
    ),
    "unet/kandinsky3": (
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 32,
            "groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32, 32, 32),
            "cross_attention_dim": TEXT,
            "encoder_hid_dim": TEXT,
        },
        lambda normal: {**_denoiser()(normal), "encoder_attention_mask": torch.ones(BATCH, WORDS)},
    ),
    "unet/uvit": (
        "UVit2DModel",
        {
            "hidden_size": 16,
            "cond_embed_dim": TEXT,
            "encoder_hidden_size": TEXT,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 32,
            "codebook_size": 31,
            "in_channels": 16,
            "block_out_channels": 16,
            "intermediate_size": 32,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "block_num_heads": 2,
            "sample_size": SIDE,
        },
        lambda normal: {
            "input_ids": torch.arange(BATCH * 64).reshape(BATCH, SIDE, SIDE) % 31,
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
            "pooled_text_emb": normal(BATCH, TEXT),
            "micro_conds": torch.ones(BATCH, 5),
        },
    ),
    "unet/stable-cascade": (
        "StableCascadeUNet",
        {
            "block_out_channels": (32, 32),
            "num_attention_heads": (2, 2),
            "conditioning_dim": 32,
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            "clip_text_pooled_in_channels": TEXT,
            "clip_text_in_channels": TEXT,
            "clip_image_in_channels": TEXT,
            "timestep_ratio_embedding_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "switch_level": (False,),
        },
        lambda normal: {
            "sample": _image(normal),
            "timestep_ratio": torch.tensor([0.3, 0.6]),
            "clip_text_pooled": normal(BATCH, 1, TEXT),
        },
    ),
    "controlnet/sd": (
        "ControlNetModel",
        {k: v for k, v in _CROSS.items() if k not in ("sample_size", "up_block_types")}
        | {"conditioning_embedding_out_channels": (8, 16)},
        lambda normal: {**_denoiser()(normal), "controlnet_cond": normal(BATCH, 3, 2 * SIDE, 2 * SIDE)},
    ),
    "adapter/t2i": (
        "T2IAdapter",
        {"channels": (16, 32), "num_res_blocks": 1, "downscale_factor": 2},
        lambda normal: {"x": normal(BATCH, 3, 16, 16)},
    ),
    "vae/kl": ("AutoencoderKL", _VAE, _autoencoder()),
    "vae/kl-temporal": (
        "AutoencoderKLTemporalDecoder",
        {k: v for k, v in _VAE.items() if k not in ("norm_num_groups", "up_block_types")}
        | {"block_out_channels": (32, 32)},
        lambda normal: {"sample": normal(2, 3, 16, 16), "num_frames": 2},
    ),
    "vae/asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            **{k: v for k, v in _VAE.items() if k != "block_out_channels"},
            "down_block_out_channels": (16, 32),
            "up_block_out_channels": (16, 32),
            "layers_per_down_block": 1,
            "layers_per_up_block": 1,
        },
        lambda normal: {"sample": normal(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)},
    ),
    "vae/tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        _autoencoder(),
    ),
    "vae/vq": ("VQModel", {**_VAE, "latent_channels": 3, "num_vq_embeddings": 16}, _autoencoder()),
    "vae/dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "attention_head_dim": 2,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "stride_conv",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
        },
        _autoencoder(),
    ),
    "vae/oobleck": (
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 12,
            "decoder_channels": 12,
            "decoder_input_channels": 6,
            "audio_channels": 2,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "sampling_rate": 1000,
        },
        lambda normal: {"sample": normal(1, 2, 128)},
    ),
    "vae/cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
        },
        _autoencoder(frames=5),
    ),
    "vae/mochi": (
        "AutoencoderKLMochi",
        {
            "in_channels": 15,
            "out_channels": 3,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1, 1),
            "act_fn": "silu",
            "scaling_factor": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        _autoencoder(frames=7),
    ),
    "vae/ltx": (
        "AutoencoderKLLTXVideo",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "patch_size": 1,
            "patch_size_t": 1,
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
        },
        _autoencoder(frames=9),
    ),
    "vae/hunyuan-video": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "mid_block_add_attention": True,
        },
        _autoencoder(frames=5),
    ),
    "vae/wan": (
        "AutoencoderKLWan",
        {
            "base_dim": 4,
            "z_dim": 16,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
        },
        _autoencoder(frames=5),
    ),
    "vae/magvit": (
        "AutoencoderKLMagvit",
        {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,
            "down_block_types": (
                "SpatialDownBlock3D",
                "SpatialTemporalDownBlock3D",
                "SpatialTemporalDownBlock3D",
                "SpatialTemporalDownBlock3D",
            ),
            "up_block_types": (
                "SpatialUpBlock3D",
                "SpatialTemporalUpBlock3D",
                "SpatialTemporalUpBlock3D",
                "SpatialTemporalUpBlock3D",
            ),
            "spatial_group_norm": False,
        },
        _autoencoder(frames=5),
    ),
    "transformer/dit": (
        "DiTTransformer2DModel",
        {**_DIT, "in_channels": 4, "out_channels": 4, "sample_size": SIDE, "patch_size": 2, "num_embeds_ada_norm": 8},
        _labelled,
    ),
    "transformer/2d": (
        "Transformer2DModel",
        {**_DIT, "in_channels": 16, "cross_attention_dim": TEXT, "norm_num_groups": 4},
        lambda normal: {"hidden_states": _image(normal, 16), "encoder_hidden_states": normal(BATCH, WORDS, TEXT)},
    ),
    "transformer/pixart": (
        "PixArtTransformer2DModel",
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": SIDE,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": TEXT,
            "use_additional_conditions": False,
        },
        lambda normal: {
            **_denoiser(name="hidden_states")(normal),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "transformer/lumina": (
        "LuminaNextDiT2DModel",
        {
            "sample_size": SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": TEXT,
        },
        lambda normal: {
            "hidden_states": _image(normal),
            "timestep": torch.tensor([0.3, 0.7]),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
            "encoder_mask": torch.ones(BATCH, WORDS),
            "image_rotary_emb": torch.ones(384, 384, 4, dtype=torch.complex64),
            "cross_attention_kwargs": {},
        },
    ),
    "transformer/sd3": (
        "SD3Transformer2DModel",
        {
            **_DIT,
            "sample_size": SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "pooled_projection_dim": TEXT,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        _pooled(),
    ),
    "transformer/flux": (
        "FluxTransformer2DModel",
        {
            **_DIT,
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 4,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "axes_dims_rope": [2, 2, 4],
        },
        _flux,
    ),
    "transformer/aura-flow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        _denoiser(name="hidden_states"),
    ),
    "transformer/sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": TEXT,
            "sample_size": SIDE,
            "patch_size": 1,
            "mlp_ratio": 2.5,
        },
        _denoiser(name="hidden_states"),
    ),
    "transformer/stable-audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 4,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 4,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
            "num_attention_heads": 2,
        },
        lambda normal: {
            "hidden_states": normal(BATCH, 4, 16),
            "timestep": torch.tensor([3.0, 7.0]),
            "encoder_hidden_states": normal(BATCH, WORDS, 4),
            "global_hidden_states": normal(BATCH, 1, 8),
            "rotary_embedding": (torch.ones(17, 4), torch.zeros(17, 4)),
        },
    ),
    "transformer/cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": TEXT,
            "sample_width": SIDE,
            "sample_height": SIDE,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": WORDS,
        },
        lambda normal: {
            "hidden_states": normal(BATCH, 2, 4, SIDE, SIDE),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
        },
    ),
    "transformer/latte": (
        "LatteTransformer3DModel",
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": SIDE,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": TEXT,
            "video_length": 2,
            "norm_elementwise_affine": False,
        },
        _video(frames=2, name="hidden_states"),
    ),
    "transformer/mochi": (
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": TEXT,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 16,
        },
        lambda normal: {
            **_video(frames=2, name="hidden_states")(normal),
            "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        },
    ),
    "transformer/ltx": (
        "LTXVideoTransformer3DModel",
        {**_DIT, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": TEXT},
        lambda normal: {
            "hidden_states": normal(BATCH, 32, 8),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
            "timestep": torch.tensor([3, 7]),
            "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "transformer/wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        _video(frames=2, name="hidden_states"),
    ),
    "transformer/hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda normal: {
            **_video(frames=1, side=4, name="hidden_states")(normal),
            "encoder_attention_mask": torch.ones(BATCH, WORDS),
            "pooled_projections": normal(BATCH, TEXT),
            "guidance": torch.tensor([3, 5]),
        },
    ),
    "transformer/allegro": (
        "AllegroTransformer3DModel",
        {
            **_DIT,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
            "sample_width": SIDE,
            "sample_height": SIDE,
            "sample_frames": 8,
        },
        lambda normal: {**_video(frames=2, name="hidden_states")(normal), "image_rotary_emb": None},
    ),
    "transformer/cogview3": (
        "CogView3PlusTransformer2DModel",
        {
            **_DIT,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": SIDE,
        },
        lambda normal: {
            **_denoiser(name="hidden_states")(normal),
            **{k: torch.tensor([[8.0, 8.0]] * BATCH) for k in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "transformer/cogview4": (
        "CogView4Transformer2DModel",
        {
            **_DIT,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (16, 16),
        },
        lambda normal: {
            **_denoiser(name="hidden_states")(normal),
            **{k: torch.tensor([[8.0, 8.0]] * BATCH) for k in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "transformer/omnigen": (
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0, 1.0], "short_factor": [1.0, 1.0]},
        },
        lambda normal: {
            "hidden_states": _image(normal),
            "timestep": torch.tensor([0.3, 0.7]),
            "input_ids": torch.arange(20).reshape(2, 10) + 1,
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, 27, 27),
            "position_ids": torch.arange(27).expand(2, 27),
        },
    ),
    "transformer/qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda normal: {
            "hidden_states": normal(BATCH, 16, 16),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
            "timestep": torch.tensor([0.3, 0.7]),
            "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.long),
            "img_shapes": [(1, 4, 4)] * BATCH,
        },
    ),
    "transformer/hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [32, 16],
            "text_emb_dim": 64,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
        },
        lambda normal: {
            "hidden_states": _image(normal),
            "timesteps": torch.tensor([3, 7]),
            "encoder_hidden_states_t5": normal(BATCH, WORDS, 32),
            "encoder_hidden_states_llama3": normal(2, BATCH, WORDS, 16),
            "pooled_embeds": normal(BATCH, 64),
        },
    ),
    "transformer/chroma": (
        "ChromaTransformer2DModel",
        {
            **_DIT,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "in_channels": 4,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda normal: {k: v for k, v in _flux(normal).items() if k != "pooled_projections"},
    ),
    "transformer/prior": (
        "PriorTransformer",
        {**_DIT, "embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4},
        lambda normal: {
            "hidden_states": normal(BATCH, 8),
            "timestep": torch.tensor([3, 7]),
            "proj_embedding": normal(BATCH, 8),
            "encoder_hidden_states": normal(BATCH, 7, 8),
        },
    ),
    "transformer/consisid": (
        "ConsisIDTransformer3DModel",
        {
            **_DIT,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": TEXT,
            "sample_width": SIDE,
            "sample_height": SIDE,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": WORDS,
            "is_train_face": False,
        },
        lambda normal: {
            "hidden_states": normal(BATCH, 2, 4, SIDE, SIDE),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": normal(BATCH, WORDS, TEXT),
        },
    ),
    "transformer/easy-animate": (
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 8,
            "sample_width": 8,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "text_embed_dim_t5": None,
        },
        lambda normal: {**_video(frames=2, name="hidden_states")(normal), "timestep_cond": None},
    ),
    "transformer/spectrogram": (
        "T5FilmDecoder",
        {"input_dims": 8, "targets_length": 16, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda normal: {
            "encodings_and_masks": [(normal(BATCH, WORDS, 16), torch.ones(BATCH, WORDS))],
            "decoder_input_tokens": normal(BATCH, 16, 8),
            "decoder_noise_time": torch.tensor([0.3, 0.7]),
        },
    ),
}


def preload() -> None:
    diffusers = library("diffusers")
    for name in ("AutoencoderKL", "UNet2DConditionModel"):
        getattr(diffusers, name)


def families() -> list[str]:
    return list(_FAMILIES)


def build(name: str, dtype: torch.dtype) -> Case:
    diffusers = library("diffusers")

    class_name, options, make = _FAMILIES[name]
    cls = getattr(diffusers, class_name, None)
    if cls is None:
        raise NotBuiltError(f"diffusers {diffusers.__version__} has no {class_name}")
    torch.manual_seed(0)
    model: nn.Module = cls(**options).train().to(dtype)
    draw = torch.Generator().manual_seed(1)
    given = make(lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype))
    given = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and "rotary" not in k else v
        for k, v in given.items()
    }
    if "return_dict" in inspect.signature(model.forward).parameters:
        given["return_dict"] = False
    if class_name.startswith("Autoencoder") and "sample_posterior" in inspect.signature(model.forward).parameters:
        given["sample_posterior"] = True

    def call() -> Tensor:
        out: Any = model(**given)
        while isinstance(out, (tuple, list)):
            out = out[0]
        loss: Tensor = (out - 0.1).square().mean()
        return loss

    call()
    return Case(model, call, f"{class_name}, {sum(p.numel() for p in model.parameters()):,} parameters")
