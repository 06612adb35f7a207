"""Inputs and labels of a model of transformers, by the names of its arguments and by its head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hzo_lab.zoo.transformers_special import SPECIAL

BATCH, LENGTH, LABELS, WORDS, SAMPLES, FRAMES = 2, 8, 3, 90, 8000, 40
_SOUND_HEADS = ("speech-seq2seq", "ctc", "audio-classification", "audio-frames", "speaker")
_CLASS_HEADS = (
    "image-classification", "sequence-classification", "audio-classification", "speaker", "multiple-choice",
    "video-classification", "next-sentence",
)  # fmt: skip
_LANGUAGE_HEADS = ("causal-lm", "masked-lm", "image-text-to-text", "multimodal-lm", "pretraining")


class Draws:
    """Random inputs, the same at every call."""

    def __init__(self, words: int) -> None:
        self.generator, self.words = torch.Generator().manual_seed(1), words

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(min(5, self.words - 1), self.words, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def make_inputs(model: nn.Module, config: Any, kind: str, head: str) -> dict[str, Any]:
    """Keyword arguments of the model's natural call, labels among them."""
    takes = set(inspect.signature(model.forward).parameters)
    vocabulary = getattr(_text(config), "vocab_size", None)
    draw = Draws(max(4, min(vocabulary if isinstance(vocabulary, int) else WORDS, WORDS) - 1))
    given: dict[str, Any] = {}
    sound = head in _SOUND_HEADS or getattr(model, "main_input_name", "") in ("input_values", "input_features")
    _images(given, takes, config, head, draw)
    if sound or "input_ids" not in takes:
        _sound(given, takes, config, draw)
    if "input_ids" in takes and not (sound and "input_values" in given) and head != "image-classification":
        _words(given, takes, config, head, draw)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes and "labels" not in takes:
        given["decoder_input_ids"] = draw.ids(BATCH, LENGTH - 2)
    _labels(given, takes, config, head, draw)
    if "return_loss" in takes and "labels" not in given:
        given["return_loss"] = True
    more = SPECIAL.get(kind, {}).get("inputs")
    given |= more(config, draw, head) if more else {}
    return {name: value for name, value in given.items() if value is not None}


def _words(given: dict[str, Any], takes: set[str], config: Any, head: str, draw: Draws) -> None:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 3 :] = 0
    pad = getattr(_text(config), "pad_token_id", 0)
    given["input_ids"] = draw.ids(BATCH, LENGTH).masked_fill(mask == 0, pad if isinstance(pad, int) else 0)
    if "attention_mask" in takes:
        given["attention_mask"] = mask
    if "bbox" in takes:
        given["bbox"] = (torch.arange(4) + 1).expand(BATCH, LENGTH, 4).contiguous()
    if head == "multiple-choice":
        for name in ("input_ids", "attention_mask", "bbox"):
            if name in given:
                given[name] = torch.stack([given[name], given[name].flip(0)], 1)


def _images(given: dict[str, Any], takes: set[str], config: Any, head: str, draw: Draws) -> None:
    if "pixel_values_videos" in takes and "pixel_values" not in takes:
        given["pixel_values_videos"] = _video(config, draw)
    if "pixel_values" in takes and head not in ("image-text-to-text", "causal-lm", "multimodal-lm"):
        given["pixel_values"] = _video(config, draw) if head == "video-classification" else _image(config, draw)


def _sound(given: dict[str, Any], takes: set[str], config: Any, draw: Draws) -> None:
    if "input_values" in takes:
        given["input_values"] = draw.normal(BATCH, SAMPLES)
        return
    if "input_features" not in takes:
        return
    part = _part(config, "audio_config", "encoder_config")
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    bins = _first(part, *names, default=16)
    positions = _first(part, "max_source_positions", default=None)
    whisper = isinstance(positions, int) and "num_mel_bins" in part.to_dict()
    given["input_features"] = draw.normal(BATCH, bins, 2 * positions) if whisper else draw.normal(BATCH, FRAMES, bins)
    if "attention_mask" in takes and not whisper:
        given["attention_mask"] = torch.ones(BATCH, FRAMES, dtype=torch.long)


def _labels(given: dict[str, Any], takes: set[str], config: Any, head: str, draw: Draws) -> None:
    inputs, mask = given.get("input_ids"), given.get("attention_mask")
    of_inputs = head in _LANGUAGE_HEADS or (head == "seq2seq" and not getattr(config, "is_encoder_decoder", False))
    if head == "question-answering":
        given["start_positions"], given["end_positions"] = torch.tensor([1, 2]), torch.tensor([3, 4])
    elif of_inputs and inputs is not None:
        if "labels" in takes:
            padded = mask is not None and mask.shape == inputs.shape
            given["labels"] = inputs.masked_fill(mask == 0, -100) if padded else inputs
        for name in {"next_sentence_label", "sentence_order_label"} & takes:
            given[name] = torch.tensor([0, 1])
    elif head in ("seq2seq", "speech-seq2seq", "document-question-answering") and "labels" in takes:
        given["labels"] = draw.ids(BATCH, LENGTH - 2)
    elif head == "visual-question-answering":
        given["labels"] = torch.full((BATCH, LABELS), 0.3, dtype=torch.float64)
    elif head == "ctc":
        given["labels"] = draw.ids(BATCH, 3)
    elif head == "token-classification":
        given["labels"] = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % LABELS
    elif head in ("semantic-segmentation", "universal-segmentation", "object-detection") and "pixel_values" in given:
        _labels_of_images(given, takes, config, head, draw)
    elif head in _CLASS_HEADS and "labels" in takes:
        given["labels"] = torch.tensor([0, 1])


def _labels_of_images(given: dict[str, Any], takes: set[str], config: Any, head: str, draw: Draws) -> None:
    size = given["pixel_values"].shape[-2:]
    if head == "semantic-segmentation":
        given["labels"] = torch.arange(BATCH * size.numel()).reshape(BATCH, *size) % LABELS
    elif head == "object-detection":
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.2, 0.2]], dtype=torch.float64)
        masks = torch.zeros(2, *size)
        masks[:, 8:16, 8:20] = 1
        given["labels"] = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes, "masks": masks} for _ in range(BATCH)]
    elif "mask_labels" in takes:
        masks = (torch.arange(2 * size.numel()).reshape(2, *size) % 5 > 2).double()
        given["mask_labels"] = [masks for _ in range(BATCH)]
        given["class_labels"] = [torch.tensor([0, 1]) for _ in range(BATCH)]
        if "task_inputs" in takes:
            given["task_inputs"] = draw.ids(BATCH, int(getattr(config, "task_seq_len", 77)))


def with_image(model: nn.Module, config: Any, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same call with one image a sample, its tokens put before the text.

    Raises whatever the model raises if it does not take images this way.
    """
    takes = set(inspect.signature(model.forward).parameters)
    draw = Draws(WORDS)
    names = ("image_token_id", "image_token_index", "image_patch_id", "media_token_id", "image_index")
    token = _first(config, *names, default=None)
    image: dict[str, Any] = {"pixel_values": _image(config, draw)}
    count = 0
    vision: Any = _part(config, "vision_config")
    if "image_grid_thw" in takes:
        merge, patch = _first(vision, "spatial_merge_size", default=2), _first(vision, "patch_size", default=8)
        channels = _first(vision, "in_channels", "num_channels", default=3)
        width = channels * _first(vision, "temporal_patch_size", default=1) * patch**2
        image = {"pixel_values": draw.normal(BATCH * 16, width), "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}
        count = 16 // merge**2
    elif "image_sizes" in takes:
        image["image_sizes"] = torch.tensor([list(image["pixel_values"].shape[-2:])] * BATCH)
    image["pixel_values"] = image["pixel_values"].to(dtype)
    if isinstance(token, int) and not count:
        with torch.no_grad():
            found = model.get_image_features(**image)  # type: ignore[operator]
        count = _vectors(found) // BATCH
    if isinstance(token, int):
        before = torch.full((BATCH, count), token)
        for name, filling in (("input_ids", before), ("attention_mask", before * 0 + 1), ("labels", before * 0 - 100)):
            if name in given:
                given = {**given, name: torch.cat([filling, given[name]], 1)}
        for name in {"mm_token_type_ids", "token_type_ids"} & takes:
            given = {**given, name: (given["input_ids"] == token).long()}
    return {**given, **image}


def _vectors(found: Any) -> int:
    """How many vectors of features there are, in a tensor, in several, or in a model's output."""
    pooled = getattr(found, "pooler_output", None)
    found = found if pooled is None else pooled
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    if isinstance(found, (list, tuple)):
        return sum(_vectors(f) for f in found)
    return int(found.last_hidden_state.shape[:-1].numel())


def _text(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:
        return config


def _part(config: Any, *names: str) -> Any:
    parts = (getattr(config, name, None) for name in names)
    return next((part for part in parts if hasattr(part, "to_dict")), config)


def _first(config: Any, *names: str, default: Any) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _size(config: Any) -> tuple[int, int]:
    size = _first(config, "image_size", "img_size", "input_size", "resolution", default=32)
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _image(config: Any, draw: Draws) -> Tensor:
    part = (
        config if getattr(config, "image_size", None) else _part(config, "vision_config", "encoder", "backbone_config")
    )
    channels = _first(part, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    return draw.normal(BATCH, channels if isinstance(channels, int) else 3, *_size(part))


def _video(config: Any, draw: Draws) -> Tensor:
    part = _part(config, "vision_config", "encoder")
    frames = _first(part, "num_frames", "frames_per_clip", default=4)
    return draw.normal(BATCH, frames, _first(part, "num_channels", "in_chans", default=3), *_size(part))


Inputs = Callable[[Any, Draws, str], dict[str, Any]]
