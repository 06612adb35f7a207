"""Imports point one way, and autograd is called where the design says so and nowhere else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hzo

SOURCE = Path(hzo.__file__).parents[1]
SCRIPT = Path(__file__).parents[1] / "scripts" / "architecture.py"
FILES = sorted(path for name in ("hzo", "hzo_lab") for path in (SOURCE / name).rglob("*.py"))

# Each may import from what stands above it. A file beside the packages of hzo is a package of one file.
PACKAGES = (
    "hzo.errors",
    "hzo._compiler",
    "hzo._options",
    "hzo._seeds",
    "hzo.distributed",
    "hzo._files",
    "hzo.pools",
    "hzo._version",
    "hzo.noise",
    "hzo.tape",
    "hzo.rules",
    "hzo.tracing",
    "hzo.structure",
    "hzo.execution",
    "hzo.reverse",
    "hzo.tracing.recorder",
    "hzo.finite_differences",
    "hzo.declared",
    "hzo.losses",
    "hzo.locality",
    "hzo.plans",
    "hzo.progress",
    "hzo.planner",
    "hzo.gradients",
    "hzo.measurement",
    "hzo.verification",
    "hzo.external",
    "hzo.baselines",
    "hzo.presets",
    "hzo",
    "hzo_lab.errors",
    "hzo_lab.networks",
    "hzo_lab.records",
    "hzo_lab.data",
    "hzo_lab.training",
    "hzo_lab.reports",
    "hzo_lab.paper",
    "hzo_lab.zoo",
    "hzo_lab.cli",
    "hzo_lab",
)
# Their names are for all to import; of the other packages, others import what the face (__init__) gives.
OPEN = {"hzo.structure", "hzo.locality", "hzo.tape", "hzo.rules"}
SHADOWS: dict[str, set[str]] = {}
# ``python -m hzo``: the one file of the library that knows the application.
ENTRY = {"hzo.__main__", "hzo_lab.__main__"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def package_of(module: str) -> str:
    """hzo.plans.trees -> hzo.plans; the longest name of the list that it starts with."""
    return max((name for name in PACKAGES if f"{module}.".startswith(f"{name}.")), key=len)


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """The modules of hzo and hzo_lab that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in MODULES else node.module or "" for full in names.values()}
    return found & MODULES.keys()


IMPORTS = {module: imported(parse(path)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - ENTRY))
def test_imports_point_up(module):
    own = package_of(module)
    others = {package_of(name) for name in IMPORTS[module]} - {own}
    below = {name for name in others if PACKAGES.index(name) > PACKAGES.index(own)}
    assert not below, f"{own} stands above {sorted(below)}"


def test_the_longest_chain_of_imports():
    """Levels of packages, from the face of the library down: what a reader may have to follow."""
    depth: dict[str, int] = {}
    for package in PACKAGES:  # each behind all that it imports from
        files = [module for module in MODULES.keys() - ENTRY if package_of(module) == package]
        below = {package_of(name) for module in files for name in IMPORTS[module]} - {package}
        depth[package] = 1 + max((depth[name] for name in below), default=0)
    assert depth["hzo"] <= 14
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    assert f"depth {depth['hzo']}\n" in printed


def test_every_package_is_listed():
    inside = {module for module in MODULES if module.count(".") == 1} - ENTRY
    assert inside <= set(PACKAGES), "put it into PACKAGES, below all that it imports from"
    assert set(PACKAGES) <= MODULES.keys(), "listed, but not there"


def test_tests_mirror_the_packages():
    """A folder of tests for every package, and none without one."""
    tests = Path(__file__).parent
    places = {SOURCE / "hzo": tests, SOURCE / "hzo_lab": tests / "lab"}
    packages = {
        place / face.parent.relative_to(source)
        for source, place in places.items()
        for face in source.rglob("__init__.py")
        if face.parent != source
    }
    assert not sorted(str(folder) for folder in packages if not any(folder.glob("test_*.py")))
    folders = {path.parent for path in tests.rglob("test_*.py")} - set(places.values())
    assert folders <= packages


def test_no_cycle_inside_a_package():
    ahead = {module: {n for n in names if n != package_of(module)} for module, names in IMPORTS.items()}
    while ahead:
        free = {module for module, names in ahead.items() if not names & ahead.keys()}
        assert free, f"these import each other in a circle: {sorted(ahead)}"
        ahead = {module: names for module, names in ahead.items() if module not in free}


def test_the_library_knows_nothing_of_the_application():
    for module in MODULES.keys() - ENTRY:
        if module.split(".")[0] == "hzo":
            assert not {name for name in IMPORTS[module] if name.split(".")[0] == "hzo_lab"}, module


@pytest.mark.parametrize("module", sorted(MODULES.keys() - ENTRY))
def test_packages_meet_at_their_faces(module):
    """From another package a file imports names of its ``__init__``, or a whole module of it."""
    own = package_of(module)
    for node in ast.walk(parse(MODULES[module])):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            other = package_of(node.module)
            if other not in {own, "hzo", *OPEN}:
                assert node.module == other, f"import from {other} what {node.module} is asked for"


@pytest.mark.parametrize("package", sorted({module for module, path in MODULES.items() if path.stem == "__init__"}))
def test_no_function_has_the_name_of_a_module(package):
    """``import hzo.plans.schedule`` and ``from hzo.plans import schedule`` must not be two things."""
    names = {
        alias.asname or alias.name
        for node in ast.walk(parse(MODULES[package]))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" not in MODULES
    }
    assert {name for name in names if f"{package}.{name}" in MODULES} <= SHADOWS.get(package, set())


# Who may: the yardstick, the zoo that compares with it, the bridge that lets a black box sit in an autograd model, a
# baseline in forward mode, and the recorder, which reads what autograd writes down and never runs it.
BACKWARD = {"hzo/baselines/_backprop.py"}
ORACLE = {"hzo_lab/zoo/trial.py"}
FUNCTION = {
    "hzo/external/autograd.py": {
        "torch.autograd.Function",
        # Has the whole of a backward pass succeeded?
        "torch.autograd.Variable",
        "torch.autograd.Variable._execution_engine",
        "torch.autograd.Variable._execution_engine.queue_callback",
    },
    "hzo/external/network.py": {
        "torch.autograd.Function",
        "torch.autograd.forward_ad",  # is forward mode under way?
    },
    "hzo/tape/recurrent.py": {"torch.autograd.Function"},  # two cells, whose backward the sweep applies as their rule
    # Does a part use tensors that it has not registered, which are trainable or which forward mode follows?
    "hzo/external/guard.py": {"torch.enable_grad", "torch.autograd.forward_ad"},
}
FORWARD_MODE = {"hzo/baselines/_forward_gradient.py"}
RECORDER = {"hzo/tape/surroundings.py", "hzo/tape/opaque.py", "hzo/tracing/recorder/run.py"}


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
            if node.attr == "backward" and text not in {"hzo.backward", "tape.backward"}:
                found.add(".backward")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_autograd_is_called_where_the_design_says(path):
    used, name = autograd_used(parse(path)), path.relative_to(SOURCE).as_posix()
    if name in BACKWARD:
        assert used == {".backward", "torch.enable_grad"}
    elif name in ORACLE:
        assert used == {".backward"}
    elif name in FUNCTION:
        assert used == FUNCTION[name]
    elif name in FORWARD_MODE:
        assert used == {"torch.autograd.forward_ad", "torch.func.jvp"}
    elif name in RECORDER:
        assert ".backward" not in used
        assert not {text for text in used if text.startswith("torch.func.")}
    else:
        assert not used


def test_the_core_needs_torch_alone():
    """What the library imports at its top is torch, the standard library and itself; the extras are the runs' own."""
    extras = {"numpy", "typer", "rich", "matplotlib", "safetensors", "sklearn", "PIL", "filelock", "tqdm"}
    for module, path in MODULES.items():
        if module.split(".")[0] == "hzo_lab":
            continue
        for node in parse(path).body:
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            else:
                names = {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            assert not names & extras, path
