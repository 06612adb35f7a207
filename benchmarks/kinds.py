"""One model of each kind, of libraries that others wrote, at a realistic small size in float32: what a gradient costs
beside backprop's, and how far both are from backprop in float64.

    sh scripts/zoo.sh --help                        # makes .venv-zoo, which has the libraries
    .venv-zoo/bin/python benchmarks/kinds.py        # prints a table, writes results/zoo/kinds.json
    .venv-zoo/bin/python benchmarks/kinds.py --only Llama,LSTM --rounds 5

With ``--only``, rows of the file that were not asked for stay.

Sixteen samples of 64 pixels or 128 tokens, one thread. Each model runs in a process of its own; gradients take turns,
and medians of processor time are given. *Forward equivalents* are the operations of all measurements over those of one
forward pass; the share by queries is that of calls on the gradient's path without a rule, differentiated element by
element. Errors are those of the whole gradient, ‖g - g64‖ / ‖g64‖, against backprop in float64 at the same weights and
inputs; bfloat16 means that weights and inputs are rounded to it, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradients import Loss, by_backprop, by_hzo, medians, seconds
from hzo_lab.zoo.imports import library
from hzo_lab.zoo.operations import forward_equivalents
from record import write

OUT = Path(__file__).parents[1] / "results" / "zoo" / "kinds.json"
BATCH, SIDE, LENGTH, CLASSES, WORDS = 16, 64, 128, 10, 500


@dataclass(frozen=True)
class Problem:
    """A model, what goes into it, and the loss: a function of the model and of that."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[..., Tensor]

    def loss_of(self, model: nn.Module) -> Tensor:
        return self.loss(model, *self.inputs)


def on_images(model: nn.Module, side: int = SIDE) -> Problem:
    labels = torch.arange(BATCH) % CLASSES
    return Problem(model, (torch.randn(BATCH, 3, side, side),), lambda m, x: F.cross_entropy(_logits(m(x)), labels))


def _logits(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def on_words(model: nn.Module) -> Problem:
    words = torch.randint(5, WORDS, (BATCH, LENGTH))
    return Problem(model, (), lambda m: m(input_ids=words, labels=words).loss)


def on_sequences(layer: nn.Module, width: int = 64) -> Problem:
    labels = torch.arange(BATCH) % CLASSES

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model.get_submodule("layer")(x)
        out = out[0] if isinstance(out, tuple) else out
        return F.cross_entropy(model.get_submodule("head")(out.mean(1)), labels)

    head = nn.LazyLinear(CLASSES)
    model = nn.ModuleDict({"layer": layer, "head": head})
    x = torch.randn(BATCH, LENGTH, width)
    loss(model, x)
    return Problem(model, (x,), loss)


def torchvision(name: str, **options: Any) -> Problem:
    return on_images(library("torchvision.models").get_model(name, weights=None, num_classes=CLASSES, **options))


def timm(name: str, side: int = SIDE, **options: Any) -> Problem:
    return on_images(library("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options), side)


def transformers(name: str, head: str, **options: Any) -> Problem:
    lib = library("transformers")
    sizes = {"vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": 2, "pad_token_id": 0, **options}
    return on_words(getattr(lib, name + head)(getattr(lib, name + "Config")(**sizes)))


_ATTENTION = {"num_attention_heads": 4, "intermediate_size": 512}


def gpt2() -> Problem:
    lib = library("transformers")
    config = lib.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0,
                            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1)  # fmt: skip
    return on_words(lib.GPT2LMHeadModel(config))


def graph(make: Callable[[Any], list[nn.Module]], edges_of: Callable[[Tensor], Any] = lambda e: e) -> Problem:
    """Nodes of a random graph, classified; 2,000 of them, with 10,000 edges."""
    nodes = 2000
    edges, labels = edges_of(torch.randint(nodes, (2, 10_000))), torch.arange(nodes) % CLASSES

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        *layers, head = model.children()
        for layer in layers:
            x = layer(x, edges).relu()
        return F.cross_entropy(head(x), labels)

    layers = make(library("torch_geometric.nn"))
    return Problem(nn.ModuleList([*layers, nn.Linear(64, CLASSES)]), (torch.randn(nodes, 32),), loss)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights for the lowest frequencies."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes, self.past = modes, nn.Linear(width, width)
        self.weight = nn.Parameter(torch.randn(width, width, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x, dim=1)
        weight = torch.view_as_complex(self.weight)
        low = torch.einsum("bmi,iom->bmo", found[:, : self.modes], weight)
        return F.gelu(
            self.past(x) + torch.fft.irfft(F.pad(low, (0, 0, 0, found.shape[1] - self.modes)), n=x.shape[1], dim=1)
        )


class Bag(nn.Module):
    """Bags of words with learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.sizes = nn.EmbeddingBag(WORDS, 64, mode="sum"), nn.Parameter(torch.rand(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].abs() * 100).long() % WORDS
        return self.words(ids, per_sample_weights=self.sizes.expand_as(ids).contiguous())[:, None]


class Biased(nn.Module):
    """Attention with a learned bias for each distance, made by a network where asked, and grouped heads."""

    def __init__(self, width: int, heads: int, groups: int, network: bool) -> None:
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.q, self.kv, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * groups * size),
            nn.Linear(width, width),
        )
        table = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, heads)) if network else None
        self.table, self.values = table, None if network else nn.Parameter(torch.randn(2 * LENGTH, heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.groups, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(length)
        distance = places[:, None] - places + length
        table = (
            self.values if self.table is None else self.table(torch.arange(2 * length, dtype=x.dtype)[:, None] / length)
        )
        bias = table[distance].permute(2, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.groups != self.heads)
        return x + self.out(out.transpose(1, 2).reshape(x.shape))


class Unfolded(nn.Module):
    """Patches that overlap, mixed by a linear layer, and added up again (unfold and fold)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(27, 27), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=2)
        mixed = self.mix(patches.transpose(1, 2)).relu().transpose(1, 2)
        return self.head(F.fold(mixed, x.shape[-2:], 3, padding=1, stride=2).mean((2, 3)))


class Einsum(nn.Module):
    """Products written as einsum, among them one of three operands, and addmm and baddbmm."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(width, rank) / width**0.5), nn.Parameter(torch.randn(rank, width))
        self.core, self.bias = nn.Parameter(torch.randn(4, width, width) / width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("btw,wr,rv->btv", x, self.a, self.b).tanh()
        x = torch.einsum("btw,hwv->bhtv", x, self.core).relu().sum(1)
        x = torch.addmm(self.bias, x.flatten(0, 1), self.core[0], beta=0.5, alpha=2.0).view_as(x)
        return torch.baddbmm(self.bias.expand_as(x), x, self.core[1].expand(len(x), -1, -1))


class Standardized(nn.Module):
    """Convolutions whose weights are derived from others: standardized, or of a norm and a direction."""

    def __init__(self, derive: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(part for a, b in ((3, 32), (32, 64), (64, 64)) for part in (derive(nn.Conv2d(a, b, 3, 2, 1)), nn.ReLU()))
        )
        self.head = derive(nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolutions(x).mean((2, 3)))


class LoraLinear(nn.Module):
    """A frozen layer with an adapter of low rank beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.frozen(x) + self.up(self.down(x))).relu()


def diffusion() -> Problem:
    unet = library("diffusers").UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    times, noise = torch.arange(BATCH) * 50, torch.randn(BATCH, 3, 32, 32)
    return Problem(unet, (noise,), lambda m, x: (m(x, times).sample - x).square().mean())


def sparse(nodes: int = 2000) -> Problem:
    """A graph convolution written as a product with a sparse matrix."""
    edges = torch.randint(nodes, (2, 10_000))
    layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, CLASSES)])
    labels = torch.arange(nodes) % CLASSES

    def loss(model: nn.ModuleList, x: Tensor) -> Tensor:
        matrix = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1], dtype=x.dtype), (nodes, nodes)).coalesce()
        for layer in model:
            x = torch.sparse.mm(matrix, layer(x)).tanh()
        return F.cross_entropy(x, labels)

    return Problem(layers, (torch.randn(nodes, 32),), loss)


def volo() -> Problem:
    """Outlook attention: windows unfolded, mixed with weights of their own, and folded again."""
    model = library("timm.models.volo").VOLO(
        layers=(2, 1), img_size=SIDE, embed_dims=(48, 96), num_heads=(2, 4), mlp_ratio=2.0, downsamples=(True, False),
        outlook_attention=(True, False), num_classes=CLASSES, use_aux_head=False, use_mix_token=False,
    )  # fmt: skip
    return on_images(model)


KINDS: dict[str, Callable[[], Problem]] = {
    # the eight of which errors are asked for
    "MobileNetV2": lambda: torchvision("mobilenet_v2", dropout=0.0),
    "EfficientNet": lambda: timm("efficientnet_b0"),
    "ViT": lambda: timm("vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=4),
    "Llama, grouped attention": lambda: transformers(
        "Llama", "ForCausalLM", **_ATTENTION, num_key_value_heads=2, num_hidden_layers=4),
    "GPT-2": gpt2,
    "Mamba": lambda: transformers("Mamba", "ForCausalLM", state_size=8),
    "LSTM": lambda: on_sequences(nn.LSTM(64, 64, batch_first=True)),
    "Graph convolutions (GCN)": lambda: graph(lambda g: [g.GCNConv(32, 64), g.GCNConv(64, 64)]),
    # recurrent layers
    "GRU, two layers, both ways": lambda: on_sequences(nn.GRU(64, 64, 2, batch_first=True, bidirectional=True)),
    "RNN": lambda: on_sequences(nn.RNN(64, 64, batch_first=True)),
    "LSTM with projection": lambda: on_sequences(nn.LSTM(64, 64, batch_first=True, proj_size=32)),
    "RWKV": lambda: transformers("Rwkv", "ForCausalLM", attention_hidden_size=128, context_length=LENGTH),
    # images
    "ResNet-18": lambda: torchvision("resnet18"),
    "ConvNeXt": lambda: timm("convnext_atto"),
    "Weight standardization": lambda: on_images(Standardized(_standardized)),
    "Norm-free ResNet (NFNet)": lambda: timm("nf_resnet26"),
    "Weight norm": lambda: on_images(Standardized(parametrizations.weight_norm)),
    "Spectral norm": lambda: on_images(Standardized(parametrizations.spectral_norm)),
    "Swin V2, position biases by a network": lambda: timm(
        "swinv2_tiny_window8_256", img_size=SIDE, depths=(1, 1), num_heads=(3, 6), window_size=4),
    "MaxViT, learned biases": lambda: timm("maxvit_rmlp_pico_rw_256", img_size=SIDE),
    "VOLO, fold and unfold": volo,
    "LambdaNet": lambda: timm("lambda_resnet26t"),
    "Unfold and fold": lambda: on_images(Unfolded()),
    "UNet of a diffusion model": diffusion,
    # words
    "BERT": lambda: transformers(
        "Bert", "ForMaskedLM", **_ATTENTION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "DeBERTa V2": lambda: transformers(
        "DebertaV2", "ForMaskedLM", **_ATTENTION, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "T5, learned attention biases": lambda: transformers(
        "T5", "ForConditionalGeneration", d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0),
    "FNet": lambda: transformers("FNet", "ForMaskedLM", intermediate_size=512, hidden_dropout_prob=0.0),
    "Mixtral, experts": lambda: transformers(
        "Mixtral", "ForCausalLM", **_ATTENTION, num_key_value_heads=2, num_local_experts=4),
    "Mamba 2": lambda: transformers(
        "Mamba2", "ForCausalLM", num_heads=8, head_dim=32, n_groups=1, state_size=16, chunk_size=32),
    # layers by themselves
    "Attention with a learned bias, grouped": lambda: on_sequences(Biased(64, 4, 2, False)),
    "Attention with a bias by a network": lambda: on_sequences(Biased(64, 4, 4, True)),
    "Einsum, addmm, baddbmm": lambda: on_sequences(Einsum(64, 8)),
    "Embedding bag": lambda: on_sequences(Bag()),
    "Fourier neural operator": lambda: on_sequences(nn.Sequential(Spectral(64, 16), Spectral(64, 16))),
    "LoRA": lambda: on_sequences(nn.Sequential(*(LoraLinear(64) for _ in range(4)))),
    # graphs
    "Graph attention (GATv2)": lambda: graph(lambda g: [g.GATv2Conv(32, 16, heads=4), g.GATv2Conv(64, 16, heads=4)]),
    "Sparse products": sparse,
    "MLP": lambda: on_sequences(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))),
}  # fmt: skip
ERRORS_ASKED = tuple(KINDS)[:8]


def _standardized(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", _Standard())
    return layer


class _Standard(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        return (
            (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        ).view_as(weight)


METHODS = {"backprop": by_backprop, "hzo": by_hzo}


def resetting(problem: Problem) -> Callable[[str], None]:
    """A function that undoes a gradient: none is left, and buffers and random numbers are those of now."""
    kept = {name: b.clone() for name, b in problem.model.named_buffers()}

    def reset(_: str) -> None:
        problem.model.zero_grad()
        torch.manual_seed(1)  # of what is left of randomness
        with torch.no_grad():
            for name, b in problem.model.named_buffers():
                b.copy_(kept[name])

    return reset


def gradient(problem: Problem, method: Callable[[nn.Module, Loss], None]) -> dict[str, Tensor]:
    """By parameter; buffers are as before."""
    reset = resetting(problem)
    reset("")
    method(problem.model, problem.loss_of)
    found = {n: p.grad.double() for n, p in problem.model.named_parameters() if p.grad is not None}
    reset("")
    return found


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in problem.inputs)
    model = deepcopy(problem.model).to(dtype)
    if dtype == torch.float64 and hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    return Problem(model, inputs, problem.loss)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    squares = sum(float((found[n] - g if n in found else g).square().sum()) for n, g in expected.items())
    return (squares / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


def errors(problem: Problem, dtype: torch.dtype) -> dict[str, float]:
    """Of both methods in a dtype, against backprop in float64 at the same weights and inputs."""
    low = cast(problem, dtype)
    expected = gradient(cast(low, torch.float64), by_backprop)
    return {name: error(gradient(low, method), expected) for name, method in METHODS.items()}


def row(name: str, rounds: int) -> dict[str, Any]:
    """All figures of one kind."""
    torch.manual_seed(0)
    problem = KINDS[name]()
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in problem.model.parameters())}
    reset = resetting(problem)
    found["first"] = seconds(lambda: by_hzo(problem.model, problem.loss_of))
    found |= medians({m: partial(run, problem.model, problem.loss_of) for m, run in METHODS.items()}, rounds, reset)
    reset("")
    found["over backprop"] = found["hzo"] / found["backprop"]
    found["forward equivalents"], found["share by queries"] = forward_equivalents(
        lambda: problem.loss_of(problem.model)
    )
    found["float32"] = errors(problem, torch.float32)
    if name in ERRORS_ASKED:
        try:
            found["bfloat16"] = errors(problem, torch.bfloat16)
        except RuntimeError as refused:  # a kernel that PyTorch does not have in bfloat16
            found["bfloat16"] = {"refused": str(refused).splitlines()[0]}
    return found


def in_a_process(name: str, rounds: int) -> dict[str, Any]:
    """The same in a fork: memory goes back, and an error is a row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        process = os.fork()
        if process == 0:
            try:
                found = row(name, rounds)
            except BaseException as failed:
                found = {"failed": f"{type(failed).__name__}: {failed}"}
            path.write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)
        os.waitpid(process, 0)
        if not path.exists():
            return {"failed": "the process was killed"}
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content


def shown(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"{name:40} {found['failed'][:200]}"
    text = (
        f"{name:40} {found['over backprop']:6.2f}x backprop "
        f"({found['backprop']:.3f} s, first {found['first']:.2f} s)   "
        f"{found['forward equivalents']:6.2f} fwd eq.   {found['share by queries']:.0%} queries"
    )
    for dtype in ("float32", "bfloat16"):
        e = found.get(dtype, {})
        if "hzo" in e:
            text += f"   {dtype} {e['hzo']:.1e} / {e['backprop']:.1e} = {e['hzo'] / max(e['backprop'], 1e-30):.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="parts of names, with commas between")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    before = (
        json.loads(options.out.read_text(encoding="utf-8"))["kinds"] if options.only and options.out.exists() else {}
    )
    found = {name: before[name] for name in KINDS if name in before}
    for name in KINDS:
        if options.only and not any(part.lower() in name.lower() for part in options.only.split(",")):
            continue
        found[name] = in_a_process(name, options.rounds)
        print(shown(name, found[name]), flush=True)
        write(options.out, rounds=options.rounds, kinds={name: found[name] for name in KINDS if name in found})


if __name__ == "__main__":
    main()
