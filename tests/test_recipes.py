"""Every recipe that is shipped is a valid configuration, and its first line is the command that runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sotto.config import Config
from sotto.errors import SottoError

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
VARIABLES = ("SOTTO_SHARED", "SOTTO_MINILM")


@pytest.fixture(autouse=True)
def _dummies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def first_command(text: str) -> tuple[list[str], list[str]]:
    """(environment variables, words of the command) in the first line; raises if it holds no command."""
    first = text.splitlines()[0]
    assert first.startswith("# "), "the first line is a comment"
    words = shlex.split(first.removeprefix("# "))
    names = [word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    return names, words[len(names) :]


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_it_validates(recipe: Path) -> None:
    config = Config.load(recipe)
    assert not config.unused
    assert config.not_private is None, "a shipped recipe is private"
    assert config.privacy.delta < 1 / config.privacy.num_units
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_its_first_line_runs_it(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    names, command = first_command(text)
    federated = "kind: federated" in text
    action = ["federated", "simulate"] if federated else ["train"]
    assert command == ["sotto", *action, f"recipes/{recipe.name}"]
    assert set(names) == set(re.findall(r"\$\{(\w+)\}", text)), "the command names every variable that the file needs"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_without_its_variables_it_says_which(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = first_command(recipe.read_text(encoding="utf-8"))
    for name in VARIABLES:
        monkeypatch.delenv(name)
    with pytest.raises(SottoError, match="|".join(names)) as caught:
        Config.load(recipe)
    assert caught.value.code == "SOT104"


def test_a_misspelt_recipe_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPES[0].read_text(encoding="utf-8").replace("epsilon:", "epsilom:"), encoding="utf-8")
    with pytest.raises(SottoError, match="Did you mean 'epsilon'") as caught:
        Config.load(broken)
    assert caught.value.code == "SOT105"


@pytest.mark.parametrize("text", ["model:\n  name: x\n", "# a recipe for you\n"])
def test_a_first_line_without_the_command_is_noticed(text: str) -> None:
    with pytest.raises(AssertionError):
        assert first_command(text)[1][:2] == ["sotto", "train"]
