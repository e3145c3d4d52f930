"""The ladder: one rung a module, each the same function, each better than the one below."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

_NUMPY_DTYPES = ("float16", "float32", "float64")
_TORCH_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Rung:
    """One stage of the ladder: its module's name, and what it can do."""

    name: str
    framework: str  # "numpy" or "torch": what q, k and v must be
    idea: str
    dtypes: tuple[str, ...]
    tiles: bool = True  # takes any block_q and block_k
    lse: bool = False  # has attention_with_lse
    backward: bool = False  # has gradients
    requires: tuple[str, ...] = ()  # modules that it cannot run without

    def load(self) -> ModuleType:
        """Import the stage's module."""
        return importlib.import_module(f"flashedu.stages.{self.name}")

    def missing(self) -> str | None:
        """Why this machine cannot run the stage, in a sentence; None if it can."""
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                return f"stage '{self.name}' needs {module}: pip install {module}"
        return None


LADDER = (
    Rung(
        "naive",
        "numpy",
        "standard attention: S and P go to HBM and come back",
        _NUMPY_DTYPES,
        tiles=False,
    ),
    Rung(
        "tiled",
        "numpy",
        "tiles through SRAM; the softmax takes three passes over K",
        _NUMPY_DTYPES,
    ),
    Rung(
        "online",
        "torch",
        "one pass: the online softmax; backward by recomputation",
        _TORCH_DTYPES,
        lse=True,
        backward=True,
        requires=("torch",),
    ),
)


# Stages that run, and whose traffic is not counted yet: they are not on the ladder.
NOT_COUNTED_YET = (
    Rung(
        "flash2",
        "torch",
        "FlashAttention-2 in Triton: a program for each tile of queries",
        ("float16", "bfloat16", "float32"),
        tiles=False,
        lse=True,
        backward=True,
        requires=("torch", "triton"),
    ),
)


def rung(name: str) -> Rung:
    """The rung of that name. Raises ValueError, listing what there is."""
    for candidate in (*LADDER, *NOT_COUNTED_YET):
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in (*LADDER, *NOT_COUNTED_YET))
    raise ValueError(f"stage must be one of {known}, got {name!r}")
