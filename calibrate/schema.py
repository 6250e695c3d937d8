"""Reading JSON by a schema, with errors of one line that name the place in the file."""

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from meshwright.errors import ClusterError

T = TypeVar("T")
SOME_KEY = "[...]"  # how msgspec names the key of a mapping: not at all


def read_json(path: str | os.PathLike[str]) -> object:
    """The JSON data of a file.

    Raises:
        ClusterError: the file cannot be read, is not JSON, or writes a field twice, which would lose a number.
    """
    where = os.fspath(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ClusterError(f"{where}: cannot be read ({error.strerror}); give the path of a machine file") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, a number of thousands of digits, an odd path
        raise ClusterError(f"{where}: not JSON ({error}); run `meshwright calibrate` to make a new one") from None
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from None


def convert(data: dict[str, Any], schema: type[T]) -> T:
    """JSON data as a schema's object.

    Raises:
        ClusterError: as ``hosts[0].device.memory_bytes.value is -1; a positive number is needed``.
    """
    try:
        return msgspec.convert(data, schema)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = _with_keys(data, schema, path.rstrip("`")).removeprefix(".")
        if isinstance(error.__cause__, ClusterError):  # our own messages begin with their field
            raise ClusterError(f"{path}.{message}" if path else message) from None
        path = path or "the file"
        if message.startswith("Object contains unknown field"):
            field = message.rpartition(" ")[2]
            raise ClusterError(f"{path} has the unknown field {field}; remove it or correct its name") from None
        raise ClusterError(f"{path}: {message[0].lower()}{message[1:]}") from None


def _with_keys(data: dict[str, Any], schema: type, path: str) -> str:
    """The path with each unnamed key filled in: the key that keeps the path of the error when it stands alone."""
    data = copy.deepcopy(data)
    while SOME_KEY in path:
        before, _, after = path.partition(SOME_KEY)
        mapping: Any = data
        for field, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", before):
            mapping = mapping[field] if field else mapping[int(index)]
        entries = dict(mapping)
        for key, value in entries.items():
            mapping.clear()
            mapping[key] = value
            try:
                msgspec.convert(data, schema)
            except msgspec.ValidationError as error:
                if SOME_KEY + after in str(error):
                    break
        path = f"{before}.{key}{after}"
    return path


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ClusterError(f"field {name!r} is written twice in one object; keep one")
        fields[name] = value
    return fields
