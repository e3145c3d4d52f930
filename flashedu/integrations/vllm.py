"""FlashEdu in vLLM: the stage `paged_varlen` as its CUSTOM attention backend.

    vllm serve MODEL --attention-backend CUSTOM
    LLM(model=MODEL, attention_backend="CUSTOM")

vLLM finds FlashEdu by its entry point, `vllm.general_plugins`, where both are installed; `register`
is what it calls. The backend itself is in `flashedu.integrations.vllm_backend`. What it cannot do
is refused, with the setting's name, before the first token: sliding windows, ALiBi, attention sinks
and soft caps, caches of 8 bits, encoders and MLA, context parallelism, …

In vLLM's log, `Using AttentionBackendEnum.CUSTOM backend.` says that it is on, and FlashEdu's own
line whose CUSTOM it is. `flashedu doctor --vllm` says which backend vLLM picks by itself here.

Tried with vLLM 0.24.0 and 0.33.0.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

NAME = "CUSTOM"
BACKEND = "flashedu.integrations.vllm_backend.FlashEduBackend"
GROUP = "vllm.general_plugins"
TRIED = ("0.24.0", "0.33.0")
INSTALL = 'pip install "flashedu[vllm]", in an environment of its own: vLLM pins its torch'
# What `ask` asks about: attention as in Llama-2-7B. Its cache would be of the same dtype.
HEADS, HEAD_SIZE, DTYPE = 32, 128, "bfloat16"


class TakenByAnother(UserWarning):
    """vLLM has one CUSTOM backend, and another plugin has put its own there."""


def register() -> None:
    """Put FlashEdu's backend where vLLM looks for CUSTOM; vLLM calls it by the entry point.

    Calling it again does no harm. Where another plugin was first, it stays, and a warning says so.
    Raises ImportError, with a sentence, if vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f"vLLM is not installed: {INSTALL}")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        warnings.warn(
            f"vLLM's CUSTOM attention backend is {custom.get_path()}, of another plugin, and stays "
            "so: VLLM_PLUGINS=flashedu loads FlashEdu's alone",
            TakenByAnother,
            stacklevel=2,
        )
        return
    register_backend(custom, BACKEND)


def entry_point_seen() -> bool:
    """Whether vLLM would find `register`: FlashEdu is installed, not just on the path."""
    found = importlib.metadata.entry_points(group=GROUP)
    return any(entry.value == f"{__name__}:register" for entry in found)


@dataclass(frozen=True)
class Choice:
    """What vLLM would pick here, for a model of these heads."""

    sees_gpu: bool
    picked: str | None = None  # by itself
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # before it: name, reasons
    custom_path: str | None = None  # what CUSTOM is; None if nobody has registered it
    custom_reasons: tuple[str, ...] = ()  # why CUSTOM cannot be taken; () if it can


def ask() -> Choice:
    """Ask the vLLM that is installed here; imports it, and loads its plugins.

    Raises what a broken installation raises.
    """
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    with mock.patch.dict(os.environ, quiet):
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        custom = AttentionBackendEnum.CUSTOM
        path = custom.get_path() if custom.is_overridden() else None
        if not current_platform.is_cuda():
            return Choice(sees_gpu=False, custom_path=path)
        return _ask(current_platform, custom if path else None, path)


def _ask(platform: Any, custom: Any, path: str | None) -> Choice:
    """vLLM's own choice on a card, in its own order, and whether CUSTOM could be taken."""
    import torch
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import AttentionSelectorConfig

    asked = AttentionSelectorConfig(
        head_size=HEAD_SIZE,
        dtype=getattr(torch, DTYPE),
        kv_cache_dtype="auto",
        block_size=None,
    )
    capability = platform.get_device_capability()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cuda"))):
        valid, invalid = platform.get_valid_backends(
            device_capability=capability, attn_selector_config=asked,
            num_heads=HEADS,
        )  # fmt: skip
        reasons = custom and custom.get_class().validate_configuration(
            device_capability=capability, **asked._asdict()
        )
    best = min(valid, key=lambda candidate: candidate.priority, default=None)
    refused = {
        backend.name: tuple(why)
        for backend, (priority, why) in invalid.items()
        if best is None or priority < best.priority
    }
    picked = None if best is None else best.backend.name
    return Choice(True, picked, refused, path, tuple(reasons or ()))
