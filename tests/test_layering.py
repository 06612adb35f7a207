"""Imports point one way, and autograd is called where the design says so and nowhere else."""

import ast
from pathlib import Path

import pytest

import hzo

ROOT = Path(hzo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each may import from what stands above it. A folder is one layer. Put a new file where its imports allow.
ROWS = (
    ("errors", "checked", "queries", "writing", "patterns", "declaring", "noise"),
    (
        "arguments",
        "graph",
        "chain",
        "structure",
        "decompositions",
        "side_effects",
        "calling",
        "execution",
        "inspection",
        "recording",
        "linking",
        "tracing",
    ),
    ("trees", "coloring", "probes", "differences", "violations", "dot_product", "vjp", "repeats", "budgets", "optimum"),
    ("parameter_rules", "losses", "adjoints", "locality", "crosstalk"),
    (
        "storage",
        "plan",
        "calibration",
        "cost",
        "accuracy",
        "choice",
        "nodes",
        "edges",
        "intervals",
        "balance",
        "aims",
        "schedule",
        "memory",
        "plan_file",
        "planner",
        "preparation",
    ),
    ("parameter_gradients", "sweep", "gradient"),
    (
        "timing",
        "hops",
        "noise_measured",
        "calibrate",
        "checking",
        "coloring_check",
        "inference",
        "guarded",
        "simulator",
        "bridge",
        "criterion",
        "blackbox",
        "presets",
        "baselines",
        "hzo",
    ),
    ("train", "reproduce", "cli", "__main__"),
)
ORDER = [name for row in ROWS for name in row]


def layer(module: str) -> str:
    """hzo.adjoints.common -> adjoints; hzo -> hzo."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "hzo"


def layer_of(path: Path) -> str:
    return layer(".".join(("hzo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"))


def imported(tree: ast.AST) -> set[str]:
    """The layers that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            inside = [f"hzo.{alias.name}" for alias in node.names] if node.module == "hzo" else []
            names = [name if layer(name) in ORDER else "hzo" for name in inside] or [node.module or ""]
        else:
            continue
        found |= {layer(name) for name in names if name.split(".")[0] == "hzo"}
    return found


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up(path):
    own = layer_of(path)
    assert own in ORDER, f"list {own} in ORDER, below all that it imports from"
    below = {name for name in imported(parse(path)) - {own} if ORDER.index(name) >= ORDER.index(own)}
    assert not below, f"{own} stands above {sorted(below)}"


def test_the_order_is_about_files_that_exist():
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == {layer_of(path) for path in FILES}


# Who may: the yardstick, the bridge that lets a black box sit in an autograd model, and a baseline in forward mode.
BACKWARD = {"baselines/backprop.py"}
FUNCTION = {"bridge.py"}
FORWARD_MODE = {"baselines/forward_gradient.py"}


def autograd_used(tree: ast.AST) -> set[str]:
    """Names of autograd that a file reaches: imports, attributes of torch, calls of .backward() but hzo's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if "autograd" in name or name.endswith(("vjp", "jvp", "grad", "jacrev"))}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if "autograd" in alias.name}
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith(("torch.autograd.", "torch.func.", "torch.enable_grad", "torch.set_grad_enabled")):
                found.add(text)
            if node.attr == "backward" and text != "hzo.backward":
                found.add(".backward")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_autograd_is_called_where_the_design_says(path):
    used, name = autograd_used(parse(path)), str(path.relative_to(ROOT))
    if name in BACKWARD:
        assert used == {".backward", "torch.enable_grad"}
    elif name in FUNCTION:
        assert used == {"torch.autograd.Function", "torch.autograd.function.once_differentiable"}
    elif name in FORWARD_MODE:
        assert used == {"torch.autograd.forward_ad"}
    else:
        assert not used


def test_the_core_needs_torch_alone():
    """What the package imports at its top is torch, the standard library and itself; the extras are the runs' own."""
    extras = {"numpy", "typer", "rich", "matplotlib", "safetensors", "sklearn", "PIL"}
    for path in FILES:
        if layer_of(path) in ("train", "reproduce"):
            continue
        for node in parse(path).body:
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            else:
                names = {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            assert not names & extras, path
