"""What is in the distributions, and does the wheel work by itself?

python scripts/check_wheel.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PROGRAM = """
import torch, hzo
assert hzo.__file__.startswith({place!r}), hzo.__file__
model = torch.nn.Linear(3, 2)
hzo.backward(model, torch.nn.functional.mse_loss, torch.randn(4, 3), torch.randn(4, 2))
assert model.weight.grad is not None
print(hzo.__version__)
"""


def main(folder: Path) -> None:
    """Check the only wheel and the only source distribution of a folder."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"hzo", "hzo_lab"}, f"the wheel holds {tops}"
    assert {"hzo/py.typed", "hzo/_version.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names), "no license"
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml", "docs/start.md"} <= inside
    assert not any(name.startswith(("results", ".venv", "site/")) for name in inside), (
        "figures of record are not for users"
    )
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel], check=True
        )
        # -P, -S would hide torch, too: the folder of the wheel goes first instead.
        program = f"import sys; sys.path.insert(0, {place!r})\n" + PROGRAM.format(place=place)
        said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=place)
    version = said.stdout.strip()
    assert f"-{version}-" in wheel.name, f"the wheel is named {wheel.name}, the package says {version}"
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1024:.0f} KiB" for path in (wheel, source))
    print(f"{sizes}: checked, hzo {version} runs from the wheel alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
