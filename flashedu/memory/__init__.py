"""The memory machine: HBM, SRAM, the traffic between them, and closed forms of it."""

from flashedu.memory.cost import Cost
from flashedu.memory.gpus import GPU, GPUS, gpu
from flashedu.memory.machine import UNCOUNTED, Machine
from flashedu.memory.problem import Problem
from flashedu.memory.sram import SRAMOverflow
from flashedu.memory.trace import Event

__all__ = ["GPU", "GPUS", "UNCOUNTED", "Cost", "Event", "Machine", "Problem", "SRAMOverflow", "gpu"]
