"""What the documentation site needs beside MkDocs' own plugins.

Pages link to figures and pages that lie outside ``docs/`` (``results/``, ``examples/README.md``, ...), as
one reads them in the repository. Here these files join the site, and the links follow. Equations become MathML, so that
no script is fetched from elsewhere. The page of errors gets every message that the source holds.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from error_messages import all_messages, as_markdown  # noqa: E402  # beside this file

PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "experiments/README.md", "benchmarks/README.md")
FIGURES = ("results/**/*.png",)
OUTSIDE = "results|examples|experiments|benchmarks"


def on_files(files: Files, config: Any) -> Files:
    """Add pages and figures from outside ``docs/``."""
    figures = [str(path.relative_to(ROOT)) for pattern in FIGURES for path in sorted(ROOT.glob(pattern))]
    for name in (*PAGES, *figures):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to what lies beside ``docs/`` in the repository are links inside the site."""
    name = page.file.src_uri
    if name == "errors.md":
        markdown = markdown.replace("<!-- every message -->", as_markdown(all_messages(ROOT / "src")))
    if name in PAGES:
        markdown = re.sub(r"\]\((\.\./)?docs/", lambda m: f"]({m[1] or ''}", markdown)
        markdown = re.sub(r"\]\(results/\)", "](results.md)", markdown)
        return re.sub(r"\[([^\]]+)\]\((?:\w+/)+\)", r"\1", markdown)  # folders are no pages
    up = "../" * name.count("/")
    return re.sub(rf"\]\({re.escape(up)}\.\./({OUTSIDE}|CHANGELOG|CONTRIBUTING)", rf"]({up}\1", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Equations as MathML; the literal-block mark of docstrings is no text; figures lead to themselves in full size; a
    notebook has a link to its file."""
    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _equation, content, flags=re.DOTALL)
    content = re.sub(r'(href="(?!\w+:)[^"#]+)\.(?:md|ipynb)(#[^"]*)?"', r'\1.html\2"', content)  # of notebooks
    content = re.sub(r'(<img [^>]*src="([^":]+\.png)"[^>]*>)', r'<a href="\2">\1</a>', content)
    if page.file.src_uri.endswith(".ipynb"):
        name = Path(page.file.src_uri).name
        content = content.replace("</h1>", f'</h1><p><a href="{name}" download>Download this notebook</a></p>', 1)
    return content.replace("<p>::</p>", "")


def _equation(found: re.Match[str]) -> str:
    tex = html.unescape(found[2]).strip()
    block = tex.startswith("\\[")
    return convert(tex[2:-2].strip(), display="block" if block else "inline")
