"""Reading a pipeline.toml, and what a run kept of one: full paths, `--set`, trainings, and each error with its place.

config, places = load_config(Path("my/pipeline.toml"), ["train.epochs=2"])
places["train.epochs"]   # "--set train.epochs=2"; of another key "pipeline.toml:7"
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import trainings
from pipeline.config import (
    HUB,
    STANDARD_INPUT,
    TEMPLATE_WAYS,
    Config,
    GivenAdapter,
    Run,
    Section,
    Source,
    fields,
    is_on_hub,
    is_pattern,
    meanings,
)  # fmt: skip
from pipeline.errors import UserError
from pipeline.resources import chat_templates, expanded, without_links
from pipeline.run.layout import Layout

# A command line can hold bytes that are not UTF-8, which Python shows as lone surrogates; TOML can hold a zero.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_TOO_MUCH = "holds a number with thousands of digits, or lists or tables nested hundreds deep"

# Paths that are taken from the folder of pipeline.toml, not from where the command was typed.
_PATHS = (
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("adapter", "path"),
    ("train", "from_adapter"),
    ("run", "folder"),
)


def trainings_of(path: Path) -> tuple[str, ...]:
    """The names of a configuration's [[trainings]], in their order, and of their combination; none where it has none.

    Raises:
        UserError: as `load_config`.
    """
    path, text, values = _read(path)
    return trainings.names_of(values, text, path)


def _read(path: Path) -> tuple[Path, str, dict[str, Any]]:
    """A file's path in full, its text, and its values."""
    path = expanded(path, "CONFIG").absolute()
    if _NO_TEXT.search(str(path)):
        raise UserError(f"{str(path)!r}: the path is not UTF-8 text; rename the file or its folder")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give the path of a configuration, e.g. `pipeline run my/pipeline.toml`"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the pipeline.toml in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = tomllib.loads(text)
        list(_dotted(values))  # where that is too deep, so is it for all that comes after
        return path, text, values
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: {_TOO_MUCH}") from None


def load_config(path: Path, overrides: Sequence[str] = (), training: str = "") -> tuple[Config, dict[str, str]]:
    """Read a configuration.

    Args:
        path: the TOML file.
        overrides: "section.key=value" strings; they win over the file.
        training: which of `trainings_of` is meant; "" where it has none.

    Returns:
        The configuration, and for every dotted key that was given the place it came from.

    Raises:
        UserError: with file, line and key, and what is allowed there.
    """
    path, text, values = _read(path)
    places = {key: _place(path, text, key) for key in _dotted(values)}
    of_training: dict[str, Any] = {}
    if names := trainings.names_of(values, text, path):
        if training not in names:
            which = f"--training {training}: there is none of this name" if training else "has several trainings"
            raise UserError(f"{path}: {which}: name one of them with --training: {', '.join(names)}")
        of_training, lines = trainings.take(values, text, training)
        places |= {key: _place(path, lines, key) for key in _dotted(of_training)}
        trainings.place_before(of_training, values)
    elif training:
        raise UserError(f"{path}: --training {training}: it has no [[trainings]]")

    named = "name" in of_training.get("ollama", {})
    for override in overrides:
        key, value = parse_override(override)
        if training == trainings.COMBINED and key in trainings.NOT_OF_THE_COMBINATION:
            continue
        named = named and key not in ("ollama", "ollama.name")  # one name for all is no training's own
        _assign(values, key, value, override)
        places |= dict.fromkeys(_dotted(value, key) if isinstance(value, dict) else [key], f"--set {override}")

    _refuse_unusable(values, places, path)
    _in_full(values, places, path.parent)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, places, path))) from None
    _refuse_unreadable(config, places, path, training)
    config = _anchored(config, path, training, named=named)
    if config.run_folder == path.parent.resolve():
        place = places.get("run.folder", str(path))
        raise UserError(f"{place}: run.folder: is the folder of {path.name}; give one of its own, e.g. run")
    return config, {key: place.replace(str(path), path.name) for key, place in places.items()}


def _in_full(values: dict[str, Any], places: dict[str, str], folder: Path) -> None:
    """Every path and every base in full, from the folder of pipeline.toml.

    Raises:
        UserError: one cannot be, or a file that is read at once is not there.
    """
    for section, key in _PATHS:
        if (given := _text(values, section, key)) is not None:
            values[section][key] = _source(given, folder, f"{places.get(f'{section}.{key}')}: {section}.{key}")
    for table in _tables(values.get("adapters")):
        if isinstance(training := table.get("training"), str) and "path" not in table:
            runs = _table(values, "run").get("folder")
            table["path"] = Layout(folder / (runs if isinstance(runs, str | Path) else Run().folder) / training).adapter
    for key, tables in (("data.sources", _table(values, "data").get("sources")), ("adapters", values.get("adapters"))):
        for table in _tables(tables):
            for name in ("path", "test"):
                if isinstance(table.get(name), str):
                    table[name] = _source(table[name], folder, f"{places.get(key)}: {key}")
    _from_elsewhere(values, places)
    template = _text(values, "ollama", "template")
    if template is not None and template not in TEMPLATE_WAYS:
        where = f"{places.get('ollama.template')}: ollama.template"
        values["ollama"]["template"] = str(folder / expanded(template, where))
    own = _text(values, "model", "chat_template")
    if own and own not in chat_templates():
        where = f"{places.get('model.chat_template')}: model.chat_template"
        file = folder / expanded(own, where)
        if problem := _unreadable(file):
            raise UserError(f"{where}: {file}: {problem}; well-known ones are {', '.join(chat_templates())}")
        values["model"]["chat_template"] = str(file)
    for section, key in (("model", "base"), ("merge", "model")):
        if base := _text(values, section, key):
            values[section][key] = _base(base, folder, f"{places.get(f'{section}.{key}')}: {section}.{key}")


def _table(values: dict[str, Any], section: str) -> dict[str, Any]:
    """A section as it was given; an empty one where it is none."""
    table = values.get(section)
    return table if isinstance(table, dict) else {}


def _tables(value: Any) -> list[dict[str, Any]]:
    """The tables of a list of them; what is none is refused later."""
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []


def _text(values: dict[str, Any], section: str, key: str) -> str | None:
    """A key's value where it is a text."""
    value = _table(values, section).get(key)
    return value if isinstance(value, str) else None


def _refuse_unreadable(config: Config, places: dict[str, str], path: Path, training: str) -> None:
    """Refuse files that are not there, or that cannot be read as often as they are needed.

    Judged here and not in Config, by which runs of before are read too.
    """
    for key in ("train", "validation", "test"):
        file = getattr(config.data, key)
        if file is not None and (problem := _unreadable(file, many=True)):
            raise UserError(f"{places.get(f'data.{key}', path)}: data.{key}: {file}: {problem}")
    if (folder := config.train.from_adapter) is not None and not folder.is_dir():
        where = f"{places.get('train.from_adapter', path)}: train.from_adapter"
        raise UserError(f"{where}: {folder}: no such folder; give the one with adapter_config.json")
    once = [*(f"data.{key}" for key in ("train", "validation", "test") if getattr(config.data, key) == STANDARD_INPUT)]
    once += ["data.sources" for source in config.data.sources if source.path == STANDARD_INPUT]
    if once and training:
        raise UserError(
            f"{places.get(once[0], path)}: {once[0]}: -: standard input can be read once, and several [[trainings]] "
            "would each have it: give a file"
        )
    if len(once) > 1:
        raise UserError(f"{places.get(once[1], path)}: {once[1]}: -: {once[0]} is standard input already: one can be")
    for key, more in (
        *(("data.sources", source.path) for source in config.data.sources),
        *(("adapters", adapter.test) for adapter in config.adapters),
    ):
        if more is not None and (problem := _unreadable(more, many=True)):
            raise UserError(f"{places.get(key, path)}: {key}: {more}: {problem}")
    if config.model.trust_remote_code and "/" in config.model.base and not Path(config.model.base).is_absolute():
        raise UserError(
            f"{places['model.trust_remote_code']}: model.trust_remote_code: {config.model.base} is no folder here, and "
            "no Python files are fetched from a hub: read them, put the whole model into a folder, and give that as "
            "model.base"
        )


def _source(given: str, folder: Path, where: str) -> Path:
    """A path in full, from the folder of pipeline.toml; the name of a data set of a hub as it is."""
    if given.startswith(HUB):
        return Path(given)
    return STANDARD_INPUT if given in ("-", "/dev/stdin") else folder / expanded(given, where)


def _from_elsewhere(values: dict[str, Any], places: dict[str, str]) -> None:
    """With adapters that were trained elsewhere no data is needed, and how the base was loaded is not known.

    Raises:
        UserError: there is no such folder, or data to train on.
    """
    one, several = values.get("adapter"), values.get("adapters")
    given = [("adapter.path", one.get("path"))] if isinstance(one, dict) else []
    made_here: set[Any] = set()  # by trainings that may be yet to come
    if isinstance(several, list):
        given += [("adapters", table.get("path")) for table in several if isinstance(table, dict)]
        made_here = {table["path"] for table in several if isinstance(table, dict) and table.get("training")}
        _ask_as_trained(values, several)
    given = [(key, path) for key, path in given if path is not None]
    for key, path in given:
        if isinstance(path, str | Path) and not Path(path).is_dir() and path not in made_here:
            raise UserError(f"{places.get(key)}: {key}: {path}: no such folder; give the one with adapter_config.json")
    if not given:
        return
    key, _ = given[0]
    said = f"default with {key}"
    unknown: list[tuple[str, str, bool | None]] = [("data", "train", None)]
    if any(path not in made_here for _, path in given):
        unknown.append(("train", "load_in_4bit", False))
    for section, name, default in unknown:
        table = values.setdefault(section, {})
        if isinstance(table, dict) and name not in table:
            table[name] = default
            places[f"{section}.{name}"] = said
    if places.get("data.train", said) != said:
        raise UserError(f"{places['data.train']}: data.train: nothing is trained with {key}: remove one of them")


def _ask_as_trained(values: dict[str, Any], adapters: list[Any]) -> None:
    """Where no questions are given, each adapter of a run has those of its run."""
    of_data = values.get("data", {})
    tables = [table for table in adapters if isinstance(table, dict) and isinstance(table.get("path"), Path)]
    if not isinstance(of_data, dict) or any("test" in table for table in (of_data, *tables)):
        return
    for table in tables:
        run = Layout.of_adapter(table["path"])
        if run is not None and (rows := run.rows("test")).is_file() and rows.stat().st_size:
            table["test"] = rows


def _base(base: str, folder: Path, where: str) -> str:
    """A base on this machine, beside the file or where the command was typed, in full: a stage may work elsewhere."""
    given = expanded(base, where)
    places = (folder / given, given) if "/" in base else (folder / given,)  # a bare name may be a packaged base's
    try:
        return next((str(place.resolve()) for place in places if place.is_dir() or _is_gguf(place)), base)
    except OSError as error:
        raise UserError(f"{where}: {base}: {error.strerror}") from None


def _is_gguf(place: Path) -> bool:
    return place.suffix.lower() == ".gguf" and place.is_file()


def _unreadable(file: Path, *, many: bool = False) -> str | None:
    """Why a file cannot be read, if it cannot; `many`: a folder or a pattern will do."""
    try:
        if many and (file == STANDARD_INPUT or is_on_hub(file) or file.is_dir() or is_pattern(file)):
            return None
        if file.is_dir():
            return "is a folder; give the file in it"
        if not file.is_file():
            return "no such file"
        file.open("rb").close()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _anchored(config: Config, path: Path, training: str, *, named: bool) -> Config:
    """Defaults that depend on where the file lies. Each of its trainings has a folder and, if it names none, a name."""
    folder = path.parent / config.run.folder / training
    name = config.ollama.name or re.sub(r"[^a-z0-9._-]+", "-", path.parent.name.lower())[:80].strip("-._") or "model"
    if training and not named:
        name = f"{name}-{training.lower()}"
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"folder": without_links(folder)}),
            "ollama": config.ollama.model_copy(update={"name": name}),
        }
    )


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from _dotted(value, name)
        else:
            yield name


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of --set KEY=VALUE: TOML, or a bare word, which is a string.

    Raises:
        UserError: it has no key, or a value beyond all measure.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){1,3}", key):
        raise UserError(f"--set {override}: write section.key=value, e.g. --set train.epochs=2")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text.strip()  # a bare word is a string
    except (ValueError, RecursionError):
        raise UserError(f"--set {key}: {_TOO_MUCH}") from None


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {table} is a value, not a table")
    values[last] = value


def _place(path: Path, text: str, dotted: str) -> str:
    """ "file:line" of a key. tomllib keeps no positions, so the line is looked for; without one, the file."""
    *tables, key = dotted.split(".")
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([^\[\]]+?)\s*\]", line):
            if header[1] == dotted:  # a list of tables, of which this is the first
                return f"{path}:{number}"
            table = [part.strip().strip("\"'") for part in header[1].split(".")]
        elif assignment := re.match(r"\s*([\w\"'.-]+)\s*=", line):
            name = [part.strip().strip("\"'") for part in assignment[1].split(".")]
            full = [*table, *name]
            if full == [*tables, key] or full == dotted.split(".")[: len(full)]:
                return f"{path}:{number}"
    return str(path)


def _refuse_unusable(values: dict[str, Any], places: dict[str, str], path: Path) -> None:
    """Refuse what no path, prompt or manifest can hold."""
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        key, value = left.pop()
        problem = None
        if isinstance(value, dict):
            left += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, str) and _NO_TEXT.search(value):
            problem = f"{value!r} holds a zero byte, or bytes that are not UTF-8"
        elif isinstance(value, int) and abs(value) >= 2**63:
            problem = "a whole number has at most 64 bits"
        if problem:
            raise UserError(f"{places.get(key, path)}: {key}: {problem}")


def _nearest(name: str) -> str:
    """What was most likely meant by an unknown section, or by an unknown key ("section.key")."""
    section, _, key = name.partition(".")
    candidates = [known for known, _ in fields()] if key else list(Config.model_fields)
    own = [candidate for candidate in candidates if candidate.startswith(f"{section}.")]
    close = difflib.get_close_matches(name, own, 1, 0.6)
    if key and not close:  # the right key in the wrong section
        close = [candidate for candidate in candidates if candidate.endswith(f".{key}")]
    if close := close or difflib.get_close_matches(name, candidates, 1, 0.6):
        return f"did you mean {close[0]}?"
    return f"known are: {', '.join(candidate.removeprefix(f'{section}.') for candidate in own or candidates)}"


# Keys whose value is a list of tables.
_TABLES: dict[str, type[Section]] = {"data.sources": Source, "adapters": GivenAdapter}
_EXAMPLES = {
    "model": 'base = "smollm2-135m-instruct" (the packaged model), a hub id, a local folder or a GGUF file',
    "model.base": '"smollm2-135m-instruct" (the packaged model), a hub id, a local folder or a GGUF file',
    "data": 'train = "train.jsonl"',
    "data.train": '"train.jsonl"',
}


def _explain(error: ValidationError, places: dict[str, str], path: Path) -> Iterator[str]:
    """One message a key: where it stands, what is wrong with it, what is right."""
    meaning = meanings()
    seen = set()
    for detail in error.errors(include_url=False):
        parts = detail["loc"]
        key = "adapters" if parts[:1] == ("adapters",) else ".".join(map(str, parts[:2]))
        inner = [part for part in parts[key.count(".") + 1 :] if isinstance(part, str)] if key in _TABLES else []
        name = f"{key}: {inner[0]}" if inner else key
        if key in seen:  # each arm of a union complains
            continue
        seen.add(key)
        where = next((place for name, place in places.items() if name == key or name.startswith(f"{key}.")), path)
        match detail["type"]:
            case "value_error":  # its message names the key, which may be of any section
                message = str(detail["ctx"]["error"])
                where = next((places[word] for word in re.findall(r"[\w.]+", message) if word in places), where)
                yield f"{where}: {message}"
            case "missing":
                yield f"{where}: {name}: must be given: {_EXAMPLES.get(key, meaning.get(key))}"
            case "extra_forbidden" if inner:
                yield f"{where}: {name}: unknown key; known are: {', '.join(_TABLES[key].model_fields)}"
            case "extra_forbidden" if "." in key:
                yield f"{where}: {key}: unknown key; {_nearest(key)}"
            case "extra_forbidden":
                yield f"{where}: [{key}]: unknown section; {_nearest(key)}"
            case "model_type":
                yield f"{where}: {key}: must be a table; write [{key}] and its keys below it"
            case _:
                given, words = detail.get("input"), detail["msg"]
                yield f"{where}: {name} = {given!r}: {words[0].lower()}{words[1:]} ({meaning[key]})"


def as_toml(value: Any) -> str:
    """A JSON value as TOML writes it: they differ in tables, in null, which is left out, and in a control."""
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in given.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def as_comment(text: str) -> str:
    """A text as a comment of TOML, which is one line and has no control characters."""
    return "# " + re.sub(r"[\0-\x1f\x7f]+", " ", text)


def read_run(folder: Path) -> Config:
    """The configuration that a run's folder was made with. The folder may have been moved.

    Raises:
        UserError: it is no run's folder.
    """
    try:
        values = json.loads(Layout(folder).config.read_text(encoding="utf-8"))
        values["run"]["folder"] = str(folder)
        return Config.model_validate_json(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: is not a run's folder: its config.json is not this program's; a model's folder is verified "
            f"with `pipeline verify --hf {folder} --gguf FILE`"
        ) from None
