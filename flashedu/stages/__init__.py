"""The ladder: one rung a module, each the same function, each better than the one below."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from flashedu.memory.problem import Problem

_NUMPY_DTYPES = ("float16", "float32", "float64")
_TORCH_DTYPES = ("float16", "bfloat16", "float32", "float64")
_GPU_DTYPES = ("float16", "bfloat16", "float32")  # matrix units multiply no float64 for us

ANY_TILES = range(1, 2**31)
GPU_TILES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Rung:
    """One stage of the ladder: its module's name, and what it can do."""

    name: str
    framework: str  # "numpy" or "torch": what q, k and v must be
    idea: str
    dtypes: tuple[str, ...]
    tile_sizes: Sequence[int] = ANY_TILES  # what block_q and block_k may be; () if it has none
    lse: bool = False  # has attention_with_lse
    backward: bool = False  # has gradients
    splits: bool = False  # cuts the keys into `splits` parts, for few queries and many keys
    runs: bool = False  # takes `runs`: a mask, as the keys that each query sees
    requires: tuple[str, ...] = ()  # modules that it cannot run without
    largest_D: int = 256
    hopper_only: bool = False  # its kernels are of Hopper's own instructions, and not interpreted

    @property
    def any_tiles(self) -> bool:
        """Whether block_q and block_k may be any numbers."""
        return self.tile_sizes == ANY_TILES

    @property
    def is_triton(self) -> bool:
        """Whether it is a GPU kernel, interpreted where there is no GPU."""
        return "triton" in self.requires

    def load(self) -> ModuleType:
        """Import the stage's module."""
        return importlib.import_module(f"flashedu.stages.{self.name}")

    def refuses(self, p: Problem) -> str | None:
        """Why the stage cannot take these sizes and dtype, in a sentence; None if it can."""
        if p.dtype not in self.dtypes:
            would_do = ", ".join(self.dtypes)
            return f"stage '{self.name}' ({self.framework}) has no {p.dtype}; {would_do} would do"
        if self.largest_D < p.D:
            return f"stage '{self.name}' takes a D of at most {self.largest_D}, got {p.D}"
        for name in ("block_q", "block_k") if self.tile_sizes else ():
            block = getattr(p, name)
            if block not in self.tile_sizes:
                would_do = ", ".join(map(str, self.tile_sizes))
                return f"stage '{self.name}' takes a {name} of {would_do}, got {block}"
        return None

    def tiles_of(self, p: Problem) -> dict[str, int]:
        """The tile sizes of `p`, as keyword arguments for the stage; none if it has no tiles."""
        names = ("block_q", "block_k") if self.tile_sizes else ()
        return {name: getattr(p, name) for name in names + ("splits",) * self.splits}

    def missing(self) -> str | None:
        """Why this machine cannot run the stage, in a sentence; None if it can."""
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                if module == "triton" and sys.platform != "linux":
                    return f"stage '{self.name}' needs Triton, which exists for Linux only"
                return f"stage '{self.name}' needs {module}: pip install {module}"
        return _not_hopper(self.name) if self.hopper_only else None


def _not_hopper(name: str) -> str | None:
    """Why kernels of Hopper's own instructions cannot run here, in a sentence; None if they can."""
    import torch

    needs = f"stage '{name}' needs a Hopper GPU, as H100 or H200"
    if not torch.cuda.is_available():
        return f"{needs}, and there is no GPU; stage 'flash2' would do"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        card = torch.cuda.get_device_name()
        return f"{needs}, got {card} ({major}.{minor}); stage 'flash2' would do"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"stage '{name}' cannot be interpreted: unset TRITON_INTERPRET, or take 'flash2'"
    try:
        importlib.import_module("flashedu.stages.gluon_names")
    except ImportError as error:
        return str(error)
    return None


LADDER = (
    Rung(
        "naive",
        "numpy",
        "standard attention: S and P go to HBM and come back",
        _NUMPY_DTYPES,
        tile_sizes=(),
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
        runs=True,
        requires=("torch",),
    ),
    Rung(
        "flash1",
        "torch",
        "FlashAttention in Triton: a program a head; o waits in HBM",
        _GPU_DTYPES,
        tile_sizes=GPU_TILES,
        lse=True,
        requires=("torch", "triton"),
    ),
    Rung(
        "flash2",
        "torch",
        "FlashAttention-2 in Triton: a program a query tile; o stays on chip",
        _GPU_DTYPES,
        tile_sizes=GPU_TILES,
        lse=True,
        backward=True,
        requires=("torch", "triton"),
    ),
)

# Beside the ladder: what a model asks for. Texts of different lengths, packed or padded; and few
# queries with many keys, as a model writes. Where the ladder's own question is asked there is
# nothing to gain, so these are taken by name only.
INFERENCE = (
    Rung(
        "varlen",
        "torch",
        "flash2 over texts of different lengths: a run of keys for each query",
        _GPU_DTYPES,
        tile_sizes=GPU_TILES,
        lse=True,
        backward=True,
        runs=True,
        requires=("torch", "triton"),
    ),
    Rung(
        "decode",
        "torch",
        "Flash-Decoding in Triton: few queries; programs share the keys and merge",
        _GPU_DTYPES,
        tile_sizes=GPU_TILES,
        lse=True,
        splits=True,
        runs=True,
        requires=("torch", "triton"),
    ),
)

# What runs on one kind of card only, and cannot be interpreted: nothing counts its bytes. Where
# nobody names a stage, a Hopper card takes flash3 for what it takes (16-bit numbers, D of at most
# 128, no tile sizes, no machine), and else what other cards take: flash2, or online to be counted.
HOPPER = (
    Rung(
        "flash3",
        "torch",
        "FlashAttention-3 in Gluon, for Hopper: warps that load, warps that compute",
        ("float16", "bfloat16"),
        tile_sizes=(),
        lse=True,
        backward=True,
        requires=("torch", "triton"),
        largest_D=128,
        hopper_only=True,
    ),
)

RUNGS = (*LADDER, *INFERENCE, *HOPPER)


def rung(name: str) -> Rung:
    """The rung of that name. Raises ValueError, listing what there is."""
    for candidate in RUNGS:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in RUNGS)
    raise ValueError(f"stage must be one of {known}, got {name!r}")
