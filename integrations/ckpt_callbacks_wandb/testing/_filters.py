"""Filters and orders of listings, as far as the client's own are of use in a test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ckpt_callbacks_wandb.testing._graphql import Node, Refused, Unknown

__all__ = ["connection", "matching", "ordered"]

T = TypeVar("T")
Values = Callable[[T], Mapping[str, Any]]
"""Returns what one can be filtered and ordered by."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: bool(value == wanted),
    "$ne": lambda value, wanted: bool(value != wanted),
    "$gt": lambda value, wanted: value is not None and bool(value > wanted),
    "$gte": lambda value, wanted: value is not None and bool(value >= wanted),
    "$lt": lambda value, wanted: value is not None and bool(value < wanted),
    "$lte": lambda value, wanted: value is not None and bool(value <= wanted),
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
    "$exists": lambda value, wanted: (value is not None) == wanted,
    "$regex": lambda value, wanted: bool(re.search(wanted, str(value))),
    "$contains": lambda value, wanted: wanted in str(value),
}


def matching(items: Sequence[T], filters: str | None, values: Values[T]) -> list[T]:
    """Return those that a filter of MongoDB's form, as JSON, lets through."""
    wanted = json.loads(filters) if filters else {}
    return [item for item in items if _matches(values(item), wanted or {})]


def ordered(items: Sequence[T], order: str | None, values: Values[T]) -> list[T]:
    """Return them in an order such as `-created_at`; as they are if none is given."""
    result = list(items)
    # The last key first, since each sort keeps the order of equals.
    for key in reversed((order or "").split(",")):
        if name := key.strip().lstrip("+-"):
            result.sort(
                key=lambda item: (_get(values(item), name) is None, _get(values(item), name)),
                reverse=key.strip().startswith("-"),
            )
    return result


def connection(
    items: Sequence[T],
    to_node: Callable[[T], Node],
    after: str | None = None,
    first: int | None = None,
    edge: Callable[[T], Mapping[str, Any]] = lambda _: {},
) -> Node:
    """Return one page of nodes, whose cursors are the numbers of the items."""
    if after and not after.isdigit():
        raise Refused(f"no cursor {after!r}")
    start = int(after) if after else 0
    end = len(items) if first is None else min(start + first, len(items))
    return {
        "__typename": "Connection",
        "totalCount": len(items),
        "pageInfo": {
            "__typename": "PageInfo",
            "endCursor": str(end),
            "hasNextPage": end < len(items),
        },
        "edges": [
            {
                "__typename": "Edge",
                "cursor": str(at + 1),
                "node": to_node(items[at]),
                **edge(items[at]),
            }
            for at in range(start, end)
        ],
    }


def _matches(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    for name, condition in wanted.items():
        if name == "$and":
            found = all(_matches(values, part) for part in condition)
        elif name == "$or":
            found = any(_matches(values, part) for part in condition)
        elif isinstance(condition, dict):
            found = all(_compare(_get(values, name), *item) for item in condition.items())
        else:
            value = _get(values, name)
            found = condition in value if isinstance(value, list) else value == condition
        if not found:
            return False
    return True


def _compare(value: Any, operator: str, wanted: Any) -> bool:
    if operator not in _OPERATORS:
        raise Unknown(f"operator {operator} of a filter")
    if isinstance(value, list) and operator in ("$in", "$nin"):
        return (operator == "$in") == bool(set(value) & set(wanted))
    return _OPERATORS[operator](value, wanted)


def _get(values: Mapping[str, Any], name: str) -> Any:
    """Return a value by its name, in which dots lead into dictionaries."""
    if name in values:
        return values[name]
    first, *rest = name.split(".")
    if first not in values:
        raise Unknown(f"a filter or an order by {name!r}")
    value = values[first]
    for part in rest:
        value = value.get(part) if isinstance(value, dict) else None
    return value
