"""Every figure of the course: functions from data to a matplotlib Figure. None computes results."""

from flashedu.plots.flash2 import waiting, walks
from flashedu.plots.machine import hierarchy, roofline, sram_occupancy
from flashedu.plots.numerics import (
    against_budget,
    bit_layout,
    error_against_n,
    orders,
    running_sums,
    two_answers,
)
from flashedu.plots.programs import busy_sms, loop_orders, masked_tiles, traffic_against_tile
from flashedu.plots.speed import memory, speed, speedup_against_heads
from flashedu.plots.tiles import running_state, visits
from flashedu.plots.traffic import bars, memory_against_n, traffic, traffic_against_sram

__all__ = [
    "against_budget",
    "bars",
    "bit_layout",
    "busy_sms",
    "error_against_n",
    "hierarchy",
    "loop_orders",
    "masked_tiles",
    "memory",
    "memory_against_n",
    "orders",
    "roofline",
    "running_state",
    "running_sums",
    "speed",
    "speedup_against_heads",
    "sram_occupancy",
    "traffic",
    "traffic_against_sram",
    "traffic_against_tile",
    "two_answers",
    "visits",
    "waiting",
    "walks",
]
