"""Every figure of the course: functions from data to a matplotlib Figure. None computes results."""

from flashedu.plots.machine import hierarchy, roofline, sram_occupancy
from flashedu.plots.speed import memory, speed, speedup_against_heads
from flashedu.plots.tiles import running_state, visits
from flashedu.plots.traffic import bars, memory_against_n, traffic, traffic_against_sram

__all__ = [
    "bars",
    "hierarchy",
    "memory",
    "memory_against_n",
    "roofline",
    "running_state",
    "speed",
    "speedup_against_heads",
    "sram_occupancy",
    "traffic",
    "traffic_against_sram",
    "visits",
]
