"""Every figure of the course: functions from data to a matplotlib Figure. None computes results.

`use("dark")` draws all that follow for dark slides and notebooks; `theme("dark")` those of a `with`
block.
"""

from flashedu.plots.cache import idle_memory
from flashedu.plots.checked import against_published, l2_and_dram, predicted_counted_measured
from flashedu.plots.hopper import (
    one_sm,
    phases,
    register_shares,
    tile_copy,
    warpgroup_product,
)
from flashedu.plots.machine import hierarchy, roofline, sram_occupancy
from flashedu.plots.masks import padded_and_packed, runs
from flashedu.plots.numerics import (
    against_budget,
    bit_layout,
    error_against_n,
    orders,
    running_sums,
    two_answers,
)
from flashedu.plots.pipeline import waterfall, who_waits
from flashedu.plots.programs import busy_sms, masked_tiles, sm_timeline, splits, waiting
from flashedu.plots.serving import batch_over_time, card_memory, factors, waiting_times
from flashedu.plots.softmax import running_state
from flashedu.plots.speed import (
    decode_times,
    memory,
    model_bars,
    packed_times,
    speed,
    speedup_against_heads,
)
from flashedu.plots.style import theme, use
from flashedu.plots.tiles import loop_orders, visits, walks
from flashedu.plots.traffic import (
    bars,
    cumulative_traffic,
    memory_against_n,
    traffic,
    traffic_against_sram,
    traffic_against_tile,
)
from flashedu.plots.training import losses

__all__ = [
    "against_budget",
    "against_published",
    "bars",
    "batch_over_time",
    "bit_layout",
    "busy_sms",
    "card_memory",
    "cumulative_traffic",
    "decode_times",
    "error_against_n",
    "factors",
    "hierarchy",
    "idle_memory",
    "l2_and_dram",
    "loop_orders",
    "losses",
    "masked_tiles",
    "memory",
    "memory_against_n",
    "model_bars",
    "one_sm",
    "orders",
    "packed_times",
    "padded_and_packed",
    "phases",
    "predicted_counted_measured",
    "register_shares",
    "roofline",
    "running_state",
    "running_sums",
    "runs",
    "sm_timeline",
    "speed",
    "speedup_against_heads",
    "splits",
    "sram_occupancy",
    "theme",
    "tile_copy",
    "traffic",
    "traffic_against_sram",
    "traffic_against_tile",
    "two_answers",
    "use",
    "visits",
    "waiting",
    "waiting_times",
    "walks",
    "warpgroup_product",
    "waterfall",
    "who_waits",
]
