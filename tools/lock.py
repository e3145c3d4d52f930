"""Write requirements.txt: one pin for each package, on every platform that flashedu supports.

The script installs what pyproject.toml declares into a clean virtual environment and reads
the versions back. It then follows the declared dependencies for each system and each Python,
so that a package that only some of them need gets a marker.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent

SYSTEMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    "darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
    "win32": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
}
WHEEL_PLATFORMS = {
    "linux": "manylinux_2_28_x86_64",
    "darwin": "macosx_14_0_arm64",
    "win32": "win_amd64",
}
PYTHONS = ("3.11", "3.12", "3.13")
TARGETS = tuple(product(SYSTEMS, PYTHONS))
Target = tuple[str, str]

CONSTRAINTS = [
    # Chosen by hand, because each torch release is built for one triton release.
    "torch==2.13.0",
    "triton==3.7.1",
    # Later ones refuse Python 3.11.0 to 3.11.4, which some Linux distributions still ship.
    "soupsieve<3",
]

OF_ITS_OWN = {"vllm"}  # an extra for another environment: vLLM pins its torch

# The GPU libraries come with the torch build that pip picks. They are not pinned here.
GPU_LIBRARIES = ("nvidia-", "cuda-")

HEADER = """\
# Every package that flashedu, its notebooks and its tests use, pinned.
#
# Made by `make lock` (tools/lock.py), which installs the dependencies and extras of
# pyproject.toml into a clean virtual environment and writes down what pip chose. The few
# choices made by hand (torch and triton among them) stand in that script.
# To renew the pins, run `make lock`, then `make notebooks` and `make test`.
"""
TORCH_NOTE = "# torch and triton go together: each torch release is built for one triton release."

READ_METADATA = """
import importlib.metadata as metadata, json
print(json.dumps([
    [d.name, d.version, d.requires or [], d.metadata.get("Requires-Python") or ""]
    for d in metadata.distributions()
]))
"""


class Package:
    """A release and what it depends on."""

    def __init__(self, name: str, version: str, requires: list[str], python: str) -> None:
        self.name = canonicalize_name(name)
        self.version = version.partition("+")[0]
        self.requires = [Requirement(line) for line in requires]
        self.python = SpecifierSet(python)


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        lines += [] if name in OF_ITS_OWN else extra
    return [Requirement(line) for line in lines]


def environment(target: Target, extra: str = "") -> dict[str, str]:
    system, python = target
    return {
        **SYSTEMS[system],
        "python_version": python,
        "python_full_version": f"{python}.99",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": extra,
    }


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install_here(folder: Path) -> dict[str, Package]:
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python = str(scripts / "python")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS) + "\n", encoding="utf-8")
    lines = [str(requirement) for requirement in declared()]
    run(python, "-m", "pip", "install", "-qq", "--constraint", str(constraints), *lines)
    rows = json.loads(run(python, "-c", READ_METADATA))
    packages = [Package(*row) for row in rows]
    return {package.name: package for package in packages}


def look_up(requirement: Requirement, target: Target, folder: Path) -> Package:
    """Ask pip which version another system would get."""
    system, python = target
    line = f"{requirement.name}{requirement.specifier}"
    report = json.loads(
        run(
            *(sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--report", "-"),
            *("--no-deps", "--ignore-installed", "--only-binary", ":all:"),
            *("--platform", WHEEL_PLATFORMS[system], "--python-version", python),
            *("--target", str(folder / "unused"), line),
        )
    )
    found = report["install"][0]["metadata"]
    return Package(
        found["name"],
        found["version"],
        found.get("requires_dist", []),
        found.get("requires_python", ""),
    )


def needed(packages: dict[str, Package], folder: Path) -> dict[str, set[Target]]:
    """The targets that need each package. Packages that are missing here are looked up."""
    found: dict[str, set[Target]] = {}
    for target in TARGETS:
        seen: set[tuple[str, str]] = set()
        queue = [(requirement, "") for requirement in declared()]
        while queue:
            requirement, extra = queue.pop()
            name = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate(environment(target, extra)):
                continue
            if name.startswith(GPU_LIBRARIES):
                continue
            if name not in packages:
                packages[name] = look_up(requirement, target, folder)
            found.setdefault(name, set()).add(target)
            for wanted in ("", *requirement.extras):
                if (name, wanted) not in seen:
                    seen.add((name, wanted))
                    queue += [(inner, wanted) for inner in packages[name].requires]
    return found


def marker(targets: set[Target]) -> str:
    systems = sorted({system for system, _ in targets})
    pythons = [python for python in PYTHONS if any(python == seen for _, seen in targets)]
    if targets != set(product(systems, pythons)):
        raise SystemExit(f"tools/lock.py cannot write one marker for {sorted(targets)}.")
    parts = []
    if len(systems) == 1:
        parts.append(f'sys_platform == "{systems[0]}"')
    elif len(systems) == 2:
        (absent,) = SYSTEMS.keys() - set(systems)
        parts.append(f'sys_platform != "{absent}"')
    if len(pythons) < len(PYTHONS):
        names = " or ".join(f'python_version == "{python}"' for python in pythons)
        parts.append(f"({names})" if len(pythons) > 1 and parts else names)
    return "; " + " and ".join(parts) if parts else ""


def reject_narrow(packages: dict[str, Package], found: dict[str, set[Target]]) -> None:
    narrow = [
        f"{name} {packages[name].version} needs Python {packages[name].python}, not {python}.0"
        for name, targets in sorted(found.items())
        for python in sorted({python for _, python in targets})
        if Version(f"{python}.0") not in packages[name].python
    ]
    if narrow:
        raise SystemExit("\n".join([*narrow, "Add constraints for them to tools/lock.py."]))


def pins() -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packages = install_here(folder)
        found = needed(packages, folder)
    reject_narrow(packages, found)
    lines = []
    for name, targets in sorted(found.items()):
        if name == "torch":
            lines.append(TORCH_NOTE)
        lines.append(f"{name}=={packages[name].version}{marker(targets)}")
    return lines


def main() -> None:
    lines = pins()
    (ROOT / "requirements.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"requirements.txt: {sum('==' in line for line in lines)} pins")


if __name__ == "__main__":
    main()
