"""GPUs by their datasheets, and the time that no kernel on them can beat."""

from __future__ import annotations

from dataclasses import dataclass

from flashedu.memory.cost import Cost

KIB, MIB = 2**10, 2**20
GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class GPU:
    """One card. Rates are peaks: dense (no sparsity), at boost clock, as the vendor prints them."""

    key: str  # what `gpu()` and `--gpu` take
    name: str
    compute_capability: tuple[int, int]
    hbm_bytes: int
    hbm_bytes_per_s: float
    l2_bytes: int
    sm_count: int
    sram_bytes_per_sm: int  # shared memory; registers add 256 KiB an SM
    sram_bytes_per_program: int  # the most that one thread block may take of it
    tensor_flops_per_s: float  # float16 or bfloat16 in, float32 sums
    float32_flops_per_s: float  # without tensor cores
    float64_flops_per_s: float  # without tensor cores
    source: str

    def flops_per_s(self, dtype: str) -> float:
        """Peak rate for inputs of `dtype`. Raises ValueError for bfloat16 on a card without it."""
        if dtype == "bfloat16" and self.compute_capability < (8, 0):
            raise ValueError(f"{self.name} has no bfloat16; float16 would do")
        return {
            "float16": self.tensor_flops_per_s,
            "bfloat16": self.tensor_flops_per_s,
            "float32": self.float32_flops_per_s,
            "float64": self.float64_flops_per_s,
        }[dtype]

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte above which the arithmetic, not HBM, is the limit."""
        return self.flops_per_s(dtype) / self.hbm_bytes_per_s

    def bound(self, cost: Cost, dtype: str) -> Bound:
        """The roofline: no kernel with this cost can run faster here.

        Source: Williams, Waterman, Patterson, Roofline (CACM 52(4), 2009).
        """
        memory_s = cost.hbm_bytes / self.hbm_bytes_per_s
        compute_s = cost.flops / self.flops_per_s(dtype)
        return Bound(memory_s, compute_s)


@dataclass(frozen=True)
class Bound:
    """Seconds that HBM traffic takes at least, and that arithmetic takes at least."""

    memory_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """The longer of the two: they can overlap, but not shrink."""
        return max(self.memory_s, self.compute_s)

    @property
    def limit(self) -> str:
        """ "memory" or "compute"."""
        return "memory" if self.memory_s >= self.compute_s else "compute"


# Shared memory per SM and per thread block: CUDA C++ Programming Guide, Technical Specifications
# per Compute Capability.
GPUS = (
    GPU(
        "t4", "T4", (7, 5), 16 * GB, 320 * GB, 4 * MIB, 40, 64 * KIB, 64 * KIB,
        65 * TERA, 8.1 * TERA, 0.25 * TERA,
        "NVIDIA T4 datasheet (2019); Turing architecture whitepaper (2018); float64 is 1/32 of "
        "float32",
    ),
    GPU(
        "a100-40", "A100 40 GB", (8, 0), 40 * GB, 1555 * GB, 40 * MIB, 108, 164 * KIB, 163 * KIB,
        312 * TERA, 19.5 * TERA, 9.7 * TERA,
        "NVIDIA A100 datasheet (SXM, 2020); A100 architecture whitepaper (2020)",
    ),
    GPU(
        "a100-80", "A100 80 GB", (8, 0), 80 * GB, 2039 * GB, 40 * MIB, 108, 164 * KIB, 163 * KIB,
        312 * TERA, 19.5 * TERA, 9.7 * TERA,
        "NVIDIA A100 datasheet (SXM, 2021); A100 architecture whitepaper (2020)",
    ),
    GPU(
        "rtx4090", "RTX 4090", (8, 9), 24 * GB, 1008 * GB, 72 * MIB, 128, 100 * KIB, 99 * KIB,
        165.2 * TERA, 82.6 * TERA, 1.29 * TERA,
        "NVIDIA Ada GPU architecture whitepaper (2023), float16 with float32 sums; float64 is "
        "1/64 of float32",
    ),
    GPU(
        "h100", "H100 SXM", (9, 0), 80 * GB, 3350 * GB, 50 * MIB, 132, 228 * KIB, 227 * KIB,
        989.4 * TERA, 66.9 * TERA, 33.5 * TERA,
        "NVIDIA H100 architecture whitepaper and datasheet (2023), half of the rates with sparsity",
    ),
    GPU(
        "h200", "H200", (9, 0), 141 * GB, 4800 * GB, 60 * MIB, 132, 228 * KIB, 227 * KIB,
        989.4 * TERA, 66.9 * TERA, 33.5 * TERA,
        "NVIDIA H200 datasheet (2024), half of the rates with sparsity; L2 as the card reports it",
    ),
    GPU(
        "b200", "B200", (10, 0), 180 * GB, 7700 * GB, 126 * MIB, 148, 228 * KIB, 227 * KIB,
        2250 * TERA, 75 * TERA, 37 * TERA,
        "NVIDIA HGX B200 and DGX B200 datasheets (2025), an eighth of the board, half of the rates "
        "with sparsity; Blackwell tuning guide for L2; SM count as the card reports it",
    ),
)  # fmt: skip


def gpu(key: str) -> GPU:
    """The card of that key. Raises ValueError, listing what there is."""
    for card in GPUS:
        if card.key == key.lower():
            return card
    known = ", ".join(card.key for card in GPUS)
    raise ValueError(f"gpu must be one of {known}, got {key!r}")
