"""A module with a few words of its source changed, beside the real one."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

FOLDER = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()
Changes = Iterable[tuple[str, str]]  # old words → new words


def sources(name: str, changes: Changes, beneath: Sequence[str] = ()) -> dict[str, str]:
    """The source of the module of that name, and of those beneath it, by name, all changed.

    A change is made in the lowest of them that has its words, which must stand there once. Raises
    ValueError for words that stand there more often, or nowhere.
    """
    found = {module: _source(module) for module in (name, *beneath)}
    for old, new in changes:
        module = next((m for m in reversed(found) if old in found[m]), name)
        times = found[module].count(old)
        if times != 1:
            raise ValueError(f"old words must stand once in {module}, got {times} times {old!r}")
        found[module] = found[module].replace(old, new)
    return found


def changed(name: str, changes: Changes, beneath: Sequence[str] = ()) -> str:
    """`sources`, one behind another."""
    return "\n".join(sources(name, changes, beneath).values())


def mutated(name: str, changes: Changes, beneath: Sequence[str] = ()) -> ModuleType:
    """The module of that name with its source changed, and that of those it imports `beneath`."""
    texts = sources(name, changes, beneath)
    if not beneath:
        return _loaded(name, texts[name])
    importlib.import_module(name)  # and what it imports: what is loaded below is forgotten again
    with mock.patch.dict(sys.modules):
        for module in reversed(beneath):  # the lowest first: those above import it
            sys.modules[module] = _loaded(module, texts[module])
        return _loaded(name, texts[name])


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"name must be that of a module with a source, got {name!r}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _loaded(name: str, source: str) -> ModuleType:
    # A file, as Triton reads a kernel's source; operators of its own, as PyTorch has each once.
    number = next(NUMBERS)
    source = source.replace('"flashedu::', f'"flashedu_mutant_{number}::')
    path = Path(FOLDER.name) / f"mutant_{number}_of_{name.rpartition('.')[2]}.py"
    path.write_text(source, encoding="utf-8")
    mutant = importlib.util.spec_from_file_location(path.stem, path)
    assert mutant is not None
    assert mutant.loader is not None
    module = importlib.util.module_from_spec(mutant)
    mutant.loader.exec_module(module)
    return module
