"""Which leaves `only` chooses, against a model of it that is slow and simple."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_callbacks import CheckpointNotFound, ConfigError
from ckpt_callbacks.paths import Path, Selection
from ckpt_callbacks.state import ROOT

names = st.sampled_from(["a", "b", "ab", "a.b", "b+", "[a]", "0", "größe", "a\nb", "model"])


def tree(paths: set[Path]) -> set[Path]:
    """Return paths without those that go on below another: no leaf is a container."""
    return {p for p in paths if not any(p[:n] in paths for n in range(1, len(p)))}


paths = st.sets(st.lists(names, min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)
paths = paths.map(tree)
parts = st.one_of(names, st.sampled_from(["*", "**", "a*", "*b", "*.*", "***", "params"]))
patterns = st.builds(
    lambda mark, parts: mark + "/".join(parts),
    st.sampled_from(["", "", "!"]),
    st.lists(parts, min_size=1, max_size=4),
)


def name_matches(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(name_matches(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return name[:1] == pattern[0] and name_matches(pattern[1:], name[1:])


def matches(pattern: list[str], path: Path) -> bool:
    if not pattern:
        return True  # and so does all below
    if pattern[0] == "**":
        return any(matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and name_matches(pattern[0], path[0]) and matches(pattern[1:], path[1:])


def chosen_by(only: list[str], among: set[Path]) -> set[Path] | None:
    """Return what is chosen, or `None` where that is an error."""
    tops = {path[0] for path in among}

    def parts_of(pattern: str) -> list[str]:
        first, *rest = pattern.split("/")
        weights = first == "params" and "params" not in tops and "model" in tops
        return ["model" if weights else first, *rest]

    wanted = [parts_of(p) for p in only if not p.startswith("!")] or [["**"]]
    without = [parts_of(p[1:]) for p in only if p.startswith("!")]
    if not all(any(matches(pattern, path) for path in among) for pattern in wanted):
        return None
    chosen = {path for path in among if any(matches(pattern, path) for pattern in wanted)}
    return {path for path in chosen if not any(matches(p, path) for p in without)} or None


@given(st.lists(patterns, min_size=1, max_size=3), paths)
def test_patterns_choose_what_they_say(only: list[str], among: set[Path]) -> None:
    expected = chosen_by(only, among)

    if expected is None:
        with pytest.raises(CheckpointNotFound):
            Selection(only).of(among, "the checkpoint")
    else:
        assert Selection(only).of(among, "the checkpoint") == expected


@given(st.lists(patterns, min_size=1, max_size=3), paths)
def test_no_item_is_left_out_that_holds_what_is_chosen(only: list[str], among: set[Path]) -> None:
    def item(path: Path) -> str:
        return path[0] if len(path) > 1 else ROOT

    expected = chosen_by(only, among)
    if expected is not None:
        items = Selection(only).items({item(path) for path in among}, "the checkpoint")
        assert set(items) >= {item(path) for path in expected}


@pytest.mark.parametrize(
    ("only", "items"),
    [
        ("params", ["model"]),
        ("params/layers/*", ["model"]),
        (["!params"], ["optimizer", "state"]),
        (["!**/kernel"], ["model", "optimizer", "state"]),
        ("step", ["state"]),
        (["*", "!optimizer", "!step"], ["model", "state"]),
    ],
)
def test_items_without_anything_chosen_are_not_read(only: str, items: list[str]) -> None:
    assert Selection(only).items({"model", "optimizer", "state"}, "X") == items


@pytest.mark.parametrize("only", ["", "/", "!", [], ["a", ""], [1], "!/"])
def test_what_is_no_pattern_is_refused(only: object) -> None:
    with pytest.raises(ConfigError, match="only must be a path of the state"):
        Selection(only)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("decoder", "only: 'decoder' matches nothing in X; at the top there is model, step"),
        (
            "model/layers/2/kernel",
            "only: 'model/layers/2/kernel' matches nothing in X; below model/layers there is 0, 1",
        ),
        (
            ["step", "params/*/9"],
            "only: 'model/*/9' matches nothing in X; below model/* there is 0, 1, kernel",
        ),
        (["step", "!s*"], "only: 'step, !s*' leaves nothing of X"),
    ],
)
def test_what_chooses_nothing_is_told_with_what_there_is(only: str, message: str) -> None:
    among = {("model", "layers", "0"), ("model", "layers", "1", "bias"), ("step",)}
    with pytest.raises(CheckpointNotFound) as error:
        Selection(only).of(among | {("model", "head", "kernel")}, "X")
    assert str(error.value) == message
