"""One dict that holds what several frameworks trained."""

from typing import Any

from states.case import Case, Leaves
from states.cases import equinox, linen, nnx, rl

PARTS = {
    "nnx": nnx.CASES[1],
    "equinox": equinox.CASES[1],
    "linen": linen.CASES[0],
    "rl": rl.CASES[0],
}


def make(seed: int) -> dict[str, Any]:
    return {name: part.make(seed) for name, part in PARTS.items()}


def train(state: dict[str, Any], step: int) -> dict[str, Any]:
    return {name: part.train(state[name], step) for name, part in PARTS.items()}


def leaves(state: dict[str, Any]) -> Leaves:
    for name, part in PARTS.items():
        for path, leaf in part.leaves(state[name]):
            yield f"{name}: {path}", leaf


CASES = [Case("four-frameworks", make, train, leaves)]
