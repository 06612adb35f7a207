"""What the general rules cannot know of single model types of transformers.

``default``: arguments without which the default configuration cannot be made; ``keep``: fields that stay as they are;
``set``: fields after shrinking, dotted into sub-configurations; ``inputs``: a function of (configuration, draws, head)
that gives further arguments of the call.
"""

from __future__ import annotations

from typing import Any

import torch

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_GATES = {"keep": ("conv_kernel",), "set": {"vocab_size": 32}}


def _series(config: Any, draw: Any, _: str) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": draw.normal(2, past).abs(),
        "past_time_features": draw.normal(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": draw.normal(2, config.prediction_length).abs(),
        "future_time_features": draw.normal(2, config.prediction_length, config.num_time_features),
    }


def _patched_series(config: Any, draw: Any, _: str) -> dict[str, Any]:
    return {"past_values": draw.normal(2, config.context_length, config.num_input_channels)}


def _naflex(config: Any, draw: Any, _: str) -> dict[str, Any]:
    part = config.vision_config if hasattr(config, "vision_config") else config
    return {
        "pixel_values": draw.normal(2, 16, part.num_channels * part.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }


def _no_padding(*_: Any) -> dict[str, Any]:
    """Rows of attention that see nothing but padding have NaN for a gradient, by backpropagation too."""
    return {"attention_mask": None}


def _no_image(*_: Any) -> dict[str, Any]:
    return {"pixel_values": None}


def _several_images(config: Any, draw: Any, _: str) -> dict[str, Any]:
    side = config.vision_config.image_size
    return {"pixel_values": draw.normal(2, 1, 3, side, side), "image_attention_mask": torch.ones(2, 8, 1).long()}


def _codes(_: Any, draw: Any, __: str) -> dict[str, Any]:
    return {"input_ids": draw.ids(8, 8), "attention_mask": None, "labels": draw.ids(2, 8, 4)}


def _questions(_: Any, draw: Any, __: str) -> dict[str, Any]:
    return {"qformer_input_ids": draw.ids(2, 8)}


def _patches(config: Any, draw: Any, _: str) -> dict[str, Any]:
    part = config.vision_config
    places = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
    content = draw.normal(2, 16, part.patch_embed_hidden_size)
    return {
        "flattened_patches": torch.cat([torch.stack(places, 1).double().expand(2, -1, -1), content], 2),
        "labels": draw.ids(2, 6),
    }


_PER_LAYER_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
_TIME = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "autoformer": {"default": _TIME, "inputs": _series},
    "informer": {"default": _TIME, "inputs": _series},
    "time_series_transformer": {"default": _TIME, "inputs": _series},
    "patchtst": {"inputs": _patched_series},
    "patchtsmixer": {"inputs": _patched_series},
    "timesfm": {
        "inputs": lambda _, d, __: {"past_values": list(d.normal(2, 64)), "freq": torch.zeros(2, 1, dtype=torch.long)}
    },
    "timesfm2_5": {"inputs": lambda _, d, __: {"past_values": list(d.normal(2, 64))}},
    "audio-spectrogram-transformer": {
        "set": {"max_length": 32, "num_mel_bins": 32},
        "inputs": lambda config, draw, _: {"input_values": draw.normal(2, config.max_length, config.num_mel_bins)},
    },
    "siglip2": {"inputs": _naflex},
    "imagegpt": {"inputs": lambda _, d, __: {"pixel_values": None, "input_ids": d.ids(2, 16)}},
    "ministral": {"set": {**_ROPE, "head_dim": 8}},
    "hunyuan_v1_dense": {"set": {**_ROPE, "head_dim": 8}},
    "hunyuan_v1_moe": {"set": {**_ROPE, "head_dim": 8}},
    "hunyuan_vl": {"set": {"text_config.head_dim": 8}},
    "nemotron": {"set": {"num_key_value_heads": 2}},
    "led": {"inputs": _no_padding},
    "longformer": {"inputs": _no_padding},
    "modernvbert": {"inputs": _no_image},
    "ultravbert": {"inputs": _no_image},
    "t5gemma2": {"set": {"encoder.mm_tokens_per_image": 4}, "inputs": _no_image},
    "vibevoice_asr": {"set": {"acoustic_tokenizer_chunk_size": 6400}},
    "voxtral_realtime": {"inputs": lambda _, draw, __: {"input_features": draw.normal(2, 16, 64)}},
    "fun_asr_nano": {
        "set": {"adaptor_config.intermediate_size": 8},
        "inputs": lambda _, draw, __: {"input_features": draw.normal(2, 40, 112)},
    },
    "kyutai_speech_to_text": {
        "set": {"codec_config.upsample_groups": 32},
        "inputs": lambda _, draw, __: {"input_ids": draw.ids(2, 8, 33)},
    },
    "moonshine_streaming": {"default": {"num_key_value_heads": 8}},
    "pop2piano": {
        "inputs": lambda _, draw, __: {
            "input_ids": None,
            "attention_mask": None,
            "input_features": draw.normal(2, 16, 32),
        }
    },
    "speech-encoder-decoder": {"set": {"pad_token_id": 0, "decoder_start_token_id": 0}},
    "vision-encoder-decoder": {"set": {"pad_token_id": 0, "decoder_start_token_id": 0}},
    "neomme": {"set": {"rope_parameters.full_attention.partial_rotary_factor": 0.5}, "inputs": _no_image},
    "musicgen": {"inputs": _codes},
    "musicgen_melody": {"inputs": _codes},
    "bailing_hybrid": {"set": {"num_expert_group": 2, "topk_group": 1}},
    "jamba": {"set": {"attn_layer_period": 2, "attn_layer_offset": 1}},
    "cohere_compass_text": {"set": {"rope_parameters": _PER_LAYER_ROPE}},
    "cohere_compass": {"set": {"text_config.rope_parameters": _PER_LAYER_ROPE}},
    "dbrx": {"set": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}},
    "dory": {"set": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}},
    "dots1": {"set": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}},
    "git": {"inputs": lambda _, draw, __: {"pixel_values": draw.normal(2, 3, 32, 32)}},
    "lfm2_moe": {"set": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}},
    "zamba": {
        "set": {
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_hidden_layers": 5,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        }
    },
    "zamba2": {"set": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "n_mamba_heads": 8}},
    "blt": {"set": {"encoder_hash_byte_group_vocab": 64}},
    "blip-2": {"set": {"image_token_index": 100}},
    "instructblip": {"set": {"image_token_index": 100}, "inputs": _questions},
    "instructblipvideo": {"set": {"video_token_index": 100}, "inputs": _questions},
    "chameleon": {"default": {"vocabulary_map": {"<image>": 4}}},
    "deepseek_ocr2": {
        "set": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2}
    },
    "diffusion_gemma": {
        "set": {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32}
    },
    "idefics": {"inputs": _several_images},
    "pix2struct": {"inputs": _patches},
    "qwen2_5_omni_thinker": {"set": {"vision_config.window_size": 32, "vision_start_token_id": 101}},
    "qwen3_omni_moe_thinker": {"set": {"vision_start_token_id": 101}},
    "step3p7": {"set": {"text_config.sliding_window": 4}},
    "hgnet_v2": {
        "keep": (
            "stage_mid_channels",
            "stage_out_channels",
            "stage_in_channels",
            "stem_channels",
            "hidden_sizes",
            "embedding_size",
        )
    },
    "xmod": {"set": {"default_language": "en_XX"}},
    "mamba2": {"set": {"num_heads": 8, "head_dim": 8, "n_groups": 1}},
    "bamba": {"set": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]}},
    "granitemoehybrid": {
        "set": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]}
    },
    "deepseek_v2": {"set": {"num_experts_per_tok": 2, "topk_method": "greedy"}},
    "reformer": {
        "set": {
            "is_decoder": True,
            "axial_pos_shape": [4, 2],
            "axial_pos_embds_dim": [16, 16],
            "attn_layers": ["local", "lsh"],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
        }
    },
    "wav2vec2-conformer": _GATES,
    "wav2vec2-bert": {"set": {"vocab_size": 32}},
    "mask2former": {
        "set": {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
        }
    },
    "bit": {"set": {"hidden_sizes": [32, 32, 64, 64], "embedding_size": 32, "num_groups": 8}},
    "efficientnet": {
        "keep": ("out_channels", "in_channels"),
        "set": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    },
    "align": {
        "keep": ("vision_config",),
        "set": {"vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.5},
    },
    "levit": {
        "keep": ("key_dim", "hidden_sizes", "patch_size"),
        "set": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "image_size": 64},
    },
    "lilt": {"set": {"channel_shrink_ratio": 4, "hidden_size": 48, "num_attention_heads": 4}},
    "esm": {"set": {"vocab_size": 33}},
    "layoutlmv3": {"set": {"coordinate_size": 6, "shape_size": 4}},
}
