"""The memory of a run, as values: one record a checkpoint and one `run.json`.

Both are plain JSON with a format version and a checksum. Reading is strict: whatever is not
exactly as written is a `RecordError` that names the field, never a guess or a wrong number.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from ckpt_callbacks.errors import NewerFormat, RecordError
from ckpt_callbacks.files import File, WrittenFiles, apart, files_from_json

__all__ = [
    "ADOPTED",
    "FORMAT",
    "Change",
    "Copy",
    "File",
    "Gone",
    "Promotion",
    "Record",
    "RunFile",
    "gone_from_json",
    "gone_to_json",
    "numbers",
    "record_from_json",
    "record_to_json",
    "run_from_json",
    "run_to_json",
]

ADOPTED = "adopted"
"""Status of a run whose checkpoints all come from elsewhere, before its first loop."""
FORMAT = 2
"""Version of the files on disk. A newer one is refused, an older one is read.

Written is the oldest that says all: 2 is a run with aliases that persons gave, which a reader of 1
would drop.
"""
_HEAD = re.compile(r'\{"check":"crc32:[0-9a-f]{8}","text":"crc32:([0-9a-f]{8})",')
"""How a file begins: with its checksum, and with that of the text that follows here."""

T = TypeVar("T")
RecordState = Literal["saving", "complete", "evicting", "gone"]
CopyState = Literal["pending", "staged", "confirmed"]
_RECORD_STATES, _COPY_STATES = get_args(RecordState), get_args(CopyState)


@dataclass(frozen=True, slots=True)
class Copy:
    """A store's copy of a checkpoint."""

    state: CopyState
    """`pending` while it is being made, `staged` on this machine until it can be sent,
    or `confirmed` by the store."""
    ref: str
    """The store's own name for it."""
    shared: bool = False
    """Shares its bytes with the local files, so it is no second copy for repair."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one checkpoint.

    `saving` is written before Orbax starts, `complete` after every file has a digest,
    `evicting` before the local files move to the trash, and `gone` stays as a tombstone
    until every store has confirmed that its copy is deleted.
    """

    step: int
    state: RecordState
    owner: str
    """Id of the run that saved it."""
    time: float
    """Start of the save, seconds since the epoch; for display only."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    logged: bool = False
    """Whether all metrics up to this step have left the loop's memory. A checkpoint without is
    not gone on from, since the metrics that a kill took would never be made again."""
    files: Mapping[str, File] = field(default_factory=dict)
    """By path below the checkpoint, with forward slashes; empty until complete."""
    copies: Mapping[str, Copy] = field(default_factory=dict)
    """By store name."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The user's own, JSON values by name."""
    discarded: str = ""
    """Why it no longer counts although it is complete, such as that the run went back."""
    lost: bool = False
    """Whether somebody else removed its files."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        files = self.files
        if isinstance(files, WrittenFiles):
            return files.bytes
        return sum([file.size for file in files.values()])


@dataclass(frozen=True, slots=True)
class Gone:
    """What is remembered of a checkpoint that was evicted: a line of `evicted.jsonl`."""

    step: int
    time: float
    metrics: Mapping[str, float]
    reason: str
    """What each policy said of it."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the keep policy that is not complete: what the old one kept stays as well."""

    policy: Sequence[Mapping[str, Any]]
    """The old keep policy."""
    since: int
    """The newest step when it was changed, -1 for none. One after it has to be complete first."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """A person's word that an alias names a step, which is kept for as long as it does."""

    step: int
    time: float
    """When, seconds since the epoch: in a place that several runs share the latest word counts."""


@dataclass(frozen=True, slots=True)
class RunFile:
    """What is known of the run as a whole."""

    run_id: str
    policy: Sequence[Mapping[str, Any]]
    """The keep policy, as `retention.policy_to_json` gives it."""
    stores: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What each store asked to have remembered, such as its own run id."""
    aliases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Per store, the step that each alias names there."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per store, what it is made with; one that other processes cannot make is left out."""
    pins: frozenset[int] = frozenset()
    """Steps that a person wants to keep, whatever the policy says."""
    change: Change | None = None
    rewound: int | None = None
    """Step that the run went back to, -1 for the start, until its metrics are marked."""
    status: str = "running"
    """How the last process left the loop, as in `RunEnded`; `adopted` if none was in it yet."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The hyper-parameters that the loop was last given, JSON values by name."""
    promoted: Mapping[str, Promotion] = field(default_factory=dict)
    """By alias; these are a person's, beside `last` and `best`."""

    @property
    def named(self) -> dict[str, int]:
        """The step that each promoted alias names."""
        return {name: promotion.step for name, promotion in self.promoted.items()}

    @property
    def pinned(self) -> frozenset[int]:
        """The steps that are kept whatever the policy says: pinned or promoted."""
        return self.pins | frozenset(self.named.values())


def record_to_json(record: Record) -> str:
    """Return the text of a record's file."""
    plain = replace(record, files=dict(record.files))
    return _dump({**asdict(plain), "metrics": numbers(record.metrics)})


def record_from_json(text: str, where: str) -> Record:
    """Return the record in `text`; `where` names its file in errors.

    Raises:
        RecordError: the text is damaged, incomplete, or of a newer format.
    """
    values = _parse(text, where, files=True)
    try:
        files = values["files"]
        record = Record(
            step=_typed(values["step"], int),
            state=_one_of(values["state"], _RECORD_STATES),
            owner=_typed(values["owner"], str),
            time=float(values["time"]),
            metrics={k: float(v) for k, v in values["metrics"].items()},
            logged=_typed(values["logged"], bool),
            files=files if isinstance(files, WrittenFiles) else files_from_json(files),
            copies={
                k: Copy(
                    _one_of(v["state"], _COPY_STATES),
                    _typed(v["ref"], str),
                    _typed(v["shared"], bool),
                )
                for k, v in values["copies"].items()
            },
            metadata=_typed(values["metadata"], dict),
            discarded=_typed(values["discarded"], str),
            lost=_typed(values["lost"], bool),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if record.step < 0:
        raise RecordError(f"{where} is damaged: step {record.step} is negative")
    return record


def gone_to_json(gone: Gone) -> str:
    """Return the line of an evicted checkpoint, without its end."""
    return json.dumps({**asdict(gone), "metrics": numbers(gone.metrics)}, allow_nan=False)


def gone_from_json(line: str, where: str) -> Gone:
    """Return the evicted checkpoint in `line`; `where` names its file in errors.

    Raises:
        RecordError: the line is damaged.
    """
    try:
        values = json.loads(line)
        metrics = {k: float(v) for k, v in values["metrics"].items()}
        return Gone(
            _typed(values["step"], int), float(values["time"]), metrics, str(values["reason"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def run_to_json(run: RunFile) -> str:
    """Return the text of `run.json`."""
    values = {**asdict(run), "pins": sorted(run.pins)}
    return _dump(values, version=2 if run.promoted else 1)


def run_from_json(text: str, where: str) -> RunFile:
    """Return the run in `text`; `where` names its file in errors.

    Raises:
        RecordError: the text is damaged, incomplete, or of a newer format.
    """
    values = _parse(text, where)
    try:
        change = values["change"]
        return RunFile(
            run_id=_typed(values["run_id"], str),
            policy=_typed(values["policy"], list),
            stores={
                k: {n: _typed(v, str) for n, v in refs.items()}
                for k, refs in values["stores"].items()
            },
            aliases={
                k: {n: _typed(v, int) for n, v in names.items()}
                for k, names in values["aliases"].items()
            },
            settings={k: _typed(v, dict) for k, v in values["settings"].items()},
            pins=frozenset(_typed(step, int) for step in values["pins"]),
            change=change and Change(_typed(change["policy"], list), _typed(change["since"], int)),
            rewound=_optional(values["rewound"], int),
            status=_typed(values["status"], str),
            config=_typed(values.get("config", {}), dict),  # once there was none
            promoted={
                k: Promotion(_typed(v["step"], int), float(v["time"]))
                for k, v in values.get("promoted", {}).items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def numbers(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON has them: it knows no NaN and no infinity."""
    return {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}


def _dump(values: Mapping[str, Any], *, version: int = 1) -> str:
    # As it will be read: JSON has no tuples, and no keys but strings.
    known = json.loads(json.dumps({"format": version, **values}, allow_nan=False))
    rest = json.dumps(known, separators=(",", ":"), allow_nan=False)[1:]
    known["text"] = text = f"crc32:{zlib.crc32(rest.encode()):08x}"
    return f'{{"check":"{_check(known)}","text":"{text}",{rest}'


def _is_as_written(text: str) -> bool:
    """Return whether a text is just what `_dump` made, which is found out faster than `_check`."""
    head = _HEAD.match(text)
    return head is not None and zlib.crc32(text[head.end() :].encode()) == int(head[1], 16)


def _check(values: Mapping[str, Any]) -> str:
    """Return the CRC-32 of JSON values, whatever their layout: a flipped bit never reads as data.

    It is there against damage, not against forgery, and is in the standard library.
    """
    plain = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(plain.encode()):08x}"


def _parse(text: str, where: str, *, files: bool = False) -> dict[str, Any]:
    """Return the values in a text; `files` says whether there are some, as a record has them."""
    as_written = _is_as_written(text)
    rest, there = apart(text) if files and as_written else (text, None)
    try:
        values = json.loads(rest)
    except ValueError as error:
        raise RecordError(f"{where} is not JSON: {error}") from error
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise RecordError(f"{where} is damaged: it has no format version")
    if version > FORMAT:
        raise NewerFormat(
            f"{where} has format {version}, this version of ckpt_callbacks reads up to {FORMAT}: "
            "install the version that wrote it, or a newer one"
        )
    check = values.pop("check", None)
    if not as_written and check != _check(values):
        raise RecordError(f"{where} is damaged: it does not match its checksum, {check}")
    if there is not None:
        values["files"] = there
    return dict(values)


def _typed(value: object, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def _optional(value: object, kind: type[T]) -> T | None:
    return None if value is None else _typed(value, kind)


def _one_of(value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"expected one of {choices}, found {value!r}")
    return value
