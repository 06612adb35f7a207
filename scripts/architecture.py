"""Print the shape of the source tree: files a folder, packages, arrows between them, depth of imports.

    python scripts/architecture.py           # of this tree; of another one: its folder as the argument

A package is a folder, with those folders in it that it imports from itself; a file directly in ``src/hzo`` is a package
of one file. An arrow is a pair of packages of which one imports from the other, inside functions too. Depth is the
longest chain of arrows, counted in packages. ``__main__`` is left out. That arrows point one way is tested by
``tests/test_layering.py``.
"""

import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path


def modules_of(source: Path) -> dict[str, Path]:
    files = (path for top in sorted(source.glob("hzo*")) for path in sorted(top.rglob("*.py")))
    names = {".".join(path.relative_to(source).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if not name.endswith("__main__")}


def imported(path: Path, modules: dict[str, Path]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {full if full in modules else node.module or "" for full in inner.values()}
    return names & modules.keys()


def arrows_between(home: dict[str, str], imports: dict[str, set[str]]) -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {package: set() for package in home.values()}
    for name, package in home.items():
        arrows[package] |= {home[other] for other in imports[name]} - {package}
    return arrows


def main(root: Path) -> None:
    source = root / "src"
    modules = modules_of(source)
    imports = {name: imported(path, modules) for name, path in modules.items()}
    folder = {name: ".".join(path.parent.relative_to(source).parts) for name, path in modules.items()}
    home = {name: name if inside == "hzo" else inside for name, inside in folder.items()}
    arrows = arrows_between(home, imports)
    for inner in [package for package in arrows if package.count(".") == 2]:
        outer = inner.rpartition(".")[0]
        if inner in arrows[outer]:
            home = {name: outer if package == inner else package for name, package in home.items()}
    arrows, depth = arrows_between(home, imports), dict[str, int]()
    for package in TopologicalSorter(arrows).static_order():  # raises CycleError where packages import each other
        depth[package] = 1 + max((depth[below] for below in arrows[package]), default=0)

    for name, files in sorted(Counter(folder.values()).items()):
        print(f"{name:26}{files:4} files")
    for top in sorted({name.split(".")[0] for name in arrows}):
        own = [package for package in arrows if package.split(".")[0] == top]
        count, deepest = sum(len(arrows[package]) for package in own), max(depth[package] for package in own)
        print(f"{top}: {len(own)} packages, {count} arrows from them, depth {deepest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1])
