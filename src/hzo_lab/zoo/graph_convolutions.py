"""torch_geometric's convolutions: two of them on a small random graph, nodes classified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hzo_lab.zoo.case import Case
from hzo_lab.zoo.imports import library

NODES, FEATURES, WIDTH, CLASSES, EDGE_FEATURES = 12, 6, 8, 3, 4


def _mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b))


# How a layer of a inputs and b outputs is made; what it takes besides nodes and edges.
_LAYERS: dict[str, tuple[Callable[[Any, int, int], Any], str]] = {
    "GCNConv": (lambda g, a, b: g.GCNConv(a, b), ""),
    "ChebConv": (lambda g, a, b: g.ChebConv(a, b, K=3), ""),
    "SAGEConv": (lambda g, a, b: g.SAGEConv(a, b), ""),
    "SAGEConv-max": (lambda g, a, b: g.SAGEConv(a, b, aggr="max"), ""),
    "SAGEConv-lstm": (lambda g, a, b: g.SAGEConv(a, b, aggr="lstm"), "sorted"),
    "GraphConv": (lambda g, a, b: g.GraphConv(a, b), "weight"),
    "GatedGraphConv": (lambda g, _, b: g.GatedGraphConv(b, num_layers=2), ""),
    "ResGatedGraphConv": (lambda g, a, b: g.ResGatedGraphConv(a, b), ""),
    "GATConv": (lambda g, a, b: g.GATConv(a, b // 2, heads=2, dropout=0.2), ""),
    "GATConv-edges": (lambda g, a, b: g.GATConv(a, b // 2, heads=2, edge_dim=EDGE_FEATURES), "edge_attr"),
    "GATv2Conv": (lambda g, a, b: g.GATv2Conv(a, b // 2, heads=2, edge_dim=EDGE_FEATURES), "edge_attr"),
    "SuperGATConv-SD": (lambda g, a, b: g.SuperGATConv(a, b // 2, heads=2, attention_type="SD"), ""),
    "TransformerConv": (lambda g, a, b: g.TransformerConv(a, b // 2, heads=2, edge_dim=EDGE_FEATURES), "edge_attr"),
    "AGNNConv": (lambda g, *_: g.AGNNConv(), ""),
    "TAGConv": (lambda g, a, b: g.TAGConv(a, b), ""),
    "GINConv": (lambda g, a, b: g.GINConv(_mlp(a, b), train_eps=True), ""),
    "GINEConv": (lambda g, a, b: g.GINEConv(_mlp(a, b), edge_dim=EDGE_FEATURES), "edge_attr"),
    "ARMAConv": (lambda g, a, b: g.ARMAConv(a, b, num_stacks=2, num_layers=2), ""),
    "SGConv": (lambda g, a, b: g.SGConv(a, b, K=2), ""),
    "SSGConv": (lambda g, a, b: g.SSGConv(a, b, alpha=0.1, K=2), ""),
    "APPNP": (lambda g, *_: g.APPNP(K=3, alpha=0.1), ""),
    "MFConv": (lambda g, a, b: g.MFConv(a, b), ""),
    "SignedConv": (lambda g, a, b: g.SignedConv(a, b // 2, first_aggr=True), "signed"),
    "DNAConv": (lambda g, _, b: g.DNAConv(b, heads=2), "history"),
    "GMMConv": (lambda g, a, b: g.GMMConv(a, b, dim=2, kernel_size=3), "pseudo"),
    "NNConv": (lambda g, a, b: g.NNConv(a, b, nn.Linear(EDGE_FEATURES, a * b)), "edge_attr"),
    "CGConv": (lambda g, a, _: g.CGConv(a, dim=EDGE_FEATURES, batch_norm=True), "edge_attr"),
    "EdgeConv": (lambda g, a, b: g.EdgeConv(_mlp(2 * a, b)), ""),
    "PointNetConv": (lambda g, a, b: g.PointNetConv(_mlp(a + 3, b), _mlp(b, b)), "position"),
    "PPFConv": (lambda g, a, b: g.PPFConv(_mlp(a + 4, b), _mlp(b, b)), "normals"),
    "FeaStConv": (lambda g, a, b: g.FeaStConv(a, b, heads=2), ""),
    "PointTransformerConv": (lambda g, a, b: g.PointTransformerConv(a, b), "position"),
    "LEConv": (lambda g, a, b: g.LEConv(a, b), ""),
    "PNAConv": (
        lambda g, a, b: g.PNAConv(
            a,
            b,
            ["mean", "min", "max", "std"],
            ["identity", "amplification"],
            torch.tensor([0, 2, 4, 3, 2, 1, 1]),
            edge_dim=EDGE_FEATURES,
        ),
        "edge_attr",
    ),
    "ClusterGCNConv": (lambda g, a, b: g.ClusterGCNConv(a, b), ""),
    "GENConv": (lambda g, a, b: g.GENConv(a, b, aggr="softmax", learn_t=True, edge_dim=EDGE_FEATURES), "edge_attr"),
    "GCN2Conv": (lambda g, _, b: g.GCN2Conv(b, alpha=0.1, theta=0.5, layer=1), "first"),
    "FiLMConv": (lambda g, a, b: g.FiLMConv(a, b), ""),
    "SuperGATConv-MX": (lambda g, a, b: g.SuperGATConv(a, b // 2, heads=2, attention_type="MX"), ""),
    "FAConv": (lambda g, _, b: g.FAConv(b, eps=0.2), "first"),
    "EGConv": (lambda g, a, b: g.EGConv(a, b, num_heads=2, num_bases=2, aggregators=["sum", "symnorm"]), ""),
    "GeneralConv": (
        lambda g, a, b: g.GeneralConv(a, b, in_edge_channels=EDGE_FEATURES, attention=True, heads=2),
        "edge_attr",
    ),
    "RGCNConv": (lambda g, a, b: g.RGCNConv(a, b, num_relations=3, num_bases=2), "relation"),
    "FastRGCNConv": (lambda g, a, b: g.FastRGCNConv(a, b, num_relations=3), "relation"),
    "RGATConv": (lambda g, a, b: g.RGATConv(a, b, num_relations=3), "relation"),
    "HypergraphConv": (lambda g, a, b: g.HypergraphConv(a, b), ""),
    "WLConvContinuous": (lambda g, *_: g.WLConvContinuous(), ""),
    "AntiSymmetricConv": (lambda g, _, b: g.AntiSymmetricConv(b, num_iters=2), ""),
    "MixHopConv": (lambda g, a, b: g.MixHopConv(a, b // 2, powers=[0, 1]), ""),
    "GPSConv": (lambda g, _, b: g.GPSConv(b, g.GINConv(_mlp(b, b)), heads=2, attn_kwargs={"dropout": 0.1}), "batch"),
    "LGConv": (lambda g, *_: g.LGConv(), ""),
    "PDNConv": (lambda g, a, b: g.PDNConv(a, b, edge_dim=EDGE_FEATURES, hidden_channels=5), "edge_attr"),
    "SimpleConv": (lambda g, *_: g.SimpleConv(aggr="sum"), ""),
    "EdgeConv-mean": (lambda g, a, b: g.EdgeConv(_mlp(2 * a, b), aggr="mean"), ""),
}


class Classifier(nn.Module):
    """Features widened, one convolution, an activation, another one, a linear head; the mean of nodes where asked."""

    def __init__(self, layers: Any, make: Callable[[Any, int, int], Any], takes: str) -> None:
        super().__init__()
        self.widen, self.takes = nn.Linear(FEATURES, WIDTH), takes
        self.first, self.second = make(layers, WIDTH, WIDTH), make(layers, WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        x = self.widen(graph["x"])
        start = x
        for layer in (self.first, self.second):
            x = self.run(layer, x, start, graph).relu()
        out: Tensor = self.head(x)
        return out

    def run(self, layer: Any, x: Tensor, start: Tensor, graph: dict[str, Tensor]) -> Any:
        return _RUNS[self.takes](layer, x, start, graph, graph["edges"])


def _signed(layer: Any, x: Tensor, _: Any, __: Any, edges: Tensor) -> Any:
    half = edges.shape[1] // 2
    return layer(x, edges[:, :half], edges[:, half:])


# What a layer takes besides nodes and edges: layer, nodes, nodes at the start, graph, edges.
_RUNS: dict[str, Callable[[Any, Tensor, Tensor, dict[str, Tensor], Tensor], Any]] = {
    "": lambda layer, x, _, __, edges: layer(x, edges),
    "weight": lambda layer, x, _, graph, edges: layer(x, edges, graph["weight"]),
    "edge_attr": lambda layer, x, _, graph, edges: layer(x, edges, edge_attr=graph["features"]),
    "signed": _signed,
    "history": lambda layer, x, start, _, edges: layer(torch.stack([start, x], 1), edges),
    "pseudo": lambda layer, x, _, graph, edges: layer(x, edges, graph["features"][:, :2]),
    "position": lambda layer, x, _, graph, edges: layer(x, graph["position"], edges),
    "normals": lambda layer, x, _, graph, edges: layer(x, graph["position"], graph["normals"], edges),
    "first": lambda layer, x, start, _, edges: layer(x, start, edges),
    "sorted": lambda layer, x, _, __, edges: layer(x, edges[:, edges[1].argsort(stable=True)]),
    "relation": lambda layer, x, _, graph, edges: layer(x, edges, graph["relation"]),
    "batch": lambda layer, x, _, graph, edges: layer(x, edges, batch=graph["batch"]),
}


def families() -> list[str]:
    return list(_LAYERS)


def build(name: str, dtype: torch.dtype) -> Case:
    layers = library("torch_geometric.nn")
    torch.manual_seed(0)
    model = Classifier(layers, *_LAYERS[name])
    draw = torch.Generator().manual_seed(1)
    edges = torch.randint(0, NODES, (2, 40), generator=draw)
    edges = torch.unique(edges[:, edges[0] != edges[1]], dim=1)
    count = edges.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    graph = {
        "x": normal(NODES, FEATURES),
        "edges": edges,
        "weight": normal(count).abs(),
        "features": normal(count, EDGE_FEATURES),
        "position": normal(NODES, 3),
        "normals": F.normalize(normal(NODES, 3)),
        "relation": torch.arange(count) % 3,
        "batch": torch.arange(NODES) // 6,
    }
    labels = torch.arange(NODES) % CLASSES
    model = model.train().to(dtype)

    def call() -> Tensor:
        return F.cross_entropy(model(graph), labels)

    call()
    return Case(model, call)
