"""Gluon's names, where they changed between the versions of Triton that the Hopper rung runs on.

Gluon is Triton's lower floor: the kernel says which warps do what, where tiles lie and who waits
for whom. It is marked experimental, and renames things.
"""

import flashedu.stages.triton_mode  # noqa: F401  before Triton

import triton  # isort: skip

OLDEST, NEWEST = (3, 6), (3, 9)  # every kernel was compiled with each from here to there

version = tuple(int(part) for part in triton.__version__.split(".")[:2])
if not OLDEST <= version <= NEWEST:
    raise ImportError(
        f"stage 'flash3' needs triton {'.'.join(map(str, OLDEST))} to "
        f"{'.'.join(map(str, NEWEST))}, got {triton.__version__}: its Gluon has other names; "
        "stage 'flash2' would do"
    )

from triton.experimental.gluon.language.nvidia.hopper import tma  # noqa: E402

if version >= (3, 9):
    load_tile = tma.async_load
    store_tile = tma.async_store
else:
    load_tile = tma.async_copy_global_to_shared
    store_tile = tma.async_copy_shared_to_global
