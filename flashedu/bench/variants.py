"""A module with a few words of its source changed, beside the real one."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

FOLDER = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()
Changes = Iterable[tuple[str, str]]  # old words → new words


def changed(name: str, changes: Changes) -> str:
    """The source of the module of that name, changed. Each change must find its words once.

    Raises ValueError for words that stand there more or less often.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"name must be that of a module with a source, got {name!r}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(
                f"old words must stand once in {name}, got {source.count(old)} times {old!r}"
            )
        source = source.replace(old, new)
    return source


def mutated(name: str, changes: Changes) -> ModuleType:
    """The module of that name with its source changed."""
    # A file, as Triton reads a kernel's source; operators of its own, as PyTorch has each once.
    number = next(NUMBERS)
    source = changed(name, changes).replace('"flashedu::', f'"flashedu_mutant_{number}::')
    path = Path(FOLDER.name) / f"mutant_{number}_of_{name.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    mutant = importlib.util.spec_from_file_location(path.stem, path)
    assert mutant is not None
    assert mutant.loader is not None
    module = importlib.util.module_from_spec(mutant)
    mutant.loader.exec_module(module)
    return module
