"""Default configurations made tiny: every size-like field of a configuration, by its name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEADS, HEAD_WIDTH, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 8, 128, 64, 32, 8

# The first pattern that matches the whole name decides. A number is never made larger.
SIZES: tuple[tuple[str, int], ...] = (
    # vocabularies and positions
    (r"type_vocab_size|vocab_size_or_config_json_file", 1 << 30),
    (r"(.*_)?(vocab_size|vocabulary_size|num_embeddings|codebook_size|n_vocab|vocab_sizes"
     r"|vocab_size_per_layer_input)", VOCABULARY),
    (r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_2d_position_embeddings"
     r"|max_(source|target|text|audio)_positions|num_position_embeddings|position_embedding_size|max_length"
     r"|max_(caption|text)_len.*|block_size|sample_size|seq_length|max_seq_length|max_encoder_position_embeddings"
     r"|max_decoder_position_embeddings|mel_seq_len|max_text_tokens|context_length)", POSITIONS),
    # heads and their widths
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_key_value_groups_?)", 2),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|heads|num_attn_heads|num_attention_head)", HEADS),
    (r"qk_head_dim", 2 * HEAD_WIDTH),
    (r"index_head_dim", 2 * HEAD_WIDTH),
    (r"(.*_)?(head_dim|d_kv|head_size|d_head|attention_head_size|kv_channels|head_width|attention_head_dim"
     r"|attention_key_dim|key_dim|value_dim)", HEAD_WIDTH),
    (r"(.*_)?lora_rank", 16),
    (r"rotary_dim|rope_dim|rotary_ndims", 4),
    # layers
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_blocks|num_encoder_layers"
     r"|num_decoder_layers|num_hidden_groups|xlstm_layers|num_attention_layers|n_blocks|predictor_layers|head_layers"
     r"|text_layers|vision_layers|num_stages_layers|num_mtp_layers|num_nextn_predict_layers"
     r"|num_(perceiver|resampler|context|speaker|aligner|flow|wn)_layers|num_(cross|self)_attention_layers)", 2),
    (r"max_window_layers|first_k_dense_replace|num_dense_layers|num_dense_hidden_layers", 1),
    (r"num_kv_shared_layers", 0),
    # experts
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|num_total_experts|moe_num_experts|routed_experts"
     r"|expert_capacity)", 4),
    (r"(.*_)?(num_experts_per_tok|num_experts_per_token|top_k_experts|moe_top_?k|num_selected_experts|moe_k)", 2),
    (r"n_group", 2),
    (r"topk_group", 1),
    # attention's windows
    (r"(.*_)?(sliding_window|local_attention|attention_chunk_size|attention_window|window_size|index_topk"
     r"|sliding_window_size|chunk_length|chunk_size)", 4),
    # states of recurrences
    (r"(.*_)?(state_size|d_state|state_dim)", HEAD_WIDTH),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"linear_num_(key|value)_heads", 2),
    (r"(.*_)?n_groups|mamba_n_groups", 1),
    # images, sound
    (r"(.*_)?(image_size|img_size|input_size|resolution|pretrain_image_size|crop_size)", IMAGE),
    (r"(.*_)?patch_size", PATCH),
    (r"(.*_)?num_frames|frames_per_clip|fps", 4),
    (r"num_mel_bins|feature_size|num_mels|n_mels|input_feat_per_channel|input_dim", 16),
    (r"(.*_)?(num_queries|num_query_tokens|num_latents|mask_length|num_denoising|num_object_queries|query_length"
     r"|num_learnable_queries|max_num_masks)", 6),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"num_labels", 3),
    # widths; the last, since their names are the loosest
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|dim_feedforward|feedforward_dim|inner_dim|filter_size"
     r"|dff|ffn_hidden_size|feed_forward_proj_dim|mlp_hidden_size|hidden_dim_ffn|ffn_intermediate_size|d_inner"
     r"|intermediate_dim|linear_units|ffn_embed_dim|feed_forward_size|feed_forward_hidden_size|ff_dim|dense_ffn_hidden_size)",
     2 * WIDTH),
    (r"(.*_)?(hidden_size|hidden_sizes|hidden_dim|hidden_dims|d_model|n_embd|n_embed|embed_dim|embedding_size"
     r"|embedding_dim|emb_dim|model_dim|width|dim|dims|projection_dim|proj_dim|proj_size|hid_dim|d_embed|latent_dim"
     r"|bottleneck_dim|hidden_channels|input_channels_|num_channels_|output_channels|channels|out_channels|units"
     r"|num_filters|lru_width|conv_dim|embed_proj_dim|feature_dim|input_hidden_size|hidden_features|dim_model"
     r"|shared_projection_dim|d_embedding|upsample_initial_channel|upsample_initial_channels|fusion_hidden_size|neck_hidden_size|embed_dims"
     r"|classifier_proj_size|mm_hidden_size|codebook_dim|num_hidden_units|base_channels|bottleneck_features|embed_size"
     r"|ctc_proj_size|prediction_hidden_size|joint_hidden_size|decoder_input_dim|feature_projection_input_dim|initializer_width)",
     WIDTH),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), size) for pattern, size in SIZES)
_LAYERS = re.compile(r"(.*_)?(num_hidden_layers|n_layers?|num_layers|depth|num_blocks)")
_TOKEN = re.compile(r"(.*_)?(token_ids?|token_index|token_idx|_token|token_id_list|start_id|end_id|tokens_ids)")
_DEPTHS = re.compile(
    r"(.*_)?(depths|layers|num_blocks|block_repeats|stage_num_blocks|num_layers|n_blocks|num_block_repeats)"
)
_HEADS = re.compile(r"(.*_)?(num_attention_heads|num_heads|n_heads?)")


def size_of(name: str) -> int | None:
    """The size that a field of this name may have at most; None: it is not a size."""
    return next((size for pattern, size in _PATTERNS if pattern.fullmatch(name)), None)


def shrunk(fields: Mapping[str, Any], layers: int = 2, width: int = WIDTH) -> dict[str, Any]:
    """The fields of a configuration that have to change for it to be tiny, and what they become."""
    tokens: dict[int, int] = {}
    return _shrunk(fields, layers, width, tokens)


def _shrunk(every: Mapping[str, Any], layers: int, width: int, tokens: dict[int, int]) -> dict[str, Any]:
    fields = {k: v for k, v in every.items() if isinstance(k, str)}  # labels have numbers for names
    before = next((v for k, v in fields.items() if isinstance(v, int) and _LAYERS.fullmatch(k)), None)
    heads = next((v for k, v in fields.items() if isinstance(v, int) and _HEADS.fullmatch(k)), None)
    after = layers if before is None else min(before, _layers_needed(fields, before, layers))
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        new = value
        if name == "backbone" and value == "resnet50":
            new = "test_resnet"  # timm's smallest
        elif isinstance(value, (bool, str, float)) or value is None:
            continue
        elif _TOKEN.fullmatch(name):
            new = _token(value, tokens)
        elif isinstance(value, int):
            new = _number(name, value, after, width, value == heads)
        elif isinstance(value, Mapping):
            kept = _of_layers(value, after) if name == "per_layer_config" else value
            new = {**kept, **_shrunk(kept, layers, width, tokens)}
        elif _is_list(value) and len(value):
            new = _list(name, list(value), before, after)
        if new != value:
            changed[name] = new
    return changed


def _layers_needed(fields: Mapping[str, Any], before: int, least: int) -> int:
    """So many that layers of every kind are there, and every stage that is read out."""
    lists = {k: v for k, v in fields.items() if _is_list(v)}
    kinds = [v for v in lists.values() if len(v) == before and all(isinstance(x, str) for x in v)]
    stages = [len(v) for k, v in lists.items() if re.fullmatch(r"out_features|(backbone_)?out_indices", k)]
    return max([least, *stages, *(_prefix_of_every_kind(v) for v in kinds)])


def _of_layers(value: Mapping[Any, Any], layers: int) -> dict[Any, Any]:
    return {k: v for k, v in value.items() if int(k) < layers}


def _number(name: str, value: int, layers: int, width: int, like_heads: bool) -> int:
    size = size_of(name)
    if _LAYERS.fullmatch(name):
        size = layers
    elif like_heads and "key_value" in name:
        size = HEADS
    elif size in (WIDTH, 2 * WIDTH):
        size = size * width // WIDTH
    return value if size is None else min(value, size)


def _list(name: str, value: list[Any], before: int | None, after: int) -> list[Any]:
    fewer = before is not None and before > after
    if name == "out_features":
        return [f"stage{k + 1}" for k in range(after)][-len(value) :] if fewer else value
    if fewer and len(value) == before:
        value = value[:after]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    return _numbers(name, value, after if fewer else None)


def _numbers(name: str, value: list[int], layers: int | None) -> list[int]:
    """A list of numbers; ``layers``: how many there are now, None if they were not made fewer."""
    size = size_of(name) or (size_of(name[:-1]) if name.endswith("s") else None)
    if name == "mrope_section":
        value = [HEAD_WIDTH // 2 - (len(value) - 1), *[1] * (len(value) - 1)]
    elif name.endswith(("_indexes", "_indices")):
        first = int(name == "out_indices")  # stages are counted from the stem
        value = value if layers is None else list(range(first, layers + first))[-len(value) :]
    elif _DEPTHS.fullmatch(name) or _HEADS.fullmatch(name):
        value = [min(v, 2) for v in value]
    elif size is not None and max(value) > size:
        value = [v if v <= 8 else 8 * math.ceil(v * size / max(value) / 8) for v in value]
    return value


def _token(value: Any, tokens: dict[int, int]) -> Any:
    if isinstance(value, Mapping):
        return {k: _token(v, tokens) for k, v in value.items()}
    if _is_list(value):
        return [_token(v, tokens) for v in value]
    if not isinstance(value, int) or value < VOCABULARY - 40:
        return value
    return tokens.setdefault(value, VOCABULARY - 1 - len(tokens) % 30)


def _prefix_of_every_kind(kinds: Sequence[str]) -> int:
    seen, last = set(), 0
    for k, kind in enumerate(kinds):
        if kind not in seen:
            seen.add(kind)
            last = k + 1
    return last


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
