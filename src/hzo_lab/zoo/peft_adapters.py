"""peft's adapters on a tiny Llama, BERT or T5: only the adapter's parameters are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hzo_lab.zoo.case import Case
from hzo_lab.zoo.imports import library

_QV = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}
_TASK = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
_FEED = {"llama": ["down_proj"], "bert": ["output.dense"], "t5": ["wo"]}


def _lora(peft: Any, base: str, **options: Any) -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=_QV[base], task_type=_TASK[base], **{"lora_dropout": 0.1, **options}
    )


_ADAPTERS: dict[str, Callable[[Any, str], Any]] = {
    "lora": _lora,
    "lora-no-dropout": lambda p, b: _lora(p, b, lora_dropout=0.0),
    "rslora": lambda p, b: _lora(p, b, use_rslora=True),
    "dora": lambda p, b: _lora(p, b, use_dora=True),
    "lora-bias": lambda p, b: _lora(p, b, bias="lora_only"),
    "lora-embedding": lambda p, b: p.LoraConfig(
        r=4, target_modules=["embed_tokens", "word_embeddings", "shared"], task_type=_TASK[b]
    ),
    "adalora": lambda p, b: p.AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, target_modules=_QV[b], task_type=_TASK[b]
    ),
    "ia3": lambda p, b: p.IA3Config(target_modules=_QV[b] + _FEED[b], feedforward_modules=_FEED[b], task_type=_TASK[b]),
    "prompt-tuning": lambda p, b: p.PromptTuningConfig(num_virtual_tokens=3, task_type=_TASK[b]),
    "prefix-tuning": lambda p, b: p.PrefixTuningConfig(num_virtual_tokens=3, task_type=_TASK[b]),
    "prefix-tuning-projected": lambda p, b: p.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, task_type=_TASK[b]
    ),
    "p-tuning": lambda p, b: p.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type=_TASK[b]),
    "multitask-prompt": lambda p, b: p.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, task_type=_TASK[b]
    ),
    "adaption-prompt": lambda p, b: p.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type=_TASK[b]),
    "loha": lambda p, b: p.LoHaConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "lokr": lambda p, b: p.LoKrConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "oft": lambda p, b: p.OFTConfig(r=4, oft_block_size=0, target_modules=_QV[b], task_type=_TASK[b]),
    "boft": lambda p, b: p.BOFTConfig(boft_block_size=4, target_modules=_QV[b], task_type=_TASK[b]),
    "vera": lambda p, b: p.VeraConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "fourier-ft": lambda p, b: p.FourierFTConfig(n_frequency=20, target_modules=_QV[b], task_type=_TASK[b]),
    "hra": lambda p, b: p.HRAConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "layer-norm-tuning": lambda p, b: p.LNTuningConfig(
        task_type=_TASK[b],
        target_modules={"llama": ["input_layernorm"], "bert": ["LayerNorm"], "t5": ["layer_norm"]}[b],
    ),
    "vb-lora": lambda p, b: p.VBLoRAConfig(
        r=4, num_vectors=16, vector_length=8, target_modules=_QV[b], task_type=_TASK[b]
    ),
    "trainable-tokens": lambda p, b: p.TrainableTokensConfig(
        token_indices=[5, 6, 7], target_modules=["embed_tokens"], task_type=_TASK[b]
    ),
    "randlora": lambda p, b: p.RandLoraConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "c3a": lambda p, b: p.C3AConfig(block_size=8, target_modules=_QV[b], task_type=_TASK[b]),
    "shira": lambda p, b: p.ShiraConfig(r=2, target_modules=_QV[b], task_type=_TASK[b]),
    "miss": lambda p, b: p.MissConfig(r=4, target_modules=_QV[b], task_type=_TASK[b]),
    "road": lambda p, b: p.RoadConfig(group_size=8, target_modules=_QV[b], task_type=_TASK[b]),
}
_FURTHER = ("lora", "dora", "ia3", "prompt-tuning", "prefix-tuning")  # on the other two bases as well


def preload() -> None:
    library("peft")
    for name in ("BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        getattr(library("transformers"), name)


def families() -> list[str]:
    return [
        *(f"{name}/llama" for name in _ADAPTERS),
        *(
            f"{name}/{base}"
            for base in ("bert", "t5")
            for name in _FURTHER
            if (name, base) != ("prefix-tuning", "bert")
        ),
    ]


def build(name: str, dtype: torch.dtype) -> Case:
    peft, hf = library("peft"), library("transformers")
    adapter, base = name.split("/")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model: Any
    if base == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64))
    elif base == "bert":
        model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=3, max_position_embeddings=64))
    else:
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        )
    tuned: nn.Module = peft.get_peft_model(model, _ADAPTERS[adapter](peft, base)).train().to(dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # adapters start at zero, where half of their gradients vanish: a few steps later they do not
        for p in tuned.parameters():
            if p.requires_grad and p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype))
    ids = torch.randint(3, 64, (2, 8), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    given["labels"] = {
        "llama": ids.masked_fill(mask == 0, -100),
        "bert": torch.tensor([0, 2]),
        "t5": ids[:, :6].contiguous(),
    }[base]
    if adapter == "multitask-prompt":
        given["task_ids"] = torch.tensor([0, 1])

    def call() -> Tensor:
        loss: Tensor = tuned(**given).loss
        return loss

    call()
    return Case(tuned, call, f"{sum(p.numel() for p in tuned.parameters() if p.requires_grad):,} trained parameters")
