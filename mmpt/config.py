"""Objects that know how they were made, so that a model can be written to a file and rebuilt from it.

A `Configurable` records the arguments of its constructor. `to_config` turns a tree of such objects into plain
`{"class_path": ..., "init_args": {...}}` dictionaries (the form that LightningCLI reads), `from_config` builds it
again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from mmpt.errors import ConfigError, UntrustedClassError

FOLDER = "${folder}"
"""Stands in a saved configuration for the folder that it lies in."""


class Configurable:
    """Mixin that records constructor arguments (also when the subclass is a torch Module)."""

    _init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__dict__["__init__"]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def recording_init(self: Configurable, *args: Any, **kwargs: Any) -> None:
            if type(self).__init__ is recording_init:  # the outermost constructor, not one reached through super()
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()  # a saved model must not change its meaning when a default changes later
                arguments = dict(list(bound.arguments.items())[1:])
                for name, parameter in signature.parameters.items():
                    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                        arguments.update(arguments.pop(name))
                    elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and arguments.pop(name):
                        raise ConfigError(f"{type(self).__name__} takes *{name}; pass these arguments by name")
                object.__setattr__(self, "_init_args", arguments)
            original(self, *args, **kwargs)

        cls.__init__ = recording_init  # type: ignore[method-assign, assignment]

    def config(self, folder: Path | None = None) -> dict[str, Any]:
        """The configuration that rebuilds this object.

        Args:
            folder: where a subclass may write files that it needs again (a tokenizer); they are named
                in the configuration by paths that begin with `${folder}`.
        """
        cls = type(self)
        arguments = self.__dict__.get("_init_args", {})
        if "_init_args" not in self.__dict__ and _takes_arguments(cls):
            raise ConfigError(
                f"the arguments of {cls.__name__} were not recorded, as its __init__ is not written in its class body "
                "(a dataclass has a generated one); write the __init__ out"
            )
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {name: to_config(value, folder) for name, value in arguments.items()},
        }


def _takes_arguments(cls: type) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind not in variadic for parameter in inspect.signature(cls).parameters.values())


def to_config(value: Any, folder: Path | None = None) -> Any:
    """Turn a value into plain dictionaries, lists, strings and numbers.

    Raises:
        ConfigError: a value that is neither plain nor `Configurable`.
    """
    if isinstance(value, Configurable):
        return value.config(folder)
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)  # numpy's float64 is a float that YAML can't write
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_config(item, folder) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_config(item, folder) for item in value]
    raise ConfigError(
        f"{type(value).__name__} can't be written to a configuration; pass a plain value or a class derived from "
        "mmpt.config.Configurable"
    )


def from_config(config: Any, *, folder: Path | None = None, trust: Sequence[str] = ()) -> Any:
    """Build what `to_config` described.

    Args:
        config: plain data; a mapping with `class_path` becomes an object.
        folder: replaces `${folder}` in strings.
        trust: module prefixes besides `mmpt` whose classes may be built, e.g. `["my_package"]`.

    Raises:
        UntrustedClassError: a class outside `mmpt` and `trust`.
        ConfigError: a class that does not exist or refuses its arguments.
    """
    if isinstance(config, str) and folder is not None:
        return config.replace(FOLDER, str(folder))
    if isinstance(config, Mapping):
        if "class_path" in config:
            return _build(config, folder, trust)
        return {key: from_config(item, folder=folder, trust=trust) for key, item in config.items()}
    if isinstance(config, list):
        return [from_config(item, folder=folder, trust=trust) for item in config]
    return config


def packages(config: Any) -> set[str]:
    """The top-level packages of all classes that a configuration names, for callers who trust its origin."""
    if isinstance(config, Mapping):
        own = {str(config["class_path"]).split(".")[0]} if "class_path" in config else set()
        return own.union(*(packages(item) for item in config.values()))
    return set().union(*(packages(item) for item in config)) if isinstance(config, list) else set()


def _build(config: Mapping[str, Any], folder: Path | None, trust: Sequence[str]) -> Any:
    path = str(config["class_path"])
    allowed = ("mmpt", *trust)
    if not any(path.startswith(f"{prefix}.") for prefix in allowed):
        raise UntrustedClassError(
            f"the configuration names the class {path}, which is outside {', '.join(allowed)}. Building it would run "
            f"code of that package; if you trust it, pass trust=[{path.split('.')[0]!r}]"
        )
    module_name, _, class_name = path.rpartition(".")
    try:
        cls = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the class {path} of the configuration can't be imported: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Configurable)):
        raise UntrustedClassError(
            f"{path} is not a class derived from mmpt.config.Configurable; nothing else may be built"
        )
    arguments = {
        name: from_config(value, folder=folder, trust=trust) for name, value in (config.get("init_args") or {}).items()
    }
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path} does not take the arguments of the configuration: {error}") from error
    return cls(**arguments)
