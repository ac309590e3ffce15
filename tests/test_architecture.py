"""The house rules, read from the source itself. Every rule has a negative twin: a snippet that must be caught."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "sotto").rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60

# What each of the four packages may import of the rest of Sotto, besides itself.
FOUNDATION = ("sotto.config", "sotto.errors")
LAYERS = {
    "sotto.data": FOUNDATION,
    "sotto.models": FOUNDATION,
    "sotto.gradients": FOUNDATION,
    "sotto.privacy": (*FOUNDATION, "sotto.gradients.base"),
}
TORCH_IN_PRIVACY = {"sotto.privacy.noise", "sotto.privacy.mechanism"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NETWORK = {
    "grpc", "requests", "httpx", "aiohttp", "socket", "http", "urllib", "ftplib", "smtplib", "websockets", "uvicorn",
}  # fmt: skip
CONNECTIONS = {"sotto.split.superlink", "sotto.split.supernode"}
"""The two ends of the one connection that Sotto opens, where the user names the other side."""
SECRET = re.compile(r"^_?(.*_key|key|secret|secrets|password|passwd|credential|api_token|access_token)$")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- the rules: (module name, source) -> problems


def imports(tree: ast.AST, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` gives `a` and `a.b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not typing_too:
            for other in node.orelse:
                yield from imports(ast.Module([other], []), typing_too)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))
        yield from imports(node, typing_too)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def breaks_layers(module: str, source: str) -> list[str]:
    """The four packages meet only in `gradients/base.py`, `privacy/plan.py` and whoever uses all of them."""
    home = next((layer for layer in LAYERS if inside(module, layer)), None)
    if home is None:
        return []
    found = []
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            found.append(f"{line}: relative import {name}")
        elif inside(name, "sotto") and name != "sotto":
            allowed = (home, *LAYERS[home])
            parents = any(inside(a, name) for a in allowed) and not any(inside(name, a) for a in allowed)
            if not parents and not any(inside(name, a) for a in allowed):
                found.append(f"{line}: {home} imports {name}")
    return found


def uses_torch(module: str, source: str) -> list[str]:
    if not inside(module, "sotto.privacy") or module in TORCH_IN_PRIVACY:
        return []
    return [f"{line}: imports {n}" for line, n in imports(ast.parse(source), typing_too=False) if inside(n, "torch")]


def too_long(module: str, source: str) -> list[str]:
    lines, found = len(source.splitlines()), []
    if lines > LONGEST_MODULE:
        found.append(f"{lines} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{node.lineno}: {node.name} has {length} lines")
    return found


def lacks_docstring(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return ["no module docstring"] if tree.body and ast.get_docstring(tree) is None else []


def runs_foreign_code(module: str, source: str) -> list[str]:
    """No pickle, no `torch.load`, no remote code, no `eval` or `exec`, no shell."""
    tree, found = ast.parse(source), []
    for line, name in imports(tree):
        if name.split(".")[0] in PICKLES or name in ("torch.load", "os.system"):
            found.append(f"{line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load",
            "os.system",
            "np.load",
            "numpy.load",
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{node.lineno}: {node.func.id}(")
            pairs = [(k.arg, k.value) for k in node.keywords]
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        else:
            continue
        for key, value in pairs:
            if key in ("trust_remote_code", "allow_pickle", "shell") and ast.unparse(value) != "False":
                found.append(f"{node.lineno}: {key}={ast.unparse(value)}")
    return found


def reaches_out(module: str, source: str) -> list[str]:
    """Sotto opens no connection by itself: there are the Hub client of Hugging Face, and the ends of Flower."""
    if module in CONNECTIONS:
        return []
    return [f"{line}: {name}" for line, name in imports(ast.parse(source)) if name.split(".")[0] in NETWORK]


def prints_secrets(module: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if not re.search(r"(^|\.)(print|debug|info|warning|warn|error|exception|log)$", called):
            continue
        for part in (p for a in [*node.args, *(k.value for k in node.keywords)] for p in ast.walk(a)):
            name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
            if SECRET.match(name):
                found.append(f"{node.lineno}: {called}(... {name} ...)")
    return found


BAD = {
    breaks_layers: [
        ("sotto.data.units", "from sotto.models import load"),
        ("sotto.data.units", "def f():\n    import sotto.privacy.plan"),
        ("sotto.models.load", "from sotto import data"),
        ("sotto.models.load", "from sotto.gradients.base import ClippedSum"),
        ("sotto.gradients.engine", "from sotto.privacy.noise import SecureNoise"),
        ("sotto.gradients.engine", "import importlib\nimportlib.import_module('sotto.data')"),
        ("sotto.privacy.ledger", "from sotto.gradients.engine import attach"),
        ("sotto.privacy.ledger", "from sotto.gradients import engine"),
        ("sotto.privacy.ledger", "from sotto.session import start"),
        ("sotto.privacy.ledger", "from ..data import units"),
    ],
    uses_torch: [
        ("sotto.privacy.ledger", "import torch.nn as nn"),
        ("sotto.privacy.plan", "def f():\n    from torch import Tensor"),
        (
            "sotto.privacy.plan",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch",
        ),
    ],
    too_long: [
        ("sotto.x", "\n" * 401),
        ("sotto.x", "def f():\n" + "    x = 1\n" * 60),
    ],
    lacks_docstring: [("sotto.x", "import os\n")],
    runs_foreign_code: [
        ("sotto.x", "import torch\ntorch.load('x')"),
        ("sotto.x", "from torch import load"),
        ("sotto.x", "import pickle"),
        ("sotto.x", "f(trust_remote_code=True)"),
        ("sotto.x", "options = {'trust_remote_code': flag}"),
        ("sotto.x", "np.load(p, allow_pickle=False)"),
        ("sotto.x", "eval('1')"),
        ("sotto.x", "exec(code)"),
        ("sotto.x", "subprocess.run(command, shell=True)"),
    ],
    reaches_out: [
        ("sotto.split.x", "import grpc"),
        ("sotto.split.apps", "import httpx"),
        ("sotto.split.network", "import uvicorn"),
        ("sotto.x", "import requests"),
        ("sotto.x", "from urllib.request import urlopen"),
    ],
    prints_secrets: [
        ("sotto.x", "print(self._key)"),
        ("sotto.x", "logger.info(f'{run.sampling_key}')"),
        ("sotto.x", "console.print(secret['x'])"),
    ],
}
GOOD = {
    breaks_layers: [
        ("sotto.privacy.mechanism", "from sotto.gradients.base import ClippedSum"),
        ("sotto.privacy.plan", "from sotto.config import Config\nfrom sotto.errors import SottoError"),
        ("sotto.data.load", "from sotto.data import formats"),
        ("sotto.session", "from sotto.models import load"),
    ],
    uses_torch: [
        ("sotto.privacy.noise", "import torch"),
        ("sotto.privacy.plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
    too_long: [("sotto.x", 'def f():\n    """' + "long\n" * 70 + '"""\n    return 1')],
    lacks_docstring: [("sotto.x", "")],
    runs_foreign_code: [("sotto.x", "model.eval()\nf(trust_remote_code=False)\nhas_eval(x)")],
    reaches_out: [("sotto.x", "import hashlib")],
    prints_secrets: [("sotto.x", "print(f'step {step}')\nuse(self._key)")],
}
Rule = Callable[[str, str], list[str]]


def cases(table: dict[Rule, list[tuple[str, str]]]) -> list[object]:
    return [
        pytest.param(rule, *case, id=f"{rule.__name__}-{i}")
        for rule, found in table.items()
        for i, case in enumerate(found)
    ]


@pytest.mark.parametrize("rule", list(BAD), ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    assert len(MODULES) > 40
    found = {
        str(path.relative_to(ROOT)): problems
        for path in MODULES
        if (problems := rule(name_of(path), path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(("rule", "module", "source"), cases(BAD))
def test_the_rule_catches(rule: Rule, module: str, source: str) -> None:
    assert rule(module, source)


@pytest.mark.parametrize(("rule", "module", "source"), cases(GOOD))
def test_the_rule_lets_pass(rule: Rule, module: str, source: str) -> None:
    assert not rule(module, source)


# ---- the text of the project speaks of no machine and no registry

PRIVATE_PLACES = {
    # /home/ann and /home/a are the invented users of the examples.
    "an absolute path": re.compile(r"(?<![\w.~/}-])/(?:(?:work|opt|root|tmp|mnt|Users)/|home/(?!a(nn)?/))"),
    "a registry": re.compile(r"pythonhosted|pypi\.org|artifactory|--(extra-)?index-url|proxy\.golang", re.IGNORECASE),
    "a folder outside the project": re.compile(r"\bshared/|\.\./(shared|specs)"),
}


def speaks_of(text: str) -> list[str]:
    return [
        f"{number}: {what}: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in PRIVATE_PLACES.items()
        if pattern.search(line)
    ]


def project_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p != Path(__file__) and p.name != "LICENSE"]


def test_no_file_names_a_machine_a_registry_or_a_folder_outside() -> None:
    found = {}
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if problems := speaks_of(text):
            found[str(path.relative_to(ROOT))] = problems
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "see /work/main/x",
        "'/tmp/venv/bin'",
        "(/root/x)",
        "/home/someone/x",
        "pip --index-url https://x",
        "in shared/data",
        "../specs",
    ],
)
def test_names_of_places_are_caught(text: str) -> None:
    assert speaks_of(text)


@pytest.mark.parametrize(
    "text", ["network/tmp_x", "./work/", "/home/ann/x", "tmp_path / 'root'", "a/b/../", "runs/…/model"]
)
def test_other_text_passes(text: str) -> None:
    assert not speaks_of(text)


# ---- what starts fast stays fast


@pytest.mark.parametrize(
    "module",
    ["sotto", "sotto.cli", "sotto.config", "sotto.privacy.accounting", "sotto.privacy.plan", "sotto.privacy.ledger"],
)
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'transformers', 'datasets'}} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_that_check_would_notice() -> None:
    code = "import sys, sotto.privacy.noise; sys.exit(' '.join({'torch'} & {*sys.modules}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "torch"
