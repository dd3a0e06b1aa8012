"""Builds a corpus from the docstrings of installed packages, without a download. In: package names. Out: training and
validation documents, and the versions of the packages.

Files are parsed, never imported. Each top-level class or function becomes one document, which holds its docstring and
the docstrings of all definitions inside it. A document that would be too short is added to the document of its module.
Repeated paragraphs are dropped. A hash of a document's name decides whether the document is held out for validation.
The same package versions give the same corpus.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Besides the standard library, the corpus covers our core dependencies and the packages that they depend on.
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "scipy", "ml_dtypes", "tensorstore", "tiktoken",
    "pyarrow", "huggingface_hub", "safetensors", "rich", "pygments", "regex", "requests", "urllib3",
    "fsspec", "tqdm", "absl", "etils", "opt_einsum", "treescope", "humanize", "yaml", "msgpack", "filelock",
)  # fmt: skip
SKIP_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
MIN_CHARS = 200  # the minimum number of characters in a document
MIN_PARAGRAPH = 60  # characters; a shorter paragraph, such as a heading, is kept even if it is repeated
HELD_OUT = 64  # about one in 64 documents is held out for validation

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def build(packages: Iterable[str]) -> tuple[list[str], list[str], dict[str, str | None]]:
    """Returns (shuffled training documents, validation documents, versions).

    `versions` maps each package to its version, or to None if the package is not installed. The corpus always includes
    the standard library, which `versions` lists as "python".
    """
    files = _module_files(Path(sysconfig.get_paths()["stdlib"]), "")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        versions[package] = _version(package) if spec else None
        for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
            files += _module_files(Path(folder), package)

    # Parsing takes about 20 s on one core, so several processes share the work. They are spawned, because a forked copy
    # of a process that runs JAX may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=context) as pool:
        modules = pool.map(module_documents, *zip(*sorted(files), strict=True), chunksize=64)
        named = _drop_repeated_paragraphs(document for module in modules for document in module)

    train = [text for name, text in named if not is_held_out(name)]
    random.Random(42).shuffle(train)
    return train, [text for name, text in named if is_held_out(name)], versions


def is_held_out(name: str) -> bool:
    """Whether the document called `name` is held out for validation."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def module_documents(module: str, path: str) -> list[tuple[str, str]]:
    """Returns (name, text) for each document of a Python file, such as ("pets.Dog", "pets.Dog\\n\\nBarks at ...").

    Returns [] if the file cannot be parsed.
    """
    try:
        source = Path(path).read_bytes()
        if b'"""' not in source and b"'''" not in source and module != "pydoc_data.topics":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as warnings about invalid escapes in strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    if module == "pydoc_data.topics":  # this module holds the language reference, in a dictionary of strings
        return [d for d in _topics(module, tree) if len(d[1]) >= MIN_CHARS]

    documents, short = [], _clean(ast.get_docstring(tree) or "")
    for name, text in _sections(tree, module):
        if len(text) >= MIN_CHARS:
            documents.append((name, text))
        else:
            short += f"\n\n{text}"
    text = f"{module}\n\n{short.strip()}"
    return [(module, text), *documents] if len(text) >= MIN_CHARS else documents


def _module_files(folder: Path, package: str) -> list[tuple[str, str]]:
    """Returns (dotted name, path) for each Python file in a folder and its subfolders, except tests.

    Example, for the package jax: ("jax.nn", ".../jax/nn/__init__.py").
    """
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIP_FOLDERS)
        for name in names:
            parts = list(Path(root, name).relative_to(folder).with_suffix("").parts)
            if name.endswith(".py") and not name.startswith("test_") and not name.endswith("_test.py"):
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                files.append((".".join([package] * bool(package) + parts) or package, str(Path(root, name))))
    return files


def _version(package: str) -> str:
    """Returns the version of an installed package, such as "0.10.2" for "jax".

    A package and its distribution may have different names: the distribution PyYAML provides the package yaml.
    """
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(distributions[0])


def _sections(tree: ast.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, text) for each top-level class or function of a module. The text holds the
    docstring of this definition and the docstrings of all definitions inside it."""
    for node in _definitions(tree):
        if isinstance(node, ast.Call):  # add_newdoc("module", "name", "docs") documents a function written in C
            strings = [a.value for a in ast.walk(node) if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            name = ".".join(s for s in strings if s.isidentifier() or re.fullmatch(r"[\w.]+", s)) or prefix
            parts = [f"{name}\n\n{_clean(s)}" for s in strings if "\n" in s]
        else:
            name = f"{prefix}.{node.name}"
            parts = list(_docstrings(node, name))
        if parts:
            yield name, "\n\n".join(parts)


def _docstrings(node: Definition, name: str) -> Iterator[str]:
    """Yields the docstrings of a definition and of all definitions inside it. Each docstring is preceded by the
    name of its definition."""
    if text := _clean(ast.get_docstring(node) or ""):
        yield f"{name}\n\n{text}"
    for child in _definitions(node):
        if not isinstance(child, ast.Call):
            yield from _docstrings(child, f"{name.rsplit('.', 1)[-1]}.{child.name}")


def _definitions(node: ast.AST) -> Iterator[Definition | ast.Call]:
    """Yields the classes, functions and add_newdoc calls directly inside a node, or inside its if, try and with
    blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            function = child.value.func
            if getattr(function, "attr", getattr(function, "id", "")) == "add_newdoc":
                yield child.value
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _definitions(child)


def _topics(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, text) for each string in a module's dictionaries.

    Example: {"if": "The if statement ..."} -> ("pydoc_data.topics.if", "The if statement ...").
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield f"{module}.{key.value}", _clean(value.value)


def _clean(text: str) -> str:
    """Removes surrounding white space, prompts such as >>>, and doctest markers.

    For example, ">>> 1 + 1  # doctest: +SKIP" becomes "1 + 1".
    """
    lines = []
    for line in text.expandtabs().rstrip().splitlines():
        line = re.sub(r"^(\s*)(?:>>>|\.\.\.)(?: |$)", r"\1", line)
        line = re.sub(r"\s*#\s*doctest:.*$", "", line).rstrip()
        if line.strip() != "<BLANKLINE>":
            lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _drop_repeated_paragraphs(named: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drops every paragraph that has occurred before, and then every document that has become too short.

    Scientific packages copy long passages from each other. Without this step, the training text would contain passages
    of the validation text.
    """
    seen, kept = set(), []
    for name, text in named:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            plain = re.sub(r"\W+", " ", paragraph.lower()).strip()
            if len(plain) >= MIN_PARAGRAPH:
                key = hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()
                if key in seen:
                    continue
                seen.add(key)
            paragraphs.append(paragraph)
        remainder = "\n\n".join(paragraphs)
        if len(remainder) >= MIN_CHARS:
            kept.append((name, remainder.encode("utf-8", "ignore").decode("utf-8")))  # drops lone surrogates
    return kept
