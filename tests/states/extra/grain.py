"""Grain: an iterator over the data, beside the model that is trained on them."""

import json
from typing import Any

import grain
import numpy as np

from states.case import Case, Leaves
from states.cases.nnx import Net, nnx_leaves, sgd_step


def example(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {"x": rng.normal(size=3).astype(np.float32), "y": rng.normal(size=2).astype(np.float32)}


class Example(grain.transforms.Map):
    def map(self, element: int) -> dict[str, np.ndarray]:
        return example(element)


def dataset_iterator() -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(100).shuffle(seed=7).map(example).repeat()
    return iter(dataset.to_iter_dataset().batch(8))


def loader_iterator() -> grain.DataLoaderIterator:
    shards = grain.sharding.NoSharding()
    return iter(
        grain.DataLoader(
            data_source=grain.sources.RangeDataSource(0, 100, 1),
            sampler=grain.samplers.IndexSampler(100, shards, shuffle=True, seed=7),
            operations=[Example(), grain.transforms.Batch(8)],
        )
    )


def train(state: dict[str, Any], _: int) -> dict[str, Any]:
    batch = next(state["data"])
    sgd_step(state["model"], batch["x"], batch["y"])
    return state


def leaves(state: dict[str, Any]) -> Leaves:
    yield from nnx_leaves(state["model"])
    position = state["data"].get_state()
    yield "position", position if isinstance(position, bytes) else json.dumps(position)


CASES = [
    Case("dataset", lambda seed: {"model": Net(seed), "data": dataset_iterator()}, train, leaves),
    Case("loader", lambda seed: {"model": Net(seed), "data": loader_iterator()}, train, leaves),
]
