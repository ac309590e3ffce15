"""Documents are tests: commands exist, code runs, names of files and error codes are those of the source."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from sotto.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def shell_commands(text: str) -> list[str]:
    """Lines of bash blocks, and those after `$ ` in console blocks."""
    lines = [line for block in blocks(text, "bash", "sh") for line in block.splitlines()]
    lines += [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    inline = re.findall(r"`(sotto [a-z]+ [^`]*--[^`]+)`", text)
    return [line for line in [*lines, *inline] if line.strip()]


def parse(command: str) -> None:
    """Parses a `sotto` command against the real command line, without running it. Raises what the parser raises."""
    words = shlex.split(command.split(" > ")[0], comments=True)
    assert words[0] == "sotto"
    group, name, arguments = COMMANDS, words[1], words[2:]
    while True:
        assert name in group.commands, f"there is no command {name}"
        if not hasattr(group.commands[name], "commands"):
            break
        group, name, arguments = group.commands[name], arguments[0], arguments[1:]
    if arguments != ["--help"]:
        group.commands[name].make_context(name, list(arguments))


def sotto_commands() -> list[Any]:
    found = []
    for document in DOCUMENTS:
        for line in shell_commands(document.read_text(encoding="utf-8")):
            if line.startswith("sotto "):
                found.append(pytest.param(line, id=f"{document.name}: {line[:60]}"))
    return found


def test_readme_and_quickstart_show_every_command() -> None:
    for name in ("README.md", "docs/quickstart.md"):
        shown = {shlex.split(c)[1] for c in shell_commands((ROOT / name).read_text()) if c.startswith("sotto ")}
        assert shown == set(COMMANDS.commands), name


@pytest.mark.parametrize("command", sotto_commands())
def test_the_command_parses(command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    "command",
    [
        "sotto trian clinic.yaml",
        "sotto split simulat clinic.yaml",
        "sotto split simulate",
        "sotto plan",
        "sotto plan clinic.yaml --epsilon 4",
        "sotto init --model m --data d --units u",
        "sotto export runs/x",
        "sotto evaluate runs/x extra",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|Missing|unexpected|extra"):
        parse(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = document.read_text(encoding="utf-8")
    named = {
        w for c in shell_commands(text) if c.startswith("make ") for w in c.split("#")[0].split()[1:] if "=" not in w
    }
    named |= set(re.findall(r"`make ([a-z-]+)", text))
    assert named <= targets


# ---- Python in the documents


def python_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{document.name}-{i}")
        for document in DOCUMENTS
        for i, block in enumerate(blocks(document.read_text(encoding="utf-8"), "python"))
    ]


@pytest.mark.parametrize("block", python_blocks())
def test_python_compiles_and_uses_names_that_exist(block: str) -> None:
    import sotto

    tree = ast.parse(block)
    compile(tree, "document", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sotto":
            assert hasattr(sotto, node.attr), node.attr


def test_the_attach_block_runs() -> None:
    import torch

    (block,) = (b for b in blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python") if "attach" in b)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    total, model = names["total"], names["model"]
    assert total.norms.shape == (5,)
    assert total.sensitivity == 1.0
    assert not any(g.requires_grad for g in total.gradients.values()), "it would keep the graph alive"
    assert total.gradients.keys() == {name for name, _ in model.named_parameters()}
    assert float(torch.stack([g.norm() for g in total.gradients.values()]).norm()) <= 5.0 + 1e-4
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_the_example_runs_and_states_its_epsilon() -> None:
    script = ROOT / "examples" / "own_loop.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"epsilon <= ([\d.]+) at delta 0.0001", done.stdout)
    assert found
    assert 3.5 < float(found.group(1)) <= 4.0
    assert len(script.read_text().splitlines()) < 150


# ---- names of files


def tree(text: str) -> list[str]:
    """Paths of the tree block: two spaces of indentation are one folder, a folder's name ends with a slash."""
    (block,) = blocks(text, "tree")
    paths, above = [], []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above = above[:depth]
        paths.append("/".join([*(a.rstrip("/") for a in above), name]))
        if name.endswith("/"):
            above.append(name)
        assert len(line.split()) > 1, f"{name} has no description"
    return paths


def test_the_tree_names_only_what_exists() -> None:
    missing = [p for p in tree((ROOT / "README.md").read_text(encoding="utf-8")) if not exists(p)]
    assert not missing


def exists(path: str) -> bool:
    return (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_the_tree_names_every_module() -> None:
    named = set(tree((ROOT / "README.md").read_text(encoding="utf-8")))
    folders = {p for p in named if p.endswith("/") and not any(q.startswith(p) and q != p for q in named)}
    left_out = []
    for path in (ROOT / "sotto").rglob("*.py"):
        relative = path.relative_to(ROOT).as_posix()
        if relative not in named and path.name != "__init__.py" and not any(relative.startswith(f) for f in folders):
            left_out.append(relative)
    assert not left_out


def test_a_wrong_tree_is_noticed() -> None:
    paths = tree("```tree\nsotto/  code\n  train.py   the loop\nREADME.md  this\n```\n")
    assert paths == ["sotto/", "sotto/train.py", "README.md"]
    assert [exists(p) for p in paths] == [True, False, True]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]
    named = re.findall(r"`((?:sotto|docs|tests|examples|recipes|benchmarks)/[\w/]+\.\w+)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


# ---- generated and checked pages


def test_the_page_of_keys_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_configuration.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def raised_codes(source: str) -> set[str]:
    constants = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant))
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"SOT\d{3}", value)}


def test_every_error_code_is_explained_and_none_is_stale() -> None:
    raised = set().union(*(raised_codes(p.read_text(encoding="utf-8")) for p in (ROOT / "sotto").rglob("*.py")))
    rows = re.findall(r"^\| (SOT\d{3}) \| (\S.*?) \|$", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    codes = [code for code, _ in rows]
    assert codes == sorted(codes)
    assert len(codes) == len(set(codes))
    assert raised - set(codes) == set(), "raised but not in docs/errors.md"
    assert set(codes) - raised == set(), "in docs/errors.md but raised nowhere"


def test_codes_are_found_in_source_and_not_in_prose() -> None:
    assert raised_codes('"""SOT999 is prose"""\nraise SottoError("SOT123", what="SOT124 x")') == {"SOT123"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_codes_in_the_documents_exist(document: Path) -> None:
    raised = set().union(*(raised_codes(p.read_text(encoding="utf-8")) for p in (ROOT / "sotto").rglob("*.py")))
    assert set(re.findall(r"SOT\d{3}", document.read_text(encoding="utf-8"))) <= raised
