"""From a name to a config and a model class of Transformers, without a network."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from flashedu.integrations.probe import quiet, sentence

MAY_BE = (
    "a folder with a config.json, that file, a name in the local Hub cache, "
    "or a model type or class of Transformers"
)


class UnknownModel(ValueError):
    """No model has this name here. The message says what would do."""


@dataclass(frozen=True)
class Named:
    """What a name stands for. `model_class` is None if its code is not in Transformers."""

    source: str  # in words
    config: Any
    model_class: Any

    @property
    def class_name(self) -> str:
        names = [self.model_class.__name__] if self.model_class else self.config.architectures
        return names[0] if names else "a class of its own"


def find(name: str) -> Named:
    """A file comes before a model type of the same name, and that before the Hub cache."""
    with quiet():  # the modules of some models warn when they are imported
        return _find(name)


def _find(name: str) -> Named:
    path = os.path.expanduser(name)
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    if os.path.isfile(file):
        return _from_file(Path(file), f"from {file}")
    if name in CONFIG_MAPPING:
        config = _default(CONFIG_MAPPING[name])
        return Named(f"default config of type {name}", config, _class_for(config))
    model_class = _class_named(name)
    if model_class is not None:
        return Named("default config of its class", _default(model_class.config_class), model_class)
    if os.path.isdir(path):
        raise UnknownModel(f"the folder {name!r} has no config.json")
    cached = _in_the_cache(name)
    if cached is None:
        near = difflib.get_close_matches(name, _like(name), n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"name {MAY_BE}"
        raise UnknownModel(f"{name!r} is not here, and nothing is downloaded; {hint}")
    return _from_file(cached, "from the local Hub cache")


def _like(name: str) -> list[str]:
    """Model types, or classes for a name in capitals."""
    if name.islower():
        return list(CONFIG_MAPPING)
    return [known for known in dir(transformers) if known.endswith(("Model", "LM"))]


def _from_file(file: Path, source: str) -> Named:
    values = _read(file)
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise UnknownModel(f'{file} has no model_type, as in "model_type": "llama"')
    names = values.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise UnknownModel(f"{file}: architectures must be a list of names, got {names!r}")
    known = kind in CONFIG_MAPPING
    if not known and "auto_map" not in values:
        version = transformers.__version__
        raise UnknownModel(f"{file}: Transformers {version} has no model_type {kind!r}")
    config_class = CONFIG_MAPPING[kind] if known else PreTrainedConfig
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # whatever the config's own checks raise
        raise UnknownModel(f"{file} is no config of {kind}: {sentence(error)}") from None
    return Named(source, config, _class_for(config) if known else None)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModel(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UnknownModel(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UnknownModel(f"{file} is no config: it holds a {type(values).__name__}")
    return values


def _default(config_class: Any) -> Any:
    try:
        return config_class()
    except Exception as error:
        what = f"{config_class.__name__} has no default"
        raise UnknownModel(f"{what}: {sentence(error)}; name a folder with a config.json") from None


def _class_named(name: str) -> Any:
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found if getattr(found, "config_class", None) else None
    return None


def _class_for(config: Any) -> Any:
    """The class that the config names, or else the bare model: it has all of the attention."""
    for name in config.architectures or ():
        if (found := _class_named(name)) is not None:
            return found
    others = [getattr(modeling_auto, n) for n in dir(modeling_auto) if n.endswith("_MAPPING")]
    for mapping in (MODEL_MAPPING, *others):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, list | tuple) else found
    raise UnknownModel(f"{config.model_type!r} is a part of a model; name the model")


def _in_the_cache(name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the Hub could have
        return None
    return Path(found) if isinstance(found, str) else None
