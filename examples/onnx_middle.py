"""A frozen ONNX model, run by onnxruntime, in the middle of a network that is trained on both sides of it.

onnxruntime gives no gradient. What lies before the model learns all the same: the model is asked.
"""

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import hzo
from digits import compare, last_layer_only, options, train

WIDTH = 16


def pretrained(seed: int, split: str = "train") -> nn.Sequential:
    """Two layers of a network that told zeros to fours apart."""
    torch.manual_seed(seed)
    middle = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH), nn.Tanh())
    whole = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, 5))
    train(whole, epochs=20, lr=5e-3, split=split, classes=5)
    return middle.requires_grad_(False)


def exported(model: nn.Sequential) -> bytes:
    """An ONNX file of linear and tanh layers."""
    weights = [numpy_helper.from_array(p.detach().numpy(), name) for name, p in model.named_parameters()]
    nodes = []
    for k, module in enumerate(model):
        kind, attributes = ("Gemm", {"transB": 1}) if isinstance(module, nn.Linear) else ("Tanh", {})
        inputs = [f"x{k}", *(f"{k}.{name}" for name, _ in module.named_parameters())]
        nodes.append(helper.make_node(kind, inputs, [f"x{k + 1}"], **attributes))
    ends = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["batch", WIDTH]) for k in (0, len(model))]
    graph = helper.make_graph(nodes, "middle", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def black_box(file: bytes) -> nn.Module:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return hzo.blackbox(lambda x: session.run(None, {"x0": x})[0], numpy=True)


def network(how: str, seed: int, split: str = "train") -> nn.Module:
    middle = pretrained(seed, split)  # autograd through it is what nobody has who only has the file
    torch.manual_seed(seed + 1)
    inner = black_box(exported(middle)) if how == "hzo" else middle
    return nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), inner, nn.Linear(WIDTH, 10))


def main() -> None:
    given = options(__doc__)
    models = {how: network(how, given.seed) for how in ("hzo", "autograd")}
    models["last layer only"] = last_layer_only(network("hzo", given.seed))
    compare(models, epochs=30, lr=1e-2, given=given)


if __name__ == "__main__":
    main()
