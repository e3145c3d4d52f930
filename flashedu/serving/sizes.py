"""The sizes of a model of Transformers, by its config, and held against the model itself.

The model is built on torch's meta device, where any size is built in a moment: its parameters are
counted, and a forward of two tokens shows what its cache holds.
"""

from __future__ import annotations

import copy
from typing import Any

from flashedu.serving.plan import MODELS, Model

TOKENS = 2  # of the forward


def sizes_of(name: str) -> Model:
    """As `plan.model_of`, for a config. Imports Transformers."""
    import difflib

    try:
        import transformers  # noqa: F401

        from flashedu.integrations import named
    except ImportError as error:
        raise ImportError(
            f'the model {name!r} needs Transformers ({error}): pip install "transformers>=5.5,<6"; '
            f"without it {', '.join(MODELS)} would do"
        ) from None
    try:
        found = named.find(name)
    except named.UnknownModel as error:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else f"; of its own a plan has {_keys()}"
        raise ValueError(f"{str(error).split('; did you mean')[0]}{hint}") from None
    if found.model_class is None:
        raise ValueError(f"{name!r} has code of its own, which is not run: its sizes are not known")
    return _measured(name, found.model_class, found.config)


def _keys() -> str:
    return ", ".join(MODELS)


def _measured(name: str, model_class: Any, config: Any) -> Model:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from flashedu.integrations.probe import quiet, sentence

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model_class.__name__.endswith("LM"):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # with the head that writes tokens
    kind = model_class.__name__
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{kind} is quantized by its config, and a plan takes one dtype for all")
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} has an encoder, and a plan is for a decoder alone")
    text = config.get_text_config()
    hidden, H = (_size(text, n) for n in ("hidden_size", "num_attention_heads"))
    layers, vocabulary = (_size(text, n) for n in ("num_hidden_layers", "vocab_size"))
    if not (hidden and H and layers and vocabulary):
        raise ValueError(f"{kind} has no heads of attention in its config: a plan is for a decoder")
    sizes = dict(
        layers=layers, hidden=hidden, H=H, vocabulary=vocabulary,
        H_kv=_size(text, "num_key_value_heads") or H,
        D=_size(text, "head_dim") or hidden // H,
        intermediate=_size(text, "intermediate_size") or _size(text, "n_inner") or 4 * hidden,
    )  # fmt: skip
    with quiet():
        try:
            model, cache = _run(model_class, config)
        except Exception as error:  # several hundred classes, each with its own ways to fail
            raise ValueError(f"{kind} does not run on the meta device: {sentence(error)}") from None
    held = [x for layer in getattr(cache, "layers", ()) for x in _tensors(layer)]
    n_elements = sum(x.numel() for x in held)
    want = TOKENS * 2 * sizes["layers"] * sizes["H_kv"] * sizes["D"]
    if n_elements != want:
        raise ValueError(
            f"{kind} keeps {n_elements // TOKENS:,} numbers of a token in its cache, and not 2 × "
            f"layers × heads × head size = {want // TOKENS:,}: a plan knows no other cache"
        )
    slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    modules = dict(model.named_modules())
    gated = any(hasattr(m, "gate_proj") and hasattr(m, "up_proj") for m in modules.values())
    experts = any("experts" in path.split(".") for path in modules)
    return Model(
        kind if name in (kind, getattr(config, "model_type", "")) else f"{kind} ({name})",
        **sizes,
        parameters=sum(p.numel() for p in model.parameters()),
        window=_size(text, "sliding_window") or None if slides else None,
        note=""
        if gated and not experts
        else f"{kind} has another MLP than Llama: its activations are a guess",
    )


def _run(model_class: Any, config: Any) -> tuple[Any, Any]:
    """The model, and its cache after a forward of two tokens."""
    import torch

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"), torch.no_grad():
        model = model_class(config).to(torch.bfloat16).eval()  # as some of its parts are
        out = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True)
    cache = out.get("cache")  # since 5.24
    return model, out.get("past_key_values") if cache is None else cache


def _tensors(layer: Any) -> list[Any]:
    import torch

    values = (getattr(layer, name, None) for name in vars(layer))
    return [x for x in values if isinstance(x, torch.Tensor) and x.ndim > 1]


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
