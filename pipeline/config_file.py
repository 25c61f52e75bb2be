"""Reading a config: YAML without duplicate keys, `--set` overrides, and every problem named at once."""

import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError, create_model

from pipeline.config import RunConfig, reads_adapter, shape_of, shipped_folder
from pipeline.errors import ConfigError, did_you_mean
from pruning import criteria
from recovery import adapters


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownMemberType]
        if not isinstance(key, Hashable):
            problem = "a key is a single value, this is a list or a mapping; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
        line = key_node.start_mark.line + 1
        if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
            raise yaml.constructor.ConstructorError(
                problem=f"key {key!r} is given twice, in lines {seen[key]} and {line}", problem_mark=key_node.start_mark
            )
        seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read and check a config. Raises ConfigError with one line for each problem."""
    return check(read(path, overrides), str(path))


def read(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file's mapping with the overrides (`key.path=YAML value`) put in.

    A shipped config may be given as NAME or configs/NAME.
    """
    if not path.is_file():
        shipped = shipped_folder() / path.name
        if path.parent not in (Path(), Path("configs")) or not shipped.is_file():
            names = sorted(file.name for file in shipped_folder().glob("*.yaml"))
            raise ConfigError(f"{path}: no such config file; shipped ones are {', '.join(names)}")
        path = shipped
    try:
        data = _parsed(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error.reason})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this is a {type(data).__name__}")
    return override(cast("dict[str, Any]", data), overrides)


def override(data: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The mapping with `key.path=YAML value` put in, changed in place."""
    for text in overrides:
        _override(data, text)
    return data


def check(data: dict[str, Any], place: str) -> RunConfig:
    """The checked config of a mapping. `place` names it in messages."""
    model = RunConfig
    fields: dict[str, Any] = {}
    problems: list[str] = []
    pruning, recovery = data.get("pruning"), data.get("recovery")
    if isinstance(pruning, dict):
        method = _method(cast("dict[str, Any]", pruning), criteria, "pruning.method", problems)
        if method:
            fields["pruning"] = (method | None, None)
    if reads_adapter(data):
        problems += _meaningless(cast("dict[str, Any]", recovery))
    elif isinstance(recovery, dict) and isinstance(recovery.get("adapter"), dict):
        method = _method(cast("dict[str, Any]", recovery["adapter"]), adapters, "recovery.adapter.method", problems)
        if method:
            section = create_model(
                "Recovery",
                __base__=RunConfig.model_fields["recovery"].annotation.__args__[0],  # type: ignore
                adapter=(method, ...),
            )
            fields["recovery"] = (section | None, None)
    if fields:
        model = create_model("Run", __base__=RunConfig, **fields)
    try:
        config = model.model_validate(shape_of(data))
    except ValidationError as error:
        told = any(line.startswith("recovery.adapter.method:") for line in problems)
        found = [detail for detail in error.errors() if not (told and detail["loc"] == ("recovery", "adapter"))]
        # A default that follows from a value which is wrong itself is no problem of its own.
        problems += [_problem(model, detail) for detail in found if detail["type"] != "default_factory_not_called"]
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(f"{place}: {line}" for line in problems))
    return config


def _meaningless(recovery: dict[str, Any]) -> list[str]:
    """What is said beside `recovery.adapter.from`, where nothing is trained."""
    adapter, problems = recovery["adapter"], list[str]()
    if not isinstance(adapter["from"], str):
        problems.append("recovery.adapter.from: missing; write path:FOLDER, or leave `from` out to train an adapter")
    if "method" in adapter:
        both = "an adapter that is read has a method already"
        problems.append(f"recovery.adapter.method: {both}; leave `method` out, or `from` to train a new adapter")
    others = [f"recovery.adapter.{key}" for key in adapter if key not in ("from", "method")]
    others += [f"recovery.{key}" for key in recovery if key != "adapter"]
    return problems + [f"{key}: means nothing beside adapter.from: nothing is trained; leave it out" for key in others]


def _method(section: dict[str, Any], registry: Any, key: str, problems: list[str]) -> type[BaseModel] | None:
    name = section.get("method")
    if name in registry.names():
        return registry.load(name).Config
    if name is None:
        problems.append(f"{key}: missing; there are {', '.join(registry.names())}")
    else:
        near = did_you_mean(str(name), registry.names())
        problems.append(f"{key}: no method is called {name!r}{near}; there are {', '.join(registry.names())}")
    return None


def _problem(model: type[BaseModel], detail: Any) -> str:
    location: tuple[str | int, ...] = detail["loc"]
    path = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{did_you_mean(str(location[-1]), _known_keys(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"{path}: missing"
    message = detail["msg"].removeprefix("Value error, ")
    if not path:
        return message
    value = detail["input"]
    given = f" (got {value!r})" if isinstance(value, str | int | float | bool) and repr(value) not in message else ""
    return f"{path}: {message}{given}"


def _known_keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in current.model_fields.items()}
            if part not in fields:
                return []
            current = _section_in(fields[part].annotation)
        if current is None:
            return []
    keys = [field.alias or name for name, field in current.model_fields.items()]
    inner = {"pruning": "calibration", "recovery": "data", "distillation": "teacher"}
    return [key for key in keys if "." not in key] + [inner[part] for part in location[-1:] if part in inner]  # type: ignore


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section_in(part))), None)


def _override(data: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text}: write it as key.path=value, as in recovery.adapter.rank=16")
    try:
        parsed = _parsed(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: not a YAML value: {_yaml_problem(error)}") from error
    current: Any = data
    parts = path.split(".")
    for index, part in enumerate(parts):
        last, place = index == len(parts) - 1, ".".join(parts[: index + 1])
        step: Any = part
        if isinstance(current, list):
            count = len(cast("list[Any]", current))
            if not part.isdecimal() or int(part) >= count:
                raise ConfigError(f"--set {text}: {place}: this is a list of {count} items, counted from 0")
            step = int(part)
        elif not isinstance(current, dict):
            raise ConfigError(f"--set {text}: {'.'.join(parts[:index])} is a single value, it has no key {part!r}")
        elif part not in current and not last:
            current[part] = {}
        if last:
            current[step] = parsed
        else:
            current = current[step]


def _parsed(text: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply to be read; a config has a few levels") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1})" if mark else error.problem
    return str(error)
