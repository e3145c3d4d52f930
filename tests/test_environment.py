"""pyproject.toml, environment.yml and requirements.txt name the same packages and bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"pytorch": "torch"}
CONDA_ONLY = {"pip"}
OF_ITS_OWN = {"vllm"}  # an extra for another environment: vLLM pins its torch

Bounds = dict[str, str]


def describe(requirement: Requirement) -> str:
    bounds = ",".join(sorted(str(part) for part in requirement.specifier)) or "no bounds"
    return f"{bounds}; {requirement.marker}" if requirement.marker else bounds


def pyproject_requirements(text: str) -> list[Requirement]:
    project = tomllib.loads(text)["project"]
    lines = list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        lines += [] if name in OF_ITS_OWN else extra
    return [Requirement(line) for line in lines]


def pythons(text: str) -> SpecifierSet:
    return SpecifierSet(tomllib.loads(text)["project"]["requires-python"])


def pyproject_bounds(text: str) -> Bounds:
    return {
        canonicalize_name(requirement.name): describe(requirement)
        for requirement in pyproject_requirements(text)
    }


def conda_bounds(text: str) -> Bounds:
    bounds = {}
    for entry in yaml.safe_load(text)["dependencies"]:
        lines = entry["pip"] if isinstance(entry, dict) else [entry]
        for line in lines:
            if line.startswith("python="):
                continue
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name not in CONDA_ONLY:
                bounds[CONDA_NAMES.get(name, name)] = describe(requirement)
    return bounds


def environment_differences(pyproject: str, environment: str) -> list[str]:
    ours, theirs = pyproject_bounds(pyproject), conda_bounds(environment)
    versions = re.findall(r"(?m)^  - python=(\S+)$", environment)
    found = []
    if len(versions) != 1 or versions[0] not in pythons(pyproject):
        found.append(
            f"python: pyproject.toml asks {pythons(pyproject)}, environment.yml has {versions}"
        )
    return found + [
        f"{name}: pyproject.toml has {ours.get(name, 'nothing')!r}, "
        f"environment.yml has {theirs.get(name, 'nothing')!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def pin_lines(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pin_differences(pyproject: str, requirements: str) -> list[str]:
    found = []
    pins: dict[str, Requirement] = {}
    for line in pin_lines(requirements):
        if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*(; .+)?", line):
            found.append(f"requirements.txt: {line!r} is not a plain pin")
            continue
        pin = Requirement(line)
        if pin.name in pins:
            found.append(f"{pin.name}: requirements.txt pins it twice")
        pins[pin.name] = pin
    for wanted in pyproject_requirements(pyproject):
        name = canonicalize_name(wanted.name)
        if name not in pins:
            found.append(f"{name}: requirements.txt has no pin")
            continue
        (pinned,) = (part.version for part in pins[name].specifier)
        if Version(pinned) not in wanted.specifier:
            found.append(
                f"{name}: requirements.txt pins {pinned}, pyproject.toml asks {wanted.specifier}"
            )
        if (pins[name].marker is None) != (wanted.marker is None):
            found.append(
                f"{name}: requirements.txt has the marker {pins[name].marker}, "
                f"pyproject.toml {wanted.marker}"
            )
    return found


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the file"
    return text.replace(old, new)


def test_environment_yml_has_the_bounds_of_pyproject() -> None:
    found = environment_differences(read("pyproject.toml"), read("environment.yml"))
    assert not found, "\n" + "\n".join(found)


def test_every_pin_lies_within_the_bounds_of_pyproject() -> None:
    found = pin_differences(read("pyproject.toml"), read("requirements.txt"))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("  - pytorch >=2.11\n", "  - pytorch >=2.10\n", "torch"),
        ("  - nbval >=0.11\n", "", "nbval"),
        ("  - python=3.12\n", "  - python=3.10\n", "python"),
        ("  - python=3.12\n", "", "python"),
        ("  - pip\n", "  - pip\n  - scipy\n", "scipy"),
        ('; platform_system == "Linux"', "", "triton"),
    ],
)
def test_a_change_in_environment_yml_is_reported(old: str, new: str, name: str) -> None:
    environment = changed(read("environment.yml"), old, new)
    (line,) = environment_differences(read("pyproject.toml"), environment)
    assert line.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("numpy==3.0", "numpy: requirements.txt pins 3.0, pyproject.toml asks"),
        ("numpy>=2", "'numpy>=2' is not a plain pin"),
        ("numpy==2.0; sys_platform == 'linux'", "numpy: requirements.txt has the marker"),
        ("", "numpy: requirements.txt has no pin"),
    ],
)
def test_a_wrong_pin_is_reported(pin: str, message: str) -> None:
    requirements = re.sub(r"(?m)^numpy==.*$", pin, read("requirements.txt"))
    found = pin_differences(read("pyproject.toml"), requirements)
    assert any(message in line for line in found), found
