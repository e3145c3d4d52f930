"""Does `attn_implementation` take effect in a model, and does flash_attention_2 run here?

As in `doctor`: `look` gathers facts, and `diagnose` turns facts into findings and looks at nothing
else. A finding that blocks is in the way of flash_attention_2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flashedu import doctor
from flashedu.doctor import Facts, Finding

if TYPE_CHECKING:
    from flashedu.integrations.probe import Seen

TRANSFORMERS = "5.5"  # as in pyproject.toml
# What flash-attn and Transformers ask.
FLASH_ATTN = "2.3.3"
CAPABILITY = (8, 0)
DTYPES = ("float16", "bfloat16")
MAX_HEAD_SIZE = 256
# The oldest driver of each CUDA. Source: NVIDIA, CUDA Compatibility, minor version compatibility.
DRIVERS = {11: 450, 12: 525, 13: 580}

Effect = Literal[
    "takes effect", "in part", "by its source", "ignored", "refused", "none", "unknown"
]
WHERE = {
    "meta": "in a forward on the meta device",
    "cpu": "in a forward of two layers on the CPU",
    "source": "as its source says",
}


SUMMARY: dict[Effect, str] = {
    "takes effect": "takes effect",
    "in part": "takes effect in part",
    "by its source": "should take effect",
    "ignored": "is ignored",
    "refused": "is refused",
    "none": "has nothing to set",
    "unknown": "was not found out",
}


class NoSuchModel(ValueError):
    """No model has this name here. The message says what would do."""


class NotHere(RuntimeError):
    """Transformers cannot be used here. The message says how to get it."""


@dataclass(frozen=True)
class ModelFacts:
    """A model class with a config. `seen` is None if its code is not in Transformers."""

    class_name: str
    source: str  # of the config, in words
    seen: Seen | None
    supports_flash: bool  # as the class says of itself
    dtype: str | None  # as the config says
    head_sizes: tuple[tuple[int, int], ...]  # of q and k, of v
    code_of_its_own: bool = False  # the config names code outside Transformers


def diagnose(machine: Facts, model: ModelFacts) -> list[Finding]:
    """All findings, in the order in which to read them."""
    return [
        Finding("model", f"{model.class_name}, {model.source}"),
        *_code_of_its_own(model),
        _setting(model),
        _supported(model),
        _gpu(machine),
        _driver(machine),
        _flash_attn(machine),
        _dtype(model),
        _head_size(model),
    ]


def effect(model: ModelFacts) -> Effect:
    """What becomes of `attn_implementation`."""
    seen = model.seen
    if seen is None:
        return "unknown"
    if seen.refused:
        return "refused"
    if seen.called and seen.how == "source":
        return "by its source"
    if seen.called:
        return "in part" if seen.silent else "takes effect"
    if seen.silent:
        return "ignored"
    return "unknown" if seen.idle or seen.error else "none"


def takes_effect(model: ModelFacts) -> bool:
    """Whether at least some attention layers of the model follow the setting."""
    return effect(model) in ("takes effect", "in part", "by its source")


def as_dict(machine: Facts, model: ModelFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    return {
        "takes_effect": takes_effect(model),
        "effect": effect(model),
        "flash_attention_2_runs": not any(finding.blocks for finding in findings),
        "model": asdict(model),
        "machine": doctor.as_dict(machine, ())["facts"],
        "findings": [asdict(finding) for finding in findings],
    }


# the model


def _code_of_its_own(model: ModelFacts) -> list[Finding]:
    if not model.code_of_its_own or model.seen is None:
        return []
    advice = "with trust_remote_code=True another class is loaded, and nothing here holds for it"
    return [Finding("auto_map", "the config names code of its own, too", "note", advice)]


def _setting(model: ModelFacts) -> Finding:
    name, seen, what = "attn_implementation", model.seen, effect(model)
    count = "attention_report counts the calls of a model that runs"
    if seen is None:
        found = "not found out: the model is code beside its config (auto_map), which is not run"
        return Finding(name, found, "note", count)
    where = WHERE[seen.how]
    called, silent = sum(seen.called.values()), sum(seen.silent.values())
    idle = f"; the dummy input did not reach {_listed(seen.idle)}" if seen.idle else ""
    if what == "takes effect":
        found = f"takes effect: {called} of {called} attention layers called what it names, {where}"
        return Finding(name, found + idle)
    if what == "in part":
        found = f"takes effect in part: {called} of {called + silent} attention layers called "
        advice = f"these compute their own: {_listed(seen.silent)}"
        return Finding(name, f"{found}what it names, {where}{idle}", "note", advice)
    if what == "by its source":
        found = f"should take effect, {where}: {_listed(seen.called)} looks it up"
        found += f", {_listed(seen.silent)} does not" if seen.silent else ""
        return Finding(name, f"{found}; not run here: {seen.error}", "note", count)
    if what == "ignored":
        verb = "looks up" if seen.how == "source" else "called"
        found = f"is ignored: none of {_listed(seen.silent)} {verb} what it names, {where}{idle}"
        advice = "the config reports any name all the same, and the model computes as always"
        return Finding(name, found, "problem", advice, blocks=True)
    if what == "refused":
        found = f"is refused: a registered name fails, and eager runs: {seen.error}"
        own = "eager and flash_attention_2" if model.supports_flash else "eager"
        return Finding(name, found, "problem", f"only names that it knows itself do, as {own}")
    if what == "none":
        advice = "no implementation of attention changes this model"
        return Finding(name, "nothing to set: no attention layer in this class", "note", advice)
    return Finding(name, f"not found out: {seen.error}{idle}", "note", count)


def _supported(model: ModelFacts) -> Finding:
    name = "support"
    if model.seen is None:
        return Finding(name, "Transformers does not know the class", "note", "ask its authors")
    if model.supports_flash:
        return Finding(name, "Transformers says that this class supports flash_attention_2")
    found = "Transformers says that this class does not support flash_attention_2"
    advice = "it raises when asked for it; take sdpa, or another model"
    return Finding(name, found, "problem", advice, blocks=True)


def _dtype(model: ModelFacts) -> Finding:
    advice = "load it with dtype=torch.bfloat16"
    if model.dtype is None:
        found = "the config names none: the weights' own is taken"
        return Finding("dtype", found, "note", f"flash-attn takes float16 and bfloat16: {advice}")
    if model.dtype in DTYPES:
        return Finding("dtype", model.dtype)
    found = f"{model.dtype}, but flash-attn takes float16 and bfloat16 only"
    return Finding("dtype", found, "problem", advice, blocks=True)


def _head_size(model: ModelFacts) -> Finding:
    name = "head size"
    if not model.head_sizes:
        advice = f"flash-attn takes up to {MAX_HEAD_SIZE}"
        return Finding(name, "neither called with one nor in the config", "note", advice)
    found = ", ".join(str(qk) if qk == v else f"{qk} (v: {v})" for qk, v in model.head_sizes)
    if max(max(pair) for pair in model.head_sizes) > MAX_HEAD_SIZE:
        found += f", but flash-attn takes {MAX_HEAD_SIZE} at most"
        return Finding(name, found, "problem", "sdpa takes any size", blocks=True)
    if any(qk != v for qk, v in model.head_sizes):
        advice = "flash-attn takes one size for q, k and v: the model's code must pad v"
        return Finding(name, found, "note", advice)
    if any(qk % 8 for qk, _ in model.head_sizes):
        return Finding(name, found, "note", "no multiple of 8: flash-attn pads it at each call")
    return Finding(name, found)


# the machine


def _gpu(machine: Facts) -> Finding:
    if not machine.cards:
        advice = "flash_attention_2 needs one, Ampere or later; sdpa and FlashEdu do not"
        return Finding("GPU", "no NVIDIA GPU", "problem", advice, blocks=True)
    listed = ", ".join(
        f"{c.name}, compute capability {c.compute_capability[0]}.{c.compute_capability[1]}"
        for c in machine.cards
    )
    able = [card.compute_capability >= CAPABILITY for card in machine.cards]
    if not any(able):
        advice = "flash_attention_2 needs 8.0 (Ampere) or later; sdpa does not"
        return Finding("GPU", listed, "problem", advice, blocks=True)
    if not all(able):
        return Finding(
            "GPU", listed, "note", "flash_attention_2 runs on 8.0 (Ampere) and later only"
        )
    return Finding("GPU", listed)


def _driver(machine: Facts) -> Finding:
    name, cuda = "CUDA in torch", machine.torch_cuda
    if cuda is None:
        found = f"torch {machine.versions.get('torch')} is built for the CPU"
        return Finding(
            name, found, "problem", "install the CUDA build, see pytorch.org", blocks=True
        )
    driver = next((card.driver for card in machine.cards if card.driver), None)
    found = f"torch is built for CUDA {cuda}, driver {driver or 'unknown'}"
    if machine.torch_sees_gpu:
        return Finding(name, found)
    oldest = DRIVERS.get(int(cuda.split(".")[0]))
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        found += f", but CUDA {cuda} needs {oldest} or later"
        advice = "renew the driver, or install a torch that is built for an older CUDA"
        return Finding(name, found, "problem", advice, blocks=True)
    said = f": {machine.torch_gpu_warning}" if machine.torch_gpu_warning else ""
    found += f"; torch sees no GPU{said}"
    advice = "nvidia-smi shows what the driver sees; is CUDA_VISIBLE_DEVICES set?"
    return Finding(name, found, "problem", advice, blocks=True)


def _flash_attn(machine: Facts) -> Finding:
    name = "flash-attn"
    found, kernels = machine.versions.get(name), machine.versions.get("kernels")
    if found is None and kernels is not None:
        advice = "Transformers then downloads kernels-community/flash-attn2 with it"
        return Finding(name, f"not installed, but kernels {kernels} is", "note", advice)
    if found is None:
        advice = "pip install flash-attn --no-build-isolation, or pip install kernels"
        return Finding(name, "not installed", "problem", advice, blocks=True)
    if name in machine.broken:
        reason = f"{found}, which fails to import: {machine.broken[name]}"
        advice = "install the build for this torch, this CUDA and this Python"
        return Finding(name, reason, "problem", advice, blocks=True)
    if doctor.version(found) < doctor.version(FLASH_ATTN):
        advice = f'too old: pip install "flash-attn>={FLASH_ATTN}" --no-build-isolation'
        return Finding(name, found, "problem", advice, blocks=True)
    return Finding(name, found)


def _listed(layers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in layers.items())


# from a name to facts


def look(name: str) -> tuple[Facts, ModelFacts]:
    """The facts of this machine and of the model. Imports Transformers."""
    machine = doctor.look("transformers", "flash-attn", "kernels")
    for needed, low in (("torch", "2.11"), ("transformers", TRANSFORMERS)):
        _need(machine, needed, low)
    from flashedu.integrations import named, probe

    try:
        found = named.find(name)
    except named.UnknownModel as error:
        raise NoSuchModel(str(error)) from None
    seen = found.model_class and probe.probe(found.model_class, found.config)
    dtype = getattr(found.config, "dtype", None)
    return machine, ModelFacts(
        class_name=found.class_name,
        source=found.source,
        seen=seen,
        supports_flash=bool(getattr(found.model_class, "_supports_flash_attn", False)),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        head_sizes=(seen and seen.head_sizes) or _head_sizes(found.config),
        code_of_its_own=hasattr(found.config, "auto_map"),
    )


def _need(machine: Facts, name: str, low: str) -> None:
    found = machine.versions.get(name)
    extra = f"{name}>={low}" + (",<6" if name == "transformers" else "")
    if found is None:
        raise NotHere(f'--model needs {name}: pip install "{extra}"')
    if name in machine.broken:
        raise NotHere(
            f"--model needs {name}; {found} fails to import: {machine.broken[name]}; "
            f'pip install --force-reinstall "{extra}"'
        )
    if doctor.version(found) < doctor.version(low):
        raise NotHere(f'--model needs {name} {low} or later, not {found}: pip install -U "{extra}"')


def _head_sizes(config: Any) -> tuple[tuple[int, int], ...]:
    """By the config, for a model that called nothing."""
    config = config.get_text_config()
    size = getattr(config, "head_dim", None)
    hidden, heads = (getattr(config, n, None) for n in ("hidden_size", "num_attention_heads"))
    if not isinstance(size, int) and isinstance(hidden, int) and isinstance(heads, int) and heads:
        size = hidden // heads
    return ((size, size),) if isinstance(size, int) else ()
