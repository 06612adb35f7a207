"""Hugging Face transformers: every class of the AutoModelFor* mappings, tiny, by the natural call.

A family is ``<model type>/<head>``. Labels go in and ``out.loss`` comes out; caches are as the configuration has them;
text is padded; images go in where a model takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hzo_lab.zoo.case import Case, NotBuiltError, distance_to_waves
from hzo_lab.zoo.imports import library
from hzo_lab.zoo.shrinking import shrunk
from hzo_lab.zoo.transformers_inputs import LABELS, make_inputs, with_image
from hzo_lab.zoo.transformers_special import SPECIAL

MOST_PARAMETERS = 12_000_000

# head -> mapping of transformers.models.auto.modeling_auto. A model type counts under the first head that it has.
HEADS: dict[str, str] = {
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio-classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "object-detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "semantic-segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "universal-segmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "depth-estimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "video-classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "masked-image": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "zero-shot-image": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image-to-image": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
    "visual-question-answering": "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
    "document-question-answering": "MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES",
    "time-series": "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "pretraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple-choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "next-sentence": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "audio-frames": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "speaker": "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES",
    "multimodal-lm": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "keypoints": "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}


def _mappings() -> dict[str, dict[str, str]]:
    auto = library("transformers.models.auto.modeling_auto")
    found = {}
    for head, name in HEADS.items():
        mapping: Mapping[str, Any] = getattr(auto, name, {})
        found[head] = {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in mapping.items()}
    return found


def preload() -> None:
    """Import what all families share."""
    transformers = library("transformers")
    for name in ("BertForMaskedLM", "LlamaForCausalLM", "ViTForImageClassification"):
        getattr(transformers, name)


def families() -> list[str]:
    """Every model type under its first head.

    A class that serves several model types counts once. A part of a model that has a model type of its own and no head
    (``clip_vision_model`` of ``clip``) does not count.
    """
    mappings = _mappings()
    kinds = {kind for mapping in mappings.values() for kind in mapping}
    seen: set[str] = set()
    chosen: dict[tuple[str, str], str] = {}  # head, class -> model type
    for head, mapping in mappings.items():
        for kind, cls in mapping.items():
            part = head == "base" and any(kind.startswith(f"{whole}_") for whole in kinds)
            if part or kind in seen or (cls in seen and (head, cls) not in chosen):
                continue
            if (head, cls) not in chosen or _named_after(cls, kind):
                chosen[head, cls] = kind
        seen |= {*mapping, *mapping.values()}
    return [f"{kind}/{head}" for (head, _), kind in chosen.items()]


def _named_after(cls: str, kind: str) -> bool:
    """``LlamaForCausalLM`` serves many model types, and is llama."""
    return cls.lower().split("for")[0].startswith(re.sub(r"[-_]", "", kind)) and len(kind) > 2


def further_families() -> list[str]:
    """Every further head of every model type, without bare models."""
    first, seen, names = set(families()), set(), []
    for head, mapping in _mappings().items():
        for kind, cls in mapping.items():
            if f"{kind}/{head}" not in first and cls not in seen and head != "base":
                names.append(f"{kind}/{head}")
            seen.add(cls)
    return names


@dataclass(frozen=True)
class _Variant:
    """One way to make a model type tiny; the first under which the natural call runs is taken."""

    layers: int = 2
    width: int = 32
    fields: tuple[tuple[str, Any], ...] = ()
    image: bool = True


_SECTIONS = (("rope_parameters.mrope_section", [2, 1, 1]), ("text_config.rope_parameters.mrope_section", [2, 1, 1]))


def _variants(takes_image: bool) -> Iterator[_Variant]:
    with_image = (True, False) if takes_image else (True,)
    for image in with_image:
        yield _Variant(image=image)
        yield _Variant(fields=_SECTIONS, image=image)
        yield _Variant(width=64, fields=_SECTIONS, image=image)
        yield _Variant(layers=4, image=image)
        yield _Variant(width=128, image=image)


def build(name: str, dtype: torch.dtype) -> Case:
    """The family ``name``. Raises NotBuiltError: with what the first attempt failed at."""
    kind, head = name.rsplit("/", 1)
    cls = _mappings().get(head, {}).get(kind)
    if cls is None:
        raise NotBuiltError(f"transformers has no head {head!r} for the model type {kind!r}")
    reason = ""
    for variant in _variants(head == "image-text-to-text"):
        try:
            return _attempt(kind, head, cls, dtype, variant)
        except ImportError as error:
            raise NotBuiltError(str(error)) from error
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    raise NotBuiltError(reason)


def _attempt(kind: str, head: str, class_name: str, dtype: torch.dtype, variant: _Variant) -> Case:
    cls = getattr(library("transformers"), class_name)
    config = _for_class(tiny_config(kind, variant.layers, variant.width, dict(variant.fields)), cls)
    if head == "masked-lm" and getattr(config, "is_decoder", False):
        config.is_decoder = False
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise NotBuiltError(f"{parameters:,} parameters after shrinking")
    torch.manual_seed(0)
    model: nn.Module = cls(config).train().to(dtype)
    inputs = make_inputs(model, config, kind, head)
    if head == "image-text-to-text" and variant.image:
        inputs = with_image(model, config, inputs, dtype)
    given = {k: _cast(v, dtype) for k, v in inputs.items()}

    def call() -> Tensor:
        out = model(**given)
        loss = getattr(out, "loss", None)
        return loss.sum() if isinstance(loss, Tensor) else distance_to_waves(out)

    loss = call()
    if not loss.requires_grad:
        raise NotBuiltError("the natural call gives no differentiable loss")
    image = ", with an image" if "pixel_values" in given and head == "image-text-to-text" else ""
    return Case(model, call, f"{class_name}{image}, {parameters:,} parameters")


def tiny_config(kind: str, layers: int = 2, width: int = 32, fields: Mapping[str, Any] | None = None) -> Any:
    """The default configuration of a model type with every size made small. ``fields``: dotted names and their values,
    skipped where there is nothing of that name."""
    cls = library("transformers.models.auto.configuration_auto").CONFIG_MAPPING[kind]
    special = SPECIAL.get(kind, {})
    before = cls(**special.get("default", {})).to_dict()
    changed = shrunk({k: v for k, v in before.items() if k not in special.get("keep", ())}, layers, width)
    changed |= {k: v for k, v in special.get("default", {}).items() if k not in changed}
    for dotted, value in {**special.get("set", {}), **(fields or {})}.items():
        _set(changed, before, dotted.split("."), value)
    if "id2label" not in special.get("keep", ()):
        changed["num_labels"] = LABELS
    config = cls(**changed)
    for part in {id(c): c for c in (config, _text(config))}.values():
        if getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def _text(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several
        return config


def _for_class(config: Any, cls: Any) -> Any:
    """The part of a composite configuration that a class of a language model alone takes."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [_text(config), *vars(config).values()]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _set(changed: dict[str, Any], before: Mapping[str, Any], path: list[str], value: Any) -> None:
    """Set a field, in nested dictionaries that are copied from the default."""
    for key in path[:-1]:
        if not isinstance(before.get(key), Mapping):
            return
        before = before[key]
        changed[key] = dict(changed.get(key, before))
        changed = changed[key]
    changed[path[-1]] = value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
