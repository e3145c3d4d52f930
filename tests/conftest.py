"""Triton decides at its import whether kernels are interpreted: let flashedu decide first."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from flashedu.stages import rung

if rung("flash2").missing() is None:
    import flashedu.stages.triton_mode  # noqa: F401


@pytest.fixture
def no_figure_stays_open() -> Iterator[None]:
    """Nor does a window open."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def the_card_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers share it: one that keeps what a large test took leaves none for the others."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
