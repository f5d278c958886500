"""The hand-written pages: links, paths and commands in them exist, and the README stays short."""

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest

from dtem.main import dtem

ROOT = Path(__file__).parents[2]
MAX_README_LINES = 130
TOP_FOLDERS = ("app", "benchmarks", "deploy", "docs", "dtem", "examples", "model_store", "tests", "training")
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join(TOP_FOLDERS)})/[\w./-]*")
MODULE = re.compile(r"-m ((?:app|benchmarks|deploy|dtem|training)[\w.]*)")
DTEM = re.compile(r"^ *(?:\.venv/bin/|torchrun .*-m |[A-Z_]+=\S+ )*dtem (\w+)(.*)$", re.MULTILINE)
TREE_LINE = re.compile(r"( *)([\w./-]+) +\S.*")


@cache
def list_pages() -> list[str]:
    """List the Markdown files of the repository, ignored ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(page for page in listed if (ROOT / page).is_file())


# Records of the past name files as they were then.
CURRENT_PAGES = [page for page in list_pages() if page not in ("CHANGELOG.md", "training/LOG.md")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find_anchors(page: str) -> set[str]:
    """List the anchors of a page's headings, as Git hosts create them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def find_broken_links(page: str) -> list[str]:
    broken = []
    for link in LINK.findall(FENCE.sub("", read(page))):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in find_anchors(str(target.resolve().relative_to(ROOT)))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", list_pages())
def test_every_relative_link_resolves(page: str) -> None:
    assert find_broken_links(page) == []


@pytest.mark.parametrize("page", CURRENT_PAGES)
def test_every_path_in_backticks_exists(page: str) -> None:
    words = CODE.findall(FENCE.sub("", read(page)))
    missing = [word for word in words if PATH.fullmatch(word) and not (ROOT / word).exists()]
    assert missing == []


@pytest.mark.parametrize("page", CURRENT_PAGES)
def test_every_command_names_a_module_that_exists(page: str) -> None:
    modules = [name.rstrip(".").replace(".", "/") for name in MODULE.findall(read(page))]
    missing = [name for name in modules if not (ROOT / f"{name}.py").exists() and not (ROOT / name).is_dir()]
    assert missing == []


@pytest.mark.parametrize("page", list_pages())
def test_every_dtem_command_in_a_block_is_accepted(page: str) -> None:
    blocks = "\n".join(FENCE.findall(read(page))).replace("\\\n", " ")
    for name, rest in DTEM.findall(blocks):
        arguments = shlex.split(rest.partition(" | ")[0], comments=True)
        with dtem.commands[name].make_context(name, arguments, parent=click.Context(dtem)):
            pass


def test_every_path_of_the_architecture_tree_exists() -> None:
    (tree,) = re.findall(
        r"^## Where things are\n\n```text\n(.*?)^```", read("docs/architecture.md"), re.MULTILINE | re.DOTALL
    )
    folders: list[str] = []
    for line in tree.splitlines():
        found = TREE_LINE.fullmatch(line)
        assert found, line
        depth = len(found[1]) // 2
        folders[depth:] = [found[2]]
        path = ROOT / "/".join(folders)
        assert path.exists(), path
        assert path.is_dir() == line.split()[0].endswith("/"), path
    assert set(TOP_FOLDERS) <= {line.split("/")[0] for line in tree.splitlines()}


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= MAX_README_LINES
