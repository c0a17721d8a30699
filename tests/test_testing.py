"""The public stand-ins keep the contracts of what they stand for."""

from typing import Any

import pytest

from ckpt_callbacks.stores import Tracker
from ckpt_callbacks.testing import FakeClock, MemoryStore, TrackerContract


class TestMemoryStore(TrackerContract):
    @pytest.fixture(params=[False, True])
    def make_store(self, request: pytest.FixtureRequest) -> Any:
        service = MemoryStore(put_moves_aliases=request.param)
        return lambda: service

    def logged_files(self, store: Tracker) -> dict[str, bytes]:
        assert isinstance(store, MemoryStore)
        return store.files


def test_the_faults_of_a_memory_store_are_those_of_a_service() -> None:
    store = MemoryStore()
    store.copies[1] = {}
    store.lose_reply = True
    with pytest.raises(ConnectionError, match="the reply is lost"):
        store.alias("best", 1)
    assert store.aliases == {"best": 1}

    store.lag = True
    listing = store.listing()
    assert listing
    assert not listing.copies

    store.down = True
    with pytest.raises(ConnectionError, match="memory is down"):
        store.listing()


def test_a_fake_clock_stands_still_until_it_is_told() -> None:
    clock = FakeClock(100.0)
    assert clock.time() == clock.time() == clock.monotonic() == 100.0
    clock.advance(5)
    clock.wall -= 50
    assert (clock.time(), clock.monotonic()) == (55.0, 105.0)
