"""The documentation names files, functions and commands that exist."""

import ast
import errno
import importlib
import os
import re
from pathlib import Path

import pytest

from nanochat_jax.config import REPOSITORY

HOW_IT_WORKS = REPOSITORY / "docs" / "how-it-works.md"
FILES = (".md", ".toml", ".json", ".jsonl", ".py", ".js", ".sh", ".npy", ".parquet")
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def resolve(dotted: str) -> object:
    """training.loop.train -> the function `train` in nanochat_jax/training/loop.py. Raises for what does not exist."""
    parts = dotted.split(".")
    root = parts if parts[0] == "scripts" else ["nanochat_jax", *parts]
    for end in range(len(root), 0, -1):
        try:
            found = importlib.import_module(".".join(root[:end]))
        except ModuleNotFoundError:
            continue
        for name in root[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def test_every_function_that_how_it_works_names_exists():
    names = re.findall(r"`((?:\w+\.)+\w+)\(?\)?`", HOW_IT_WORKS.read_text(encoding="utf-8"))
    names = [n for n in names if not n.endswith(FILES)]
    missing = []
    for name in names:
        try:
            resolve(name)
        except (ModuleNotFoundError, AttributeError):
            missing.append(name)
    assert not missing
    rooms = {path.parent.name for path in (REPOSITORY / "nanochat_jax").glob("*/__init__.py")}
    assert {name.split(".")[0] for name in names} >= rooms, "the two stories pass through every room"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    named = re.findall(r"\b((?:nanochat_jax|scripts|tests|configs|docs|rustbpe)/[\w./-]*\w)", text)
    missing += [path for path in named if not (REPOSITORY / path).exists() and "NAME" not in path]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_exist(page: Path):
    modules = re.findall(r"python3? -m ((?:scripts|nanochat_jax)\.\w+)", page.read_text(encoding="utf-8"))
    for module in {m for m in modules if m != "scripts.NAME"}:
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_line_counts_in_the_readme_are_right():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")

    def lines(*patterns: str) -> int:
        files = [path for pattern in patterns for path in REPOSITORY.glob(pattern)]
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)

    core = lines(*(f"nanochat_jax/{room}/*.py" for room in ("model", "parallel", "training", "data", "engine")))
    python = lines("nanochat_jax/**/*.py", "scripts/**/*.py")
    rust, page = (
        lines("rustbpe/src/*.rs"),
        lines(*(f"nanochat_jax/serve/ui/*.{kind}" for kind in ("js", "css", "html"))),
    )
    paragraph = re.search(r"\*\*Reading it\.\*\*.*?HTML", readme, re.DOTALL)
    stated = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", paragraph[0])]
    assert stated == pytest.approx([core, python, rust, page], rel=0.02)


def test_the_messages_in_troubleshooting_are_printed_somewhere():
    """A heading that quotes a message quotes words of our code, or of the system; "..." stands for what varies."""
    printed = [os.strerror(number) for number in errno.errorcode]
    for path in [p for folder in ("nanochat_jax", "scripts") for p in (REPOSITORY / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                printed.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                printed.append(node.value if isinstance(node.value, str) else node.value.decode(errors="replace"))
    everything = "\n".join(printed)
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [words for heading in re.findall("^### (.*)", page, re.M) for words in re.findall('"(.+?)"', heading)]
    assert len(quoted) > 20
    assert not [part for words in quoted for part in map(str.strip, words.split("...")) if part not in everything]
