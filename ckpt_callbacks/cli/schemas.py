"""JSON schemas of what commands print with `--json`."""

from __future__ import annotations

from typing import Any

__all__ = ["SCHEMAS"]

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_MAYBE: Schema = {"type": ["string", "null"]}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_YES: Schema = {"type": "boolean"}
_NUMBER: Schema = {
    "anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}],
    "description": "JSON has no NaN and no infinities",
}
_TIME: Schema = {"type": ["number", "null"], "description": "seconds since the epoch"}


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _by_name(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


_ANY: Schema = _by_name({})
_METRICS = _by_name(_NUMBER)
_SHOW = _object(
    source=_TEXT,
    step={"type": ["integer", "null"]},
    time=_TIME,
    metrics=_METRICS,
    metadata=_ANY,
    config=_ANY,
    aliases=_list(_TEXT),
    reason=_TEXT,
    bytes=_WHOLE,
    items=_by_name(_WHOLE),
    copies=_by_name(_TEXT),
    leaves=_by_name(_object(kind=_TEXT, shape=_list(_WHOLE), dtype=_TEXT, bytes=_WHOLE)),
)
_FILE = _object(path=_TEXT)

SCHEMAS: dict[str, Schema] = {
    "ls": _object(
        directory=_TEXT,
        run=_object(
            id=_TEXT,
            status=_TEXT,
            owner=_MAYBE,
            policy=_TEXT,
            pins=_list(_WHOLE),
            promoted=_by_name(_WHOLE),
        ),
        checkpoints=_list(
            _object(
                step=_WHOLE,
                time=_TIME,
                path=_TEXT,
                metrics=_METRICS,
                bytes=_WHOLE,
                reason=_TEXT,
                aliases=_list(_TEXT),
                complete=_YES,
                local=_YES,
                copies=_by_name(
                    _object(
                        state={"enum": ["pending", "staged", "confirmed"]},
                        ref=_TEXT,
                        address=_MAYBE,
                    )
                ),
                metadata=_ANY,
            )
        ),
    ),
    "why": _object(
        step=_WHOLE,
        state={"enum": ["kept", "evicted", "saving", "complete", "evicting", "gone"]},
        reason=_TEXT,
        details=_TEXT,
        aliases=_list(_TEXT),
        metrics=_METRICS,
    ),
    "show": _SHOW,
    "inspect": _SHOW,
    "diff": _object(
        a=_TEXT,
        b=_TEXT,
        same=_YES,
        leaves=_list(
            _object(
                path=_TEXT,
                kind={"enum": ["same", "values", "form", "only in A", "only in B"]},
                a=_MAYBE,
                b=_MAYBE,
                unequal=_WHOLE,
                largest={"anyOf": [_NUMBER, {"type": "null"}]},
                relative={"anyOf": [_NUMBER, {"type": "null"}]},
            )
        ),
    ),
    "verify": _object(problems=_list(_object(step={"type": ["integer", "null"]}, text=_TEXT))),
    "doctor": _object(
        checks=_list(_object(what=_TEXT, status={"enum": ["ok", "warning", "problem"]}, text=_TEXT))
    ),
    "plugins": _object(
        plugins=_list(
            _object(
                kind={"enum": ["store", "address", "state adapter"]},
                name=_TEXT,
                value=_TEXT,
                package=_TEXT,
                version=_TEXT,
                error=_MAYBE,
            )
        )
    ),
    "pin": _object(step=_WHOLE, pinned=_YES, applied=_YES),
    "unpin": _object(step=_WHOLE, pinned=_YES, applied=_YES),
    "promote": _object(
        step=_WHOLE, alias=_TEXT, previous={"type": ["integer", "null"]}, applied=_YES
    ),
    "prune": {
        **_object(
            keep=_TEXT,
            bytes=_WHOLE,
            kept=_by_name(_TEXT),
            goes=_list(_object(step=_WHOLE, reason=_TEXT, bytes=_WHOLE, where=_list(_TEXT))),
            applied=_YES,
        ),
        "description": "applied: whether all of it is removed; false for a plan",
    },
    "sync": _object(stores=_by_name(_object(title=_TEXT, lacks=_MAYBE))),
    "pull": _object(address=_TEXT, directory=_TEXT, step=_WHOLE),
    "adopt": _object(directory=_TEXT, taken=_list(_WHOLE)),
    "export": _FILE,
    "convert": _FILE,
    "report": _FILE,
    "plot": _FILE,
}
"""By command; what `watch` prints is one on each line."""
SCHEMAS["watch"] = SCHEMAS["ls"]
