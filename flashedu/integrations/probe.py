"""Does `attn_implementation` take effect in a model class of Transformers? Found by calling.

A function that does nothing but note who calls it is registered with `AttentionInterface`. The
model is built from its config on torch's meta device, where a tensor has a shape and no numbers, so
that any size is built in a moment. A forward then shows which attention layers call the function.
What cannot run there is run on the CPU with two layers; what cannot run at all, is read.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "FlashEduProbe"  # Transformers gives a meaning to "flash" and to "/" in a name
N = 16  # tokens of the dummy input
CPU_BYTES = 2**31  # the largest model that is run on the CPU

How = Literal["meta", "cpu", "source"]


@dataclass(frozen=True)
class Seen:
    """What was seen. The counts are of layers, by the name of their class."""

    how: How
    called: Mapping[str, int] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)  # ran to the end, and did not call
    idle: Mapping[str, int] = field(default_factory=dict)  # the dummy input did not reach them
    head_sizes: tuple[tuple[int, int], ...] = ()  # of q and k, of v, in the calls
    refused: bool = False  # it fails with a name that is not Transformers' own, and only then
    error: str = ""  # what stopped it

    @property
    def tells(self) -> bool:
        """Silence tells only where every kind of attention layer had its chance to call."""
        silence = bool(self.silent) and self.idle.keys() <= self.silent.keys()
        return bool(self.called or silence or self.refused)


def probe(model_class: type[PreTrainedModel], config: Any) -> Seen:
    """Which attention layers of the class would call what `attn_implementation` names."""
    with quiet():
        seen = _on_meta(model_class, config)
        if seen.tells or not (seen.silent or seen.idle or seen.error):
            return seen
        on_cpu = _on_cpu(model_class, config)
        return on_cpu if on_cpu.tells else _in_source(model_class, config, seen.error)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that have attention in the name of their class, less those that hold another.

    A name is no proof: a layer may have another name, and a module with such a name may compute no
    attention. What was called is.
    """
    named = [m for m in model.modules() if re.search("attention|attn", type(m).__name__, re.I)]
    ids = {id(m) for m in named}
    return [m for m in named if all(inner is m or id(inner) not in ids for inner in m.modules())]


# by calling


class _Heard:
    """Who called, and which attention layers ran to their end. One at a time can listen."""

    def __init__(self) -> None:
        self.callers: dict[int, nn.Module] = {}
        self.finished: set[int] = set()
        self.head_sizes: set[tuple[int, int]] = set()
        AttentionInterface.register(NAME, self._note)  # a model is built only with a known name
        AttentionMaskInterface.register(NAME, _mask)  # without one a model gets no mask at all

    def listen(self, model: nn.Module) -> None:
        self.model = model
        self.layers = attention_layers(model)
        for layer in self.layers:
            layer.register_forward_hook(lambda layer, *_: self.finished.add(id(layer)))

    def _note(
        self, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.callers[id(module)] = module
        self.head_sizes.add((query.shape[-1], value.shape[-1]))
        B, H, Nq, _ = query.shape
        return value.new_zeros(B, Nq, H, value.shape[-1]), None

    def reached(self, part: nn.Module) -> bool:
        ids = {id(m) for m in part.modules()}
        return not ids.isdisjoint(self.callers.keys() | self.finished)

    def seen(self, how: How, error: str, refused: bool = False) -> Seen:
        inside = {id(m) for caller in self.callers.values() for m in caller.modules()}
        others = [
            layer
            for layer in self.layers
            if id(layer) not in inside and inside.isdisjoint(id(m) for m in layer.modules())
        ]
        return Seen(
            how,
            _by_class(self.callers.values()),
            _by_class(m for m in others if id(m) in self.finished),
            _by_class(m for m in others if id(m) not in self.finished),
            tuple(sorted(self.head_sizes)),
            refused,
            error,
        )


def _mask(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _on_meta(model_class: type[PreTrainedModel], config: Any) -> Seen:
    heard = _Heard()
    try:
        heard.listen(_build(model_class, config, NAME))
    except Exception as error:  # several hundred classes, each with its own ways to fail
        refused = NAME in str(error) or _eager_runs(model_class, config)
        return Seen("meta", refused=refused, error=sentence(error))
    said = _run(heard, "meta", torch.bfloat16)
    nothing = bool(said and heard.layers) and not (heard.callers or heard.finished)
    return heard.seen("meta", said, refused=nothing and _eager_runs(model_class, config))


def _on_cpu(model_class: type[PreTrainedModel], config: Any) -> Seen:
    heard = _Heard()
    try:
        model = _build(model_class, _with_two_layers(config), NAME).float()
        if sum(p.nbytes for p in model.parameters()) > CPU_BYTES:
            return Seen("cpu", error="the model is too large")
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
    except Exception as error:
        return Seen("cpu", error=sentence(error))
    heard.listen(model)
    return heard.seen("cpu", _run(heard, "cpu", torch.float32))


def _eager_runs(model_class: type[PreTrainedModel], config: Any) -> bool:
    """The control: whether the same model runs when nothing is asked of it."""
    heard = _Heard()
    try:
        heard.listen(_build(model_class, config, "eager"))
    except Exception:
        return False
    _run(heard, "meta", torch.bfloat16)
    return bool(heard.finished)


def _build(model_class: type[PreTrainedModel], config: Any, implementation: str) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    with torch.device("meta"):
        return model_class(config).to(torch.bfloat16).eval()


def _with_two_layers(config: Any) -> Any:
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(2, getattr(part, name)))
    return config


def _run(heard: _Heard, device: str, dtype: torch.dtype) -> str:
    """A forward of the model, then of each model inside it that this did not reach.

    So the image encoder of a model that was given text has its turn. Says what stopped the first.
    """
    said = []
    for part in heard.model.modules():
        if isinstance(part, PreTrainedModel) and (part is heard.model or not heard.reached(part)):
            said.append(_forward(part, heard, device, dtype))
    return said[0]


def _forward(part: PreTrainedModel, heard: _Heard, device: str, dtype: torch.dtype) -> str:
    said = "no dummy input is known for it"
    for inputs in _dummy_inputs(part, device, dtype):
        try:
            with torch.no_grad(), torch.device(device):
                part(**inputs)
            return ""
        except Exception as error:
            said = sentence(error)
        if heard.reached(part):
            break
    return said


def _dummy_inputs(
    part: PreTrainedModel, device: str, dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that may do: the main one in each shape that it may have, and all that must be."""
    parameters = inspect.signature(part.forward).parameters
    main = part.main_input_name
    main = main if isinstance(main, str) else main[0]
    if main not in parameters:
        main = next(iter(parameters), "")
    must = {n for n, p in parameters.items() if p.default is p.empty and p.kind <= p.KEYWORD_ONLY}
    must -= {n for n, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if part.config.is_encoder_decoder:
        must |= {"decoder_input_ids"} & parameters.keys()
    for shape in _shapes(main, part.config):
        shapes = {name: next(_shapes(name, part.config)) for name in must} | {main: shape}
        yield {
            name: torch.zeros(s, dtype=torch.long if "ids" in name else dtype, device=device)
            for name, s in shapes.items()
        }


def _shapes(name: str, config: Any) -> Iterator[tuple[int, ...]]:
    if "ids" in name:
        yield 1, N
        return
    if "pixel" in name or "image" in name:
        channels = _size(config, "num_channels", "in_channels", "in_chans") or 3
        side = _size(config, "image_size", "img_size", "input_size") or 224
        frames = _size(config, "num_frames", "frames_per_clip") or 8
        yield 1, channels, side, side
        yield 1, frames, channels, side, side
        patch = _size(config, "patch_size") or 16
        yield 16, channels * patch**2
        return
    if name in ("input_features", "input_values", "audio_values", "features"):
        mel = _size(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
        frames = 2 * _size(config, "max_source_positions") or _size(config, "max_length") or 1024
        yield 1, 16000
        yield 1, frames, mel
        yield 1, mel, frames
        yield 1, 1, 16000
        yield 1, 1, 1001, 64
        return
    yield 1, N, _size(config, "hidden_size", "d_model") or 64


def _size(config: Any, *names: str) -> int:
    """The first of these that the config, or one inside it, has as a number; 0 if none."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int):
                return value
    return 0


# by reading


def _in_source(model_class: type[PreTrainedModel], config: Any, error: str) -> Seen:
    """The attention classes that name the table in which `attn_implementation` is looked up."""
    try:
        layers = attention_layers(_build(model_class, config, "eager"))
    except Exception:
        return Seen("source", error=error)
    looks = {type(m): "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(m)) for m in layers}
    return Seen(
        "source",
        _by_class(m for m in layers if looks[type(m)]),
        _by_class(m for m in layers if not looks[type(m)]),
        error=error,
    )


def _by_class(modules: Any) -> dict[str, int]:
    return dict(Counter(type(m).__name__ for m in modules))


def sentence(error: Exception) -> str:
    """An exception in one line, cut if long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """No network, no warnings of models that are not to be used."""
    from huggingface_hub import constants

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        transformers.logging.set_verbosity(level)
