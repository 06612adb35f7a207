"""The Trainer of transformers around hzo.module: a small GPT-2 learns to count.

``torchrun --nproc-per-node 2 examples/distributed/with_trainer.py``
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import hzo

SIZES = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "vocab_size": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def counting(samples: int = 128) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards from somewhere, modulo 16."""
    rows = (torch.arange(samples)[:, None] + torch.arange(12)) % 16
    return [{"input_ids": row, "labels": row} for row in rows]


def network() -> torch.nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES))


def train(by_hzo: bool = True) -> torch.nn.Module:
    """Train on this rank's share of the data; both ways draw the same dropout."""
    model = hzo.module(network()) if by_hzo else network()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            use_cpu=True,
            ddp_backend="gloo",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=options, train_dataset=counting())
        trainer.train()
    return model


if __name__ == "__main__":
    trained = train().eval()
    with torch.no_grad():
        row = counting()[3]["input_ids"][None]
        print(f"after {row[0].tolist()} comes {int(trained(input_ids=row).logits[0, -1].argmax())}")
    torch.distributed.destroy_process_group()
