"""The form in which a row's values reach chat templates, reward functions, endpoints and environments.

    text, number, true/false, null      unchanged; NaN and infinities stay floats
    date, time, timestamp               ISO 8601 text              2026-11-27T17:05:00+00:00
    duration                            seconds, a number          90.5
    decimal, UUID                       text                       "3.14"
    bytes                               base64 text                "AAE="
    list, tuple, array                  a list, each entry in its form
    mapping                             a mapping with text keys

Parquet files and hub data sets hold all of these, JSON only the first line, lists and mappings. A value of
another type is an error that names the type.
"""

import base64
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from orchestrator.data.bad_rows import BadRecord

DEEPEST = 100
"""Most levels of nested lists and mappings: rows cross processes, and serializers recurse."""


def plain(value: Any, name: str, *, depth: int = 0) -> Any:
    """The value in its plain form. name: the column, for the reason in BadRecord."""
    if hasattr(value, "tolist"):  # numpy's arrays and scalars, some of which are floats
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth >= DEEPEST:
        raise BadRecord(f"{name} is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {
            k if isinstance(k, str) else str(plain(k, name, depth=depth + 1)): plain(v, name, depth=depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(v, name, depth=depth + 1) for v in value]
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    raise BadRecord(
        f"{name} holds a {type(value).__name__}, which is not a text, number, date, bytes, list or mapping"
    )


def in_json(value: Any) -> Any:
    """A plain value for standard JSON, which lacks NaN and infinities.

    They become the texts NaN, Infinity and -Infinity.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {k: in_json(v) for k, v in value.items()}
    return [in_json(v) for v in value] if isinstance(value, list | tuple) else value


def without_nulls(value: Any) -> Any:
    """The value without null entries of mappings. Parquet gives every mapping of a column the keys of all."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
