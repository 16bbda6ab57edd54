"""Settings on disk: YAML, shipped names, `--set`, and differences in words."""

import contextlib
import difflib
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.model.settings.settings import MAY_CHANGE, TrainSettings, known_keys

CONFIG_FILE = "config.yaml"


SHIPPED = "uniter.model.settings.configs"


class _Words(yaml.SafeLoader):
    """Only true and false are truth values: YAML 1.1 would read `on`, a key of ours, as true."""


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Words.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_settings(values: Mapping[str, Any], *, source: str) -> TrainSettings:
    """Validate.

    Raises:
        BadInput: one sentence about the first wrong key.
    """
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        raise WrongUsage(f"{source}: {_sentence(error)}") from error


def load_config(name: str) -> dict[str, Any]:
    """The mapping of a settings file: a path, or the name of one that ships.

    Raises:
        BadInput: there is none, or it is no YAML mapping.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml", ".json"} or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadInput(
                f"cannot read the settings {name}: {error.strerror or error}; shipped ones are {', '.join(shipped_configs())}"
            ) from error
        except UnicodeDecodeError as error:
            raise BadInput(f"settings {name}: not UTF-8 text ({error.reason} at byte {error.start}); expected YAML or JSON") from error
    else:
        text = shipped_text(name)
    try:
        values = yaml.load(text, _Words)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"settings {name}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BadInput(f"settings {name}: expected a mapping of keys to values, got {type(values).__name__}")
    return values


def shipped_text(name: str) -> str:
    """The YAML of settings that ship.

    Raises:
        BadInput: there are none of that name.
    """
    if name not in shipped_configs():
        raise WrongUsage(unknown_name("shipped settings", name, shipped_configs()))
    return importlib.resources.files(SHIPPED).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def shipped_configs() -> list[str]:
    """The names of the settings files that ship."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in importlib.resources.files(SHIPPED).iterdir() if entry.name.endswith(".yaml")
    )


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a mapping.

    Raises:
        BadInput: something else than a mapping is on the way.
    """
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise BadInput(f"settings: {parent!r} is a {type(values).__name__}, expected a mapping with the key {last!r}")
    values[last] = value


def assign(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=c` (c as YAML) to a mapping; `corpora.0.name=x` reaches into lists.

    Raises:
        BadInput: not of that form, or a key on the way is no mapping.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise WrongUsage(f"--set {assignment!r}: expected KEY=VALUE, e.g. --set optimizer.learning_rate=1e-4")
    try:
        value = yaml.load(text, _Words)
    except yaml.YAMLError as error:
        raise WrongUsage(f"--set {assignment!r}: {text!r} is not a valid value") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a word.
        with contextlib.suppress(ValueError):
            value = float(value)
    place: Any = values
    *parents, last = path.split(".")
    for parent in parents:
        if isinstance(place, list) and parent.isdigit() and int(parent) < len(place):
            place = place[int(parent)]
        elif isinstance(place, dict):
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
        else:
            raise WrongUsage(f"--set {assignment!r}: {parent!r} cannot be reached; is the path right?")
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise WrongUsage(f"--set {assignment!r}: {last!r} cannot be set there; is the path right?")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = [name for name, _ in known_keys()]
        plain = ".".join(part for part in place if not part.isdigit())
        nearest = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
        if not nearest:
            ends = {name.rsplit(".", 1)[-1]: name for name in known}
            nearest = [ends[end] for end in difflib.get_close_matches(place[-1], list(ends), n=1, cutoff=0.5)]
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(sorted(known))}"
        return f"unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    message = str(first["msg"])
    return f"{key} is {first['input']!r}, but {message[:1].lower()}{message[1:]}"


def write_config(path: Path, settings: TrainSettings) -> None:
    """Write settings as YAML that `--config` reads back to the same."""
    values = settings.model_dump(mode="json", by_alias=True)
    aside = path.with_name(f".{path.name}.incoming")
    aside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    aside.replace(path)


def run_of(weights: Path) -> tuple[Path, TrainSettings] | None:
    """The run directory whose checkpoint a weights file is, and the run's settings; None where it is no run's."""
    run = weights.parent.parent.parent
    path = run / CONFIG_FILE
    if weights.parent.parent.name != "checkpoints" or not path.is_file():
        return None
    return run, read_settings(load_config(str(path)), source=str(path))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a repeated command says otherwise than the run, both as YAML holds them: "key: old -> new", without what may change."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in keys
        if before.get(key) != after.get(key) and key.split(".")[0] not in MAY_CHANGE
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, value
