"""The page of errors is complete, commands shown in the docs exist, and what is said in several places is the same."""

import ast
import re
import shlex
from pathlib import Path

import error_messages  # what the page of errors is made with
import pytest

import hzo
import hzo.errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])

MESSAGES = error_messages.all_messages(ROOT / "src")
CLASSES = error_messages.classes(ROOT / "src")
ERRORS = (ROOT / "docs/errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_an_anchor_with_a_way_on(name):
    heading = f"### {name} {{#{name.lower()}}}\n"
    assert heading in ERRORS
    text = ERRORS.partition(heading)[2].partition("\n#")[0]
    assert "Way on" in text or "](#" in text or name in ("HzoError", "HzoWarning"), "say what to do next"
    for base in getattr(getattr(hzo.errors, name, None), "__bases__", ()):
        if base.__module__ == "builtins" and base not in (Exception, UserWarning):
            assert f"`{base.__name__}`" in text, "say what else it is"


def test_no_class_is_made_up():
    shown = set(re.findall(r"^### (\w+(?:Error|Warning)) ", ERRORS, re.M))
    assert shown == set(CLASSES)


def test_symptoms_are_words_of_messages():
    table = ERRORS.partition("| you see | what it is |")[2].partition("\n\n")[0]
    everything = "\n".join(message.text for message in MESSAGES)
    symptoms = re.findall(r'"([^"]+)"', table)
    assert len(symptoms) > 15
    assert [symptom for symptom in symptoms if symptom not in everything] == []


def test_the_list_of_messages_misses_none():
    """Counted in another way: by the text of the source."""
    places = 0
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                text = ast.unparse(node.exc.args[0])
                places += name in CLASSES and bool(re.search(r"['\"]", text))
    assert len(MESSAGES) >= 0.93 * places  # some places say the same
    assert len({message.anchor for message in MESSAGES}) == len(MESSAGES)
    listed = error_messages.as_markdown(MESSAGES)
    assert all(f'id="{message.anchor}"' in listed for message in MESSAGES)


COMMANDS = [
    (path.name, line.split("#")[0].strip())
    for path in PAGES
    for block in re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command[:60]}" for page, command in COMMANDS])
def test_commands_exist(page, command):
    words = shlex.split(command)
    for word in words:
        if re.fullmatch(r"(scripts|experiments|benchmarks|examples)/[\w/]+\.\w+", word):
            assert (ROOT / word).is_file()
    if words[0] == "hzo":
        from typer.main import get_command

        from hzo_lab.cli import commands, reproduce_command, zoo_command  # noqa: F401  # each adds itself

        app = get_command(commands.app)
        options = {option for p in app.params for option in p.opts} | {"--install-completion", "--show-completion"}
        if words[1].startswith("-"):
            assert words[1] in options | {"--help"}
            return
        command = app.commands[words[1]]
        if words[1] == "zoo":
            from hzo_lab.zoo.command import _parser

            _parser().parse_args(words[2:])
            return
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word for word in words[2:] if word.startswith("--")} <= known
    if words[:2] == ["pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\[([\w,]+)\]", command if isinstance(command, str) else ""):
            for name in extra.split(","):
                assert f"\n{name} = [" in project


def test_every_public_name_is_in_the_reference():
    reference = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.md"))
    assert {name for name in hzo.__all__ if f"::: hzo.{name}\n" not in reference} <= {"baselines", "__version__"}
    for name in set(hzo.baselines.__all__) - {"compare_gradients", "GradientComparison", "BASELINES", "Baseline"}:
        assert f"::: hzo.baselines.{name}\n" in reference


def test_versions_are_said_once():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    python, torch = (
        re.search(r'requires-python = ">=([\d.]+)"', project)[1],
        re.search(r'"torch>=([\d.]+),', project)[1],
    )
    assert re.search(rf"\| Python \| {re.escape(python)} \|", page)
    tested, newest = (re.escape(_pinned("torch", f)) for f in ("constraints.txt", "scripts/newest_constraints.txt"))
    assert re.search(rf"\| torch \| {re.escape(torch)}(\.0)? \| {tested} \| {newest} \|", page)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hzo.__version__}\n" in citation
    assert f"## {hzo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _pinned(name, constraints):
    return re.search(rf"^{name}==([\w.]+)", (ROOT / constraints).read_text(encoding="utf-8"), re.M)[1]
