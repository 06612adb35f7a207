"""Every error that the source raises on purpose: class, place and wording, read from the code itself."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Message:
    """One ``raise``. ``text`` has … where a value is filled in."""

    error: str
    module: str
    text: str
    number: int  # among those of its class, from 1

    @property
    def anchor(self) -> str:
        return f"{self.error.lower()}-{self.number}"


def classes(source: Path) -> dict[str, str]:
    """Errors and warnings of the library and of the application, with their first sentences."""
    found = {}
    for file in (source / "hzo/errors.py", source / "hzo_lab/errors.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = ast.get_docstring(node) or ""
    return found


def all_messages(source: Path) -> list[Message]:
    """In the order of classes, then of modules and lines."""
    known = classes(source)
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in known}
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        for call in calls(ast.parse(path.read_text(encoding="utf-8")), set(known)):
            name, text = call
            if (module, text) not in found[name]:
                found[name].append((module, text))
    return [
        Message(name, module, text, number)
        for name, messages in found.items()
        for number, (module, text) in enumerate(messages, start=1)
    ]


def calls(tree: ast.AST, known: set[str]) -> list[tuple[str, str]]:
    """Every place where an error is made, or a warning given: its class, and its wording."""
    made = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in known and node.args:
            made.append((name, wording(node.args[0])))
        elif name == "warn" and len(node.args) > 1 and getattr(node.args[1], "id", "") in known:
            made.append((node.args[1].id, wording(node.args[0])))
    return [(name, text) for name, text in made if re.search(r"\w", text)]


def wording(node: ast.AST) -> str:
    """The text of a message; … stands for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        text = "".join("…" if isinstance(part, ast.FormattedValue) else wording(part) for part in node.values)
        return re.sub("…+", "…", text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return wording(node.left) + wording(node.right)
    if isinstance(node, ast.IfExp):
        return f"{wording(node.body)} / {wording(node.orelse)}"
    return "…"


def as_markdown(messages: list[Message]) -> str:
    """A list for each class, an anchor for each message."""
    lines = []
    for name in dict.fromkeys(message.error for message in messages):
        own = [message for message in messages if message.error == name]
        lines += [f"### Messages of {name} {{#messages-{name.lower()}}}", "", '<dl class="hzo-messages">']
        for message in own:
            lines.append(f'<dt id="{message.anchor}"><code>{escape(message.module)}</code></dt>')
            lines.append(f"<dd>{escape(message.text)}</dd>")
        lines += ["</dl>", ""]
    return "\n".join(lines)
