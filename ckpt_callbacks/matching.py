"""Whether a checkpoint fits a state, told before anything is read, all differences at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

from ckpt_callbacks.errors import StateMismatch
from ckpt_callbacks.leaves import DType, Leaf, leaf_of, loses_bits, unsavable
from ckpt_callbacks.paths import Path, show

__all__ = ["check_same"]

_NUMBERS = ("bool", "int", "float", "complex")
_SHOWN = 20


def check_same(
    state: Mapping[Path, Any],
    checkpoint: Mapping[Path, Leaf],
    where: str,
    *,
    dtype: DType = "saved",
    numpy: bool = False,
    hint: bool = True,
) -> None:
    """Compare the leaves of a state with those of a checkpoint.

    Args:
        state: leaves by path; those that are abstract too.
        checkpoint: what its leaves are, by path.
        where: how the checkpoint is called in the message.
        dtype: whether dtypes may differ; see `restore`.
        numpy: whether arrays are read into the host's memory only.
        hint: whether the paths are those that `only` takes, so that it may be advised.

    Raises:
        StateMismatch: leaves are missing, extra, or of another shape, dtype, or kind, or can not
            be sharded as the state says.
    """
    problems: dict[Path, str] = {}
    for path in state:
        if there := checkpoint.get(path):
            here = leaf_of(state[path])
            if here is None:
                problems[path] = f"{show(path)} {unsavable(state[path])}"
                continue
            problem = _kinds(here, there, dtype) or (
                None if numpy else _places(state[path], there, dtype)
            )
            problems |= {path: f"{show(path)}: {problem}"} if problem else {}
    missing = [path for path in state if path not in checkpoint]
    extra = [path for path in checkpoint if path not in state]
    renamed = _renamed(missing, extra, state, checkpoint)
    for old, new in renamed.items():
        problems[old] = problems[new] = (
            f"{show(old)} is called {show(new)} in the state: it holds the same leaves "
            "otherwise, so rename one of them"
        )
    if state and checkpoint and not renamed and len(missing) == len(state):
        raise StateMismatch(_strangers(state, checkpoint, where))
    gone = [p for p in missing if not any(_below(p, new) for new in renamed.values())]
    more = [p for p in extra if not any(_below(p, old) for old in renamed)]
    problems |= {p: f"{text}: not in the checkpoint" for p, text in _grouped(gone, checkpoint)}
    problems |= {p: f"{text}: not in the state" for p, text in _grouped(more, state)}
    if problems:
        lines = list(dict.fromkeys(problems.values()))
        left = len(lines) - _SHOWN
        shown = lines[:_SHOWN] + [f"… and {left} more"] * (left > 0)
        raise StateMismatch(
            f"the state does not fit the checkpoint {where}:\n  "
            + "\n  ".join(shown)
            + _fitting({p[:1] for p in (*state, *checkpoint)}, {p[:1] for p in problems}) * hint
        )


def _fitting(tops: Set[Path], wrong: Set[Path]) -> str:
    """Return how to restore what has no problem, if there is any."""
    if not (right := tops - wrong):
        return ""
    names = sorted(map(show, right))
    if len(wrong) < len(right):
        names = sorted(f"!{show(top)}" for top in wrong)
    return f"\nThe rest fits: only={names[0] if len(names) == 1 else names!r} restores that alone"


def _strangers(state: Collection[Path], checkpoint: Collection[Path], where: str) -> str:
    """Return what to say of a state and a checkpoint that have no leaf in common."""
    here, there = (", ".join(text for _, text in _grouped(p, ())) for p in (state, checkpoint))
    text = (
        f"the state has no leaf in common with the checkpoint {where}:\n"
        f"  the state has {here}\n  the checkpoint has {there}"
    )
    for top in sorted({path[0] for path in checkpoint}):
        if all((top, *path) in checkpoint for path in state):
            return (
                f"{text}\nAll of the state is below {top} in the checkpoint: "
                f"like={{{top!r}: …}} with only={top!r} restores that"
            )
    for top in sorted({path[0] for path in state if path}):
        if all((top, *path) in state for path in checkpoint):
            return f"{text}\nAll of it is below {top} in the state: restore into that alone"
    return text


def _kinds(here: Leaf, there: Leaf, dtype: DType) -> str | None:
    """Return what is wrong with reading `there` where the state has `here`."""
    kinds = {here.kind, there.kind}
    problem: str | None = _sides(here, there)
    if kinds == {"files"}:
        problem = _processes(there)
    elif kinds <= {"array", *_NUMBERS} or kinds == {"key"}:
        if here.shape != there.shape:
            turned = len(here.shape) > 1 and here.shape == there.shape[::-1]
            hint = ": is one of them transposed?" * turned
            problem = f"shape {here.shape} in the state, {there.shape} in the checkpoint{hint}"
        elif kinds != {"key"} and dtype != "error":
            problem = None
    elif "key" in kinds:
        problem = f"{problem}: typed and raw keys are not the same (see `jax.random.wrap_key_data`)"
    return problem if here != there else None


def _sides(here: Leaf, there: Leaf) -> str:
    both = f"{here} in the state, {there} in the checkpoint"
    return (
        f"{both}: make them with impl={there.dtype!r}" if here.kind == there.kind == "key" else both
    )


def _processes(there: Leaf) -> str | None:
    """Return why what each process saved of its own can not be given back to each."""
    import jax

    if there.shape == (jax.process_count(),):
        return None
    saved = " or ".join(map(str, there.shape))
    return (
        f"saved by {saved} processes, each with a part of its own, and now there are "
        f"{jax.process_count()}: go on with as many, or leave it out with only="
    )


def _places(value: Any, there: Leaf, dtype: DType) -> str | None:
    """Return why an array can not lie where the state has it."""
    import jax

    if there.kind != "array" or not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        return None
    try:
        if value.sharding is not None:
            value.sharding.shard_shape(there.shape)
    except ValueError as error:
        return f"{there} can not be sharded as {value.sharding}: {error}"
    if there.on_device and loses_bits(there) and dtype != "cast":
        return (
            f"{there} in the checkpoint, which JAX would cut to 32 bits: set jax_enable_x64, have "
            "a NumPy array there, or give dtype='cast'"
        )
    return None


def _renamed(
    missing: Iterable[Path],
    extra: Iterable[Path],
    state: Mapping[Path, Any],
    checkpoint: Mapping[Path, Leaf],
) -> dict[Path, Path]:
    """Return the subtrees that have another name in the state, if there is no doubt."""

    def subtrees(
        paths: Iterable[Path], others: Mapping[Path, Any], leaf: Callable[[Path], Leaf | None]
    ) -> dict[Path, frozenset[tuple[Path, str]]]:
        tops: dict[Path, set[tuple[Path, str]]] = {}
        known = _beginnings(others)
        for path in paths:
            top = _top(path, known)
            tops.setdefault(top, set()).add((path[len(top) :], str(leaf(path))))
        return {top: frozenset(below) for top, below in tops.items()}

    old = subtrees(extra, state, lambda p: checkpoint[p])
    new = subtrees(missing, checkpoint, lambda p: leaf_of(state[p]))
    pairs = {
        o: [n for n in new if n[:-1] == o[:-1] and new[n] == below] for o, below in old.items()
    }
    return {
        o: found[0]
        for o, found in pairs.items()
        if len(found) == 1 and sum(found[0] in others for others in pairs.values()) == 1
    }


def _grouped(paths: Iterable[Path], others: Iterable[Path]) -> Iterable[tuple[Path, str]]:
    """Yield the highest paths below which nothing is in `others`, and how many leaves they have."""
    known = _beginnings(others)
    tops: dict[Path, list[Path]] = {}
    for path in paths:
        tops.setdefault(_top(path, known), []).append(path)
    for top, below in tops.items():
        yield top, f"{show(top)} ({len(below)} leaves)" if len(below) > 1 else show(below[0])


def _beginnings(paths: Iterable[Path]) -> set[Path]:
    return {path[:length] for path in paths for length in range(1, len(path) + 1)}


def _top(path: Path, known: Set[Path]) -> Path:
    """Return the shortest beginning of `path` that is none of those known."""
    return next((path[:n] for n in range(1, len(path)) if path[:n] not in known), path)


def _below(path: Path, top: Path) -> bool:
    return path[: len(top)] == top
