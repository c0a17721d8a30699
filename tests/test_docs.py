"""The documentation names all there is, and nothing that is not there."""

import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import ckpt_callbacks as cc
from ckpt_callbacks.cli import main
from ckpt_callbacks.hookspecs import Specs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HOOKS = [name for name in vars(Specs) if name.startswith("on_")]
MODULES = [
    "ckpt_callbacks",
    "ckpt_callbacks.lora",
    "ckpt_callbacks.stores",
    "ckpt_callbacks.testing",
    "ckpt_callbacks_mlflow",
    "ckpt_callbacks_tunix",
    "ckpt_callbacks_wandb",
]


def each_page(*pages: Path) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_is_in_the_reference(module: str) -> None:
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    there = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))

    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__}

    assert names <= there, f"docs/reference lacks {sorted(names - there)}"


def test_the_reference_has_no_other_names() -> None:
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))

    for name in re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert attribute in importlib.import_module(module).__all__, name


@pytest.mark.parametrize("name", HOOKS)
def test_the_guide_has_each_hook_with_its_signature_and_what_it_is_for(name: str) -> None:
    spec = getattr(Specs, name)
    event = inspect.signature(spec).parameters["event"].annotation

    guide = (DOCS / "plugins.md").read_text()

    assert getattr(cc, event)
    signature = f"    def {name}(self, event: cc.{event}) -> None:"
    assert f'{signature}\n        """{spec.__doc__}"""' in guide


@each_page(*PAGES)
def test_what_a_page_leads_to_is_there(page: Path) -> None:
    text = page.read_text()

    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:benchmarks|docs|examples|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@each_page(*PAGES)
def test_each_command_on_a_page_is_one(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(ckpt-callbacks [^`]+)`", text)]:
        words = shlex.split(line, comments=True)
        if words[:1] != ["ckpt-callbacks"]:
            continue
        command = main.get_command(click.Context(main), words[1])
        assert command, line
        parser = command.make_parser(click.Context(command))
        parser.parse_args(words[2:] or ["--help"])  # raises `NoSuchOption`, `BadOptionUsage`


def test_the_page_of_the_commands_lists_all_of_them() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output

    assert shown[shown.index("See:") :] in (DOCS / "how-to" / "command-line.md").read_text()


def test_each_environment_on_a_page_is_one() -> None:
    named = {name for page in PAGES for name in re.findall(r"tox run -e (\w+)", page.read_text())}
    there = re.findall(r"^\[testenv:(\w+)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)

    assert named <= {*there, "py", "NAME"}


def test_the_picture_shows_what_the_policy_decides() -> None:
    drawn = runpy.run_path(str(DOCS / "images" / "joint_retention.py"))

    assert drawn["TARGET"].read_text() == drawn["drawing"]()


def test_each_page_is_in_the_table_of_contents() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]

    listed = re.findall(r"^ *- (?:.*: )?([\w/-]+\.md)$", nav, re.MULTILINE)

    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])
