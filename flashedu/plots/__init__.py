"""Every figure of the course: functions from data to a matplotlib Figure. None computes results."""

from flashedu.plots.machine import hierarchy, roofline, sram_occupancy
from flashedu.plots.numerics import (
    against_budget,
    bit_layout,
    error_against_n,
    orders,
    running_sums,
    two_answers,
)
from flashedu.plots.tiles import running_state, visits
from flashedu.plots.traffic import bars, memory_against_n, traffic, traffic_against_sram

__all__ = [
    "against_budget",
    "bars",
    "bit_layout",
    "error_against_n",
    "hierarchy",
    "memory_against_n",
    "orders",
    "roofline",
    "running_state",
    "running_sums",
    "sram_occupancy",
    "traffic",
    "traffic_against_sram",
    "two_answers",
    "visits",
]
