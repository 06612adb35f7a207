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
    "ministral": {"set": _ROPE},
    "hunyuan_v1_dense": {"set": _ROPE},
    "hunyuan_v1_moe": {"set": _ROPE},
    "xmod": {"set": {"default_language": "en_XX"}},
    "mamba2": {"set": {"num_heads": 8, "head_dim": 8, "n_groups": 1}},
    "bamba": {"set": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}},
    "granitemoehybrid": {"set": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}},
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
        "keep": ("out_channels", "in_channels", "hidden_dim"),
        "set": {"width_coefficient": 0.25, "depth_coefficient": 0.5},
    },
    "align": {
        "keep": ("vision_config",),
        "set": {"vision_config.width_coefficient": 0.25, "vision_config.depth_coefficient": 0.5},
    },
    "levit": {
        "keep": ("key_dim", "hidden_sizes"),
        "set": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4]},
    },
    "lilt": {"set": {"channel_shrink_ratio": 4, "hidden_size": 48, "num_attention_heads": 4}},
    "esm": {"set": {"vocab_size": 33}},
    "layoutlmv3": {"set": {"coordinate_size": 6, "shape_size": 4}},
}
