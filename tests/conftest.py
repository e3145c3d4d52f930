"""Triton decides at its import whether kernels are interpreted: let flashedu decide first."""

from __future__ import annotations

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
