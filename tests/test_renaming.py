"""From one layout of names and axes to another, and back to the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckpt_callbacks as cc
from ckpt_callbacks.leaves import Leaf
from ckpt_callbacks.paths import Path
from ckpt_callbacks.tensors import Tensor, Tensors, of_state

DTYPES = [np.float32, np.int8, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def tensors(arrays: Mapping[str, Any]) -> dict[Path, Tensor]:
    state = of_state(arrays)
    return {tuple(path[0].split(".")): tensor for path, tensor in state.items()}


def zeros(**shapes: tuple[int, ...]) -> dict[Path, Tensor]:
    """Return leaves by names in which `__` stands for a dot."""
    return tensors({n.replace("__", "."): np.zeros(s, np.float32) for n, s in shapes.items()})


def content(found: Tensors) -> dict[Path, tuple[Leaf, bytes]]:
    """Return what leaves are and their bytes, and check that they are what they say."""
    read = {path: np.asarray(tensor.read()) for path, tensor in found.items()}
    for path, tensor in found.items():
        assert tensor.leaf.shape == read[path].shape
        assert tensor.leaf.dtype == read[path].dtype.name
    return {path: (tensor.leaf, read[path].tobytes()) for path, tensor in found.items()}


Places = dict[str, dict[str, int | slice]]
"""Of each axis of one big array what it is called at each place, or at several of them."""


@dataclass(frozen=True)
class Side:
    """Where each axis of one big array is on one side: in the names, or in the shape."""

    fields: list[str]
    groups: list[list[str]]

    @property
    def template(self) -> str:
        return ".".join(["weights", *(f"{name}_{{{name}}}" for name in self.fields)])

    @property
    def axes(self) -> str:
        return " ".join(f"({' '.join(group)})" for group in self.groups)

    def cut(self, array: np.ndarray, places: Places) -> dict[str, np.ndarray]:
        """Return the big array as this side has it, by name."""
        flat = [name for group in self.groups for name in group]
        found: dict[str, np.ndarray] = {}
        for chosen in itertools.product(*(places[field].items() for field in self.fields)):
            at = dict(zip(self.fields, (place for _, place in chosen), strict=True))
            part = array[tuple(at.get(name, slice(None)) for name in places)]
            order = [name for name in places if not isinstance(at.get(name), int)]
            part = part.transpose([order.index(name) for name in flat])
            sizes = dict(zip(flat, part.shape, strict=True))
            shape = [math.prod(sizes[name] for name in group) for group in self.groups]
            values = (value for value, _ in chosen)
            named = [f"{f}_{value}" for f, value in zip(self.fields, values, strict=True)]
            found[".".join(["weights", *named])] = part.reshape(shape)
        return found


@st.composite
def sides(draw: st.DrawFn, names: list[str], uneven: list[str]) -> Side:
    """Draw where the axes are; those whose parts are of several sizes are in names and shape."""
    fields = [name for name in names if draw(st.booleans())]
    groups: list[list[str]] = []
    for name in draw(st.permutations([name for name in names if name not in fields] + uneven)):
        if groups and draw(st.booleans()):
            groups[-1].append(name)
        else:
            groups.append([name])
    return Side(draw(st.permutations(fields + uneven)), groups)


def options(size: int) -> st.SearchStrategy[Any]:
    return st.sampled_from([size, range(7, 7 + size), ["q", "k", "v"][:size]])


def places_of(given: Any) -> dict[str, int | slice]:
    match given:
        case {"q": q, "k": k, "v": v}:
            return {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + k + v)}
        case int():
            return {str(i): i for i in range(given)}
    return {str(value): i for i, value in enumerate(given)}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[np.ndarray, Side, Side, dict[str, Any]]:
    names = list("abcd"[: draw(st.integers(0, 4))])
    sizes: dict[str, Any] = {name: draw(st.integers(1, 3).flatmap(options)) for name in names}
    source, target = draw(sides(names, [])), draw(sides(names, []))
    if draw(st.booleans()):
        sizes["x"] = {name: draw(st.integers(1, 3)) for name in "qkv"}
        source, target = draw(sides(names, ["x"])), draw(sides([*names, "x"], []))
        target = Side([f for f in target.fields if f != "x"], target.groups)
        if not any("x" in group for group in target.groups):
            target.groups.append(["x"])
    shape = [
        s if isinstance(s, int) else sum(s.values()) if isinstance(s, dict) else len(s)
        for s in sizes.values()
    ]
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    count = math.prod(shape) * dtype.itemsize
    seed = draw(st.integers(0, 2**32 - 1))
    array = np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)
    return array, source, target, sizes


@given(layouts(), st.booleans())
def test_any_layout_becomes_any_other_and_back_to_the_same_bits(
    layout: tuple[np.ndarray, Side, Side, dict[str, Any]], swapped: bool
) -> None:
    array, source, target, sizes = layout
    if swapped:
        source, target = target, source
    places = {name: places_of(given) for name, given in sizes.items()}
    fields = source.fields + target.fields
    sizes = {name: s if name in fields else len(places[name]) for name, s in sizes.items()}
    rule = cc.Rule(source.template, target.template, f"{source.axes} -> {target.axes}", **sizes)
    ours, theirs = (tensors(side.cut(array, places)) for side in (source, target))
    key_map = cc.KeyMap([rule])

    there = key_map.apply(ours, like=theirs)
    back = key_map.reverse().apply(there, like=ours)

    assert content(there) == content(theirs)
    assert content(back) == content(ours)


def test_queries_keys_and_values_of_several_sizes_are_split_and_joined() -> None:
    """As of attention whose heads share keys and values."""
    heads = {"q": 4, "k": 2, "v": 2}
    rule = cc.Rule("{l}.qkv", "{x}.kernel", "(x d) i -> l i x d", x=heads, d=3)
    ours = {f"{i}.qkv": np.arange(120).reshape(24, 5) + 120 * i for i in range(2)}
    key_map = cc.KeyMap([rule])

    there = key_map.apply(tensors(ours))

    key = ours["1.qkv"].reshape(8, 3, 5)[4:6].transpose(2, 0, 1)
    np.testing.assert_array_equal(there["k", "kernel"].read()[1], key)
    assert content(key_map.reverse().apply(there)) == content(tensors(ours))
    assert str(key_map.plan(tensors(ours))) == (
        "{l}.qkv  2 x int64[24, 5]  ->  {x}.kernel  int64[2, 5, 4, 3], 2 x int64[2, 5, 2, 3]"
    )


def test_axes_that_the_shape_tells_need_no_size() -> None:
    qkv = np.arange(24, dtype=np.float32).reshape(12, 2)
    rule = cc.Rule("qkv", "{x}.kernel", "(x h d) i -> i h 1 d", x=("q", "k", "v"), h=2)

    split = cc.KeyMap([rule]).apply(tensors({"qkv": qkv}))

    assert [*split] == [("q", "kernel"), ("k", "kernel"), ("v", "kernel")]
    np.testing.assert_array_equal(
        split["k", "kernel"].read(), qkv[4:8].reshape(2, 2, 2).transpose(2, 0, 1)[:, :, None]
    )


def test_fields_name_parts_of_names_and_many_names() -> None:
    key_map = cc.KeyMap([cc.Rule("layers_{i}.{**rest}", "{**rest}.at.{i}.{i}")])
    ours = zeros(layers_0__a__b=(2,), layers_10__c=(3,))

    there = key_map.apply(ours)

    assert [*there] == [("a", "b", "at", "0", "0"), ("c", "at", "10", "10")]
    assert content(key_map.reverse().apply(there)) == content(ours)


def test_what_is_no_array_passes_as_it_is() -> None:
    state = {"a": 3, "b": "text", "c": b"bytes", "d": jax.random.key(0), "e": np.float32(2)}
    ours = of_state(state)

    there = cc.KeyMap([cc.Rule("{x}", "new.{x}")]).apply(ours)

    assert {path: there["new", *path] for path in ours} == ours
    with pytest.raises(cc.StateMismatch, match=r"d is key<threefry2x32>\[\]: only an array has"):
        cc.KeyMap([cc.Rule("d", "d", "->")]).apply({("d",): ours["d",]})


def test_of_names_that_hold_dots_what_is_wanted_says_where_they_end() -> None:
    ours = {("conv.weight",): zeros(x=(2,))["x",]}
    like = {("net", "conv.kernel"): ours["conv.weight",]}
    key_map = cc.KeyMap([cc.Rule("{a}.weight", "net.{a}.kernel")])

    assert [*key_map.apply(ours, like)] == [*like]
    assert [*key_map.apply(ours)] == [("net", "conv", "kernel")]


class Counted:
    """Leaves that note what is read."""

    def __init__(self, found: Tensors) -> None:
        self.reads: list[str] = []
        self.tensors = {
            path: replace(tensor, read=lambda p=path, t=tensor: self._read(p, t))
            for path, tensor in found.items()
        }

    def _read(self, path: Path, tensor: Tensor) -> Any:
        self.reads.append(".".join(path))
        return tensor.read()


def test_nothing_is_read_before_it_is_asked_for() -> None:
    counted = Counted(zeros(a__0=(2, 3), a__1=(2, 3), qkv=(6, 2), b=(1,)))
    key_map = cc.KeyMap([
        cc.Rule("a.{l}", "a", "o i -> l i o"),
        cc.Rule("qkv", "{x}", "(x o) i -> o i", x=("q", "k", "v")),
        cc.Rule("b", "c"),
    ])  # fmt: skip

    print(key_map.plan(counted.tensors))
    there = key_map.apply(counted.tensors)
    back = key_map.reverse().apply(there)
    assert counted.reads == []

    there["a",].read()
    assert counted.reads == ["a.0", "a.1"]
    back["b",].read()
    assert counted.reads[2:] == ["b"]


def test_what_is_split_is_read_once_for_all_of_its_parts() -> None:
    counted = Counted(zeros(up=(4, 2), down=(4, 2)))
    there = cc.KeyMap([cc.Rule("{w}", "{l}.{w}", "l i -> i")]).apply(counted.tensors)

    assert len(content(there)) == 8
    assert counted.reads == ["down", "up"]
    there["0", "down"].read()
    assert counted.reads == ["down", "up", "down"]


def test_what_was_split_does_not_keep_the_whole() -> None:
    there = cc.KeyMap([cc.Rule("up", "{l}", "l i -> i")]).apply(zeros(up=(4, 2)))

    assert there["1",].read().base.nbytes == 8


RULES = [
    cc.Rule("embed.weight", "embed"),
    cc.Rule("layers.{l}.{w}.weight", "layers.{w}.kernel", "o i -> l i o"),
    cc.Rule("layers.{l}.experts.{e}", "experts", "o i -> l e i o"),
    cc.Rule("layers.{l}.inv_freq", None),
    cc.Rule("head.weight", "head"),
]
MODEL = {
    "embed__weight": (9, 2),
    **{f"layers__{i}__up__weight": (3, 2) for i in range(2)},
    **{f"layers__{i}__experts__{e}": (3, 2) for i in range(2) for e in range(4)},
    "layers__0__inv_freq": (4,),
}


def test_a_dry_run_shows_what_becomes_of_what() -> None:
    plan = cc.KeyMap(RULES).plan(zeros(**MODEL))

    assert not plan.problems
    assert str(plan) == (
        "embed.weight            float32[9, 2]      ->  embed             float32[9, 2]\n"
        "layers.{l}.experts.{e}  8 x float32[3, 2]  ->  experts           float32[2, 4, 2, 3]\n"
        "layers.{l}.up.weight    2 x float32[3, 2]  ->  layers.up.kernel  float32[2, 2, 3]\n"
        "dropped:\n"
        "  layers.0.inv_freq\n"
        "rules that match nothing:\n"
        "  Rule('head.weight', 'head')"
    )
    back = cc.KeyMap(RULES).reverse().plan(plan.tensors)
    assert str(back).splitlines()[2] == (
        "layers.up.kernel  float32[2, 2, 3]     ->  layers.{l}.up.weight    2 x float32[3, 2]"
    )


def test_all_that_does_not_fit_is_told_at_once() -> None:
    ours = zeros(**MODEL, extra__bias=(1,), layers__1__down__weight=(3, 2))
    del ours["layers", "1", "experts", "1"]
    ours["layers", "0", "up", "weight"] = zeros(x=(5, 2))["x",]
    like = zeros(embed=(9, 3), head=(2,), experts=(2, 4, 2, 3))

    with pytest.raises(cc.StateMismatch) as caught:
        cc.KeyMap(RULES).apply(ours, like)

    assert str(caught.value) == (
        "the names do not fit\n"
        "matched by no rule:\n"
        "  extra.bias\n"
        "cannot be made:\n"
        "  layers.1.experts.1 is missing\n"
        "  layers.1.up.weight is float32[3, 2] where layers.0.up.weight is float32[5, 2]\n"
        "  layers.{l}.down.weight: l goes up to 1 without 0\n"
        "not filled:\n"
        "  experts float32[2, 4, 2, 3]\n"
        "  head float32[2]\n"
        "of another shape:\n"
        "  embed is float32[9, 2] where float32[9, 3] is asked for"
    )
    plan = cc.KeyMap(RULES).plan(ours, like)
    assert str(plan).endswith(str(caught.value).removeprefix("the names do not fit\n"))
    assert "7 x float32[3, 2] -> experts cannot be made" in " ".join(str(plan).split())


def test_what_is_not_asked_for_is_told() -> None:
    with pytest.raises(cc.StateMismatch, match=r"not asked for:\n  b$"):
        cc.KeyMap([cc.Rule("{x}", "{x}")]).apply(zeros(a=(1,), b=(1,)), like=zeros(a=(1,)))


def test_arrays_of_two_dtypes_are_not_stacked() -> None:
    ours = tensors({"w.0": np.zeros(2, np.float32), "w.1": np.zeros(2, np.int32)})

    with pytest.raises(cc.StateMismatch, match=r"w\.1 is int32\[2\] where w\.0 is float32\[2\]"):
        cc.KeyMap([cc.Rule("w.{l}", "w", "i -> l i")]).apply(ours)


def test_what_is_stacked_is_numbered() -> None:
    ours = zeros(w__0=(2,), w__01=(2,), w__x=(2,), w__9999999999=(2,))

    plan = cc.KeyMap([cc.Rule("w.{l}", "w", "i -> l i")]).plan(ours)

    assert plan.problems == {"matched by no rule": ["w.01", "w.9999999999", "w.x"]}
    assert plan.tensors["w",].leaf.shape == (1, 2)


def test_an_error_shows_some_and_the_plan_all() -> None:
    ours = zeros(**{f"x{i}": (1,) for i in range(30)})
    key_map = cc.KeyMap([cc.Rule("y", "y")])

    with pytest.raises(cc.StateMismatch, match="… and 10 more, which the plan shows"):
        key_map.apply(ours)
    assert len(key_map.plan(ours).problems["matched by no rule"]) == 30
    assert "x29" in str(key_map.plan(ours))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"w, float32\[4\], has 1 axes where '\(h d\) i' has 2"),
        ((5, 3), r"has an axis of 5 where '\(h d\)' asks for a multiple of 2"),
        ((4, 2), r"has an axis of 2 where 'i' asks for 3"),
    ],
)
def test_an_array_of_other_axes_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(cc.StateMismatch, match=message):
        cc.KeyMap([cc.Rule("w", "w", "(h d) i -> i h d", h=2, i=3)]).apply(zeros(w=shape))


def test_sizes_that_the_shape_does_not_tell_are_asked_for() -> None:
    with pytest.raises(cc.StateMismatch, match="does not say the sizes of h and d: give one"):
        cc.KeyMap([cc.Rule("w", "w", "(h d) -> h d")]).apply(zeros(w=(4,)))


def test_two_rules_for_one_leaf_are_refused() -> None:
    first, second = cc.Rule("{a}.weight", "{a}"), cc.Rule("conv.{**b}", None)

    with pytest.raises(cc.ConfigError) as caught:
        cc.KeyMap([first, second]).plan(zeros(conv__weight=(1,), fc__weight=(1,)))

    assert str(caught.value) == f"conv.weight is matched by {first} and by {second}"


def test_two_sources_of_one_leaf_are_refused() -> None:
    first, second = cc.Rule("a.weight", "new"), cc.Rule("b", "new")

    with pytest.raises(cc.ConfigError) as caught:
        cc.KeyMap([first, second]).plan(zeros(a__weight=(1,), b=(1,)))

    assert str(caught.value) == (f"two sources would become new: one by {first}, and b by {second}")


def test_two_leaves_of_one_dotted_name_are_refused() -> None:
    leaf = zeros(x=(1,))["x",]

    with pytest.raises(cc.StateMismatch, match=r"two leaves have the name a\.b"):
        cc.KeyMap([cc.Rule("{**x}", "{**x}")]).plan({("a.b",): leaf, ("a", "b"): leaf})


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        (("a.{l}", "a"), {}, "the field l is on one side only"),
        (("a", "a.{l}"), {}, "the field l is on one side only"),
        (("a.{", "a"), {}, "a field is written"),
        (("a.{*l}", "a"), {}, "a field is written"),
        (("a.{0}", "a"), {}, "a field is written"),
        (("a", "b", "o i"), {}, "axes must be such as"),
        (("a", None, "o i -> i o"), {}, "axes must be such as"),
        (("a", "b", "o [i] -> i o"), {}, "is no list of axes"),
        (("a", "b", "o 2 -> o 2"), {}, "is no list of axes"),
        (("a", "b", "o o -> o"), {}, "names an axis twice"),
        (("a", "b", "o i -> o"), {}, "i must be an axis"),
        (("a.{l}", "a", "o -> o"), {}, "l must be an axis"),
        (("a.{l}", "a", "l o -> l o"), {}, "l is in the names of one side, .* to the target alone"),
        (("a.{l}", "b.{l}", "l -> l"), {}, "l is a field and an axis"),
        (("a", "b", "o -> o"), {"h": 2}, "there is no field and no axis h"),
        (("a", "b", "o -> o"), {"o": 0}, "o must be a number of at least 1"),
        (("a.{x}", "b", "o -> x o"), {"x": "qkv"}, "x must be a number of at least 1"),
        (("a", "b", "o -> o"), {"o": (2, 3)}, "o must be a number of at least 1"),
        (("a.{x}", "b", "o -> x o"), {"x": ["q", "q"]}, "x has something twice"),
        (("a.{x}", "b", "o -> x o"), {"x": {"q": 1, "k": 2}}, "x has parts of several sizes"),
        (("a.{x}", "b", "x -> x"), {"x": {"q": 0}}, "x must be a number of at least 1"),
    ],
)
def test_rules_that_cannot_work_are_refused(
    arguments: tuple[Any, ...], sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(cc.ConfigError, match=message):
        cc.Rule(*arguments, **sizes)


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(cc.ConfigError, match="KeyMap takes a list of Rule"):
        cc.KeyMap([])
    with pytest.raises(cc.ConfigError, match="KeyMap takes a list of Rule"):
        cc.KeyMap([cc.Rule("a", None)]).reverse()
    with pytest.raises(cc.ConfigError, match="drops what it matches, and cannot be reversed"):
        cc.Rule("a", None).reverse()
