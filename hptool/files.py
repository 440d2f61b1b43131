"""Files: YAML and JSON to frozen types and back. Strict when reading, atomic when writing.

The only module that uses yaml and pydantic. Every reader raises InputError with one line a mistake, all the
mistakes of a file at once: `file: key: what was given, what is allowed`.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from hptool.errors import InputError
from hptool.facts import Cluster, Engine, Framework, GpuSpec, Network, Networks

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent

#: Where a user's own GPU facts lie, from where hptool is run.
GPUS_HERE = Path("cluster") / "gpus"


class _Loader(yaml.CSafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.2; PyYAML wants `1.0e-4`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (yaml's signature)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, below which keys may stand again
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


#: `1e-4` is a number; what is written so and is a word has to be quoted.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


def data_directory(name: str) -> Path:
    """`base_configs` or `cluster`: inside the package when installed from a wheel, beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


# ---------------------------------------------------------------- reading


def read_text(path: Path) -> str:
    """The file's text; InputError where it cannot be had."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise InputError(f"{path}: cannot be read: {reason}") from error


def parse_yaml(text: str, source: str) -> Any:
    """Safe YAML; InputError with line and column where it is broken."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{source}: not valid YAML{where}: {what}") from error
    except ValueError as error:  # a date or number that Python cannot hold
        raise InputError(f"{source}: not valid YAML: {error}") from error


def read_yaml(path: Path) -> Any:
    """As `parse_yaml`, of a file."""
    return parse_yaml(read_text(path), str(path))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What checks values of `kind`; making one takes longer than reading a file with it."""
    return TypeAdapter(kind)


def read_config_yaml(path: Path) -> Any:
    """A training config: as `read_yaml`, with the interpolations that NeMo's configs have worked out.

    `${.hidden_size}`, `${model.num_layers}`, `${training.model.num_layers}` (as from the launcher's root) and
    `${multiply:4, ${.hidden_size}}`. What they cannot reach, such as `${data_dir}`, stays as it is written.
    """
    document = read_yaml(path)
    return _interpolated(document) if "${" in json.dumps(document, default=str) else document


def _interpolated(document: Any) -> Any:
    import omegaconf  # noqa: PLC0415 (only where it is needed)

    resolvers = {"multiply": lambda x, y: x * y, "divide_floor": lambda x, y: x // y, "divide": lambda x, y: x / y}
    for name, function in resolvers.items():
        omegaconf.OmegaConf.register_resolver(name, function, replace=True)
    root = omegaconf.OmegaConf.create({**document, "training": document} if isinstance(document, dict) else document)

    def resolved(value: Any, node: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(inner, lambda key=key: node()[key]) for key, inner in value.items()}
        if isinstance(value, list):
            return [resolved(inner, lambda i=i: node()[i]) for i, inner in enumerate(value)]
        if not (isinstance(value, str) and "${" in value):
            return value
        try:
            found = node()
        except (omegaconf.errors.OmegaConfBaseException, ArithmeticError, TypeError):
            return value
        return omegaconf.OmegaConf.to_container(found, resolve=True) if omegaconf.OmegaConf.is_config(found) else found

    return resolved(document, lambda: root)


def parse(document: Any, kind: type[T], source: str) -> T:
    """`document` (mappings, lists, scalars) as the frozen dataclass `kind`; `source` names it in errors."""
    if not isinstance(document, Mapping):
        raise InputError(f"{source}: a mapping of keys is needed, {type(document).__name__} given")
    problems = [
        f"{source}: {key}: unknown key; {nearest(key.rpartition('.')[2], known)}"
        for key, known in _unknown_keys(document, kind)
    ]
    try:
        # Through JSON, because only there does strict mode take a list for a tuple.
        value: T = _adapter(cast("Hashable", kind)).validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as error:
        problems += [f"{source}: {line}" for line in _validation_lines(error)]
        raise InputError(*dict.fromkeys(problems)) from error
    if problems:
        raise InputError(*problems)
    return value


def read(path: Path, kind: type[T]) -> T:
    """A YAML or JSON file as `kind`."""
    return parse(read_yaml(path), kind, str(path))


def parse_json(text: str, kind: Any, source: str) -> Any:
    """JSON text as `kind` (a dataclass or a union of them); InputError where it does not fit."""
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise InputError(*(f"{source}: {line}" for line in _validation_lines(error))) from error


def nearest(word: str, allowed: Sequence[str]) -> str:
    """A hint: the closest of `allowed`, or all of them where none is close."""
    close = [x for x in allowed if x.endswith(f"/{word}")] or difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed are {', '.join(sorted(allowed))}"


def _unknown_keys(document: Mapping[Any, Any], kind: Any, prefix: str = "") -> Iterator[tuple[str, Sequence[str]]]:
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key, value in document.items():
        if key not in hints or key not in names:
            yield f"{prefix}{key}", names
            continue
        nested = next((t for t in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(t)), None)
        if nested is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, nested, f"{prefix}{key}.")


def _validation_lines(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        if item["type"] == "unexpected_keyword_argument":  # already reported, with the nearest name
            continue
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "function-")))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("missing", "missing_argument"):
            yield f"{where}: required key is missing"
        elif item["type"] == "value_error":
            yield from (f"{where}: {line}" if where else line for line in message.splitlines())
        else:
            allowed = message.removeprefix("Input should be ").removeprefix("a valid ")
            yield f"{where}: {item['input']!r} given, allowed is {allowed}"


def apply_overrides(document: Any, overrides: Sequence[str], source: str) -> Any:
    """`document` with `a.b=value` applied (values are YAML); unknown keys are found by the `parse` that follows."""
    problems = []
    for override in overrides:
        path, separator, text = override.partition("=")
        keys = path.split(".")
        if not separator or not all(re.fullmatch(r"\w+", key) for key in keys):
            problems.append(f"{source}: {override!r}: an override is written key.key=value")
            continue
        value = parse_yaml(text, f"{source}: {path}")
        document = with_value(document, keys, value)
    if problems:
        raise InputError(*problems)
    return document


def with_value(document: Any, keys: Sequence[str], value: Any) -> Any:
    """`document` with the value at the path `keys` set; the original stays as it was."""
    base = dict(document) if isinstance(document, Mapping) else {}
    base[keys[0]] = value if len(keys) == 1 else with_value(base.get(keys[0]), keys[1:], value)
    return base


# ---------------------------------------------------------------- facts


def read_gpus() -> dict[str, GpuSpec]:
    """All GPUs by their names and aliases, in small letters.

    Those of `./cluster/gpus/`, where `hptool calibrate` writes, come before those that hptool comes with.
    """
    known = {}
    shipped, own = data_directory("cluster") / "gpus", GPUS_HERE.absolute()
    for directory in (shipped, *([own] if own.resolve() != shipped.resolve() else [])):
        for path in sorted(directory.glob("[!.]*.yaml")):
            try:
                spec = read(path, GpuSpec)
            except InputError as error:
                raise InputError(*error.problems, f"{path}: mend or remove it: facts here come first") from error
            known.update({name.lower(): spec for name in (spec.name, *spec.aliases)})
    return known


def read_gpu(name_or_path: str, source: str) -> GpuSpec:
    """The GPU of that name (or one of its aliases), or of a file by its path, which ends in .yaml or .yml."""
    if name_or_path.endswith((".yaml", ".yml")):
        return read(Path(name_or_path), GpuSpec)
    known = read_gpus()
    if name_or_path.lower() not in known:
        raise InputError(
            f"{source}: gpu: unknown GPU {name_or_path!r}; {nearest(name_or_path, sorted(known))} "
            "(or give the path of a .yaml file)"
        )
    return known[name_or_path.lower()]


def read_frameworks() -> dict[str, Framework]:
    """All frameworks of `cluster/frameworks/` by name; one that is `like` another gives what differs alone."""
    return {name: _framework(path) for name, path in _framework_files().items()}


def read_framework(name: str) -> Framework:
    """The framework of that name from `cluster/frameworks/`."""
    known = _framework_files()
    if name not in known:
        raise InputError(f"--framework: unknown framework {name!r}; {nearest(name, sorted(known))}")
    return _framework(known[name])


def read_engines() -> dict[str, Engine]:
    """All inference engines of `cluster/engines/` by name; one that is `like` another gives what differs alone."""
    return {name: parse(_like(path), Engine, str(path)) for name, path in _engine_files().items()}


def read_engine(name: str) -> Engine:
    """The engine of that name from `cluster/engines/`."""
    known = _engine_files()
    if name not in known:
        raise InputError(f"--engine: unknown engine {name!r}; {nearest(name, sorted(known))}")
    return parse(_like(known[name]), Engine, str(known[name]))


def _engine_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((data_directory("cluster") / "engines").glob("*.yaml"))}


def _framework_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted((data_directory("cluster") / "frameworks").glob("*.yaml"))}


def _framework(path: Path) -> Framework:
    return parse(_like(path), Framework, str(path))


def _like(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = read_yaml(path)
    if "like" not in document:
        return document
    return {**_like(path.with_name(f"{document.pop('like')}.yaml")), "aliases": [], **document}


def read_networks() -> tuple[Network, ...]:
    """The networks of `cluster/networks/`, in the order in which they are to be tried."""
    return read(data_directory("cluster") / "networks" / "published.yaml", Networks).networks


def read_cluster(name_or_path: str) -> Cluster:
    """A profile by its name under `cluster/`, or by the path of a YAML file.

    Its `gpu` is a name, or a path beside the profile. A link that it leaves out, or that was measured in its own jobs,
    is the GPU's.
    """
    path = named_file(name_or_path, data_directory("cluster"), "*.yaml", "cluster profile")
    document = read_yaml(path)
    if isinstance(document, Mapping) and isinstance(name := document.get("gpu"), str):
        is_file = name.endswith((".yaml", ".yml"))
        if is_file and not (path.parent / name).is_file():
            raise InputError(f"{path}: gpu: {name} given, but there is no such file beside the profile")
        document = _with_gpu(document, read_gpu(str(path.parent / name) if is_file else name, str(path)))
    if isinstance(document, Mapping) and isinstance(variables := document.get("environment"), Mapping):
        # NCCL_IB_DISABLE: 1 means what it says; yes and no are no words of a shell, and have to be quoted.
        numbers = {k: str(v) for k, v in variables.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        document = {**document, "environment": {**variables, **numbers}}
    return parse(document, Cluster, str(path))


def _with_gpu(document: Mapping[str, Any], gpu: GpuSpec) -> Mapping[str, Any]:
    """A profile's document with the facts of its GPU, and the links that are the GPU's to give."""
    measured = gpu.measured
    if measured is not None:  # the points have served the fit, and would swell the plan of every search
        gpu = dataclasses.replace(gpu, measured=dataclasses.replace(measured, points=()))
    links = {name: dataclasses.asdict(getattr(gpu, name)) for name in ("intra_node", "inter_node")}
    own = measured.links if measured is not None and measured.cluster == document.get("name") else ()
    return {**links, **document, **{name: links[name] for name in own}, "gpu": dataclasses.asdict(gpu)}


def named_file(name_or_path: str, directory: Path, pattern: str, what: str) -> Path:
    """`directory/NAME.yaml` for a name among those of `pattern`; a path ending in .yaml or .yml as it is."""
    if name_or_path.endswith((".yaml", ".yml")):
        return Path(name_or_path)
    known = sorted(str(p.relative_to(directory).with_suffix("")) for p in directory.glob(pattern))
    if name_or_path not in known:
        raise InputError(
            f"{name_or_path}: unknown {what}; {nearest(name_or_path, known)} (or give the path of a .yaml file)"
        )
    return directory / f"{name_or_path}.yaml"


# ---------------------------------------------------------------- writing


class _Dumper(yaml.CSafeDumper):
    """Safe YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
_Dumper.add_multi_representer(IntEnum, lambda dumper, value: dumper.represent_str(value.name.lower()))


def yaml_text(document: Any) -> str:
    """YAML in the order of the keys."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON of plain values and dataclasses."""
    return json.dumps(value, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return value.item()
    return str(value)


def write_text(path: Path, text: str) -> None:
    """The whole text or nothing: written aside, flushed to disk, renamed. InputError in the place of no plain file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is there, and no plain file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """One whole line at the end of the file, on disk when this returns; a torn line before it stays a line."""
    with path.open("ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + line.rstrip("\n").encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
