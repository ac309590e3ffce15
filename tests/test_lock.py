"""requirements.lock: one version of each package per platform, all with hashes, of what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKED = (ROOT / "requirements.lock").read_text()
ENTRIES = [entry.replace("\\\n", " ") for entry in re.split(r"\n(?=[a-z0-9])", LOCKED.strip())]


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_package_is_pinned_with_hashes():
    for entry in ENTRIES:
        requirement = Requirement(entry.split("--hash", 1)[0].strip())
        (pin,) = requirement.specifier
        assert pin.operator == "==", entry
        assert "*" not in pin.version
        assert not requirement.url
        hashes = re.findall(r"--hash=(\S+)", entry)
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for found in hashes)
    assert "http://" not in LOCKED
    assert "https://" not in LOCKED


def test_what_is_asked_for_is_there_in_a_version_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for line in (*project["dependencies"], *extras["board"], *extras["split"])]
    asked += [Requirement(line) for line in extras["federated"]] + requirements("constraints.txt")
    pins: dict[str, list[str]] = {}
    for entry in ENTRIES:
        requirement = Requirement(entry.split("--hash", 1)[0].strip())
        pins.setdefault(canonicalize_name(requirement.name), []).append(next(iter(requirement.specifier)).version)
    for requirement in asked:
        found = pins[canonicalize_name(requirement.name)]
        assert found
        assert all(requirement.specifier.contains(version) for version in found), (requirement, found)
