"""Triton's interpreter without what it does for nothing: kernels take half the time, or less.

It replaces the functions of `tl` by its own when a launch begins, and looks through all of them
again whenever the kernel calls a helper, as tl.sum and tl.cdiv. And it computes each sum and
product of integers once more in 64 bits, for an assertion that it then leaves out.

All that is changed here is private to Triton; tests/test_kernels.py says so when a release moves
it. Only triton_mode imports this file: Triton must have its mode before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Change the interpreter of this process. No result of a kernel changes by a bit."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # else the assertion is made
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang)


def once_a_launch(replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`replace`, which changes the modules of `tl` that a function sees, where none has yet.

    It returns a scope, whose method restore ends the launch.
    """
    replaced: set[int] = set()  # the modules, in this launch

    @functools.wraps(replace)
    def wrapper(function: Any) -> Any:
        seen = {id(x) for x in function.__globals__.values()} & {id(tl), id(tl.core)}
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = replace(function)
        replaced.update(seen)
        restore = scope.restore

        def restore_and_forget() -> None:
            replaced.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    return wrapper
