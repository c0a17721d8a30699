"""What the machine is busy with, as metrics, under the names that MLflow gives them."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Machine", "SystemMetrics"]

logger = logging.getLogger("ckpt_callbacks")

_MEGABYTE = 1e6
"""Bytes, as MLflow has it."""


class Machine:
    """What is measured, on the thread that makes it.

    Args:
        folder: the disk that it is on is watched.
    """

    def __init__(self, folder: Path) -> None:
        import psutil

        self._psutil = psutil
        self._folder = str(folder)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call on a thread has nothing to compare with

    def sample(self) -> dict[str, float]:
        """Return the state of the machine by name; a megabyte is a million bytes."""
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(self._folder)
        values = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }
        before, now = self._network, self._psutil.net_io_counters()
        if before and now:  # a container may have no network
            received, sent = now.bytes_recv - before.bytes_recv, now.bytes_sent - before.bytes_sent
            values["network_receive_megabytes"] = received / _MEGABYTE
            values["network_transmit_megabytes"] = sent / _MEGABYTE
        for index, used in _device_memory().items():
            values[f"gpu_{index}_memory_usage_megabytes"] = used / _MEGABYTE
        return {f"system/{name}": float(value) for name, value in values.items()}


class SystemMetrics:
    """Samples the machine on a thread of its own, as metrics of the step that the loop is at.

    Args:
        folder: the disk that it is on is watched.
        every: seconds between two samples; `None` for none at all.
        step: returns the loop's latest step, or `None` before the first.
        log: takes step and values.
    """

    def __init__(
        self,
        folder: Path,
        every: float | None,
        step: Callable[[], Any],
        log: Callable[[tuple[Any, Mapping[str, float]]], object],
    ) -> None:
        self._folder = folder
        self._every = every
        self._step = step
        self._log = log
        self._complaint = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-system", daemon=True)

    def start(self) -> None:
        """Begin to sample, on a thread of its own."""
        if self._every is not None:
            self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        machine: Machine | None = None
        while True:
            try:
                machine = machine or Machine(self._folder)
                if (step := self._step()) is not None:
                    self._log((step, machine.sample()))
                self._complaint = ""
            except Exception as error:  # such as a system that does not tell
                if str(error) != self._complaint:
                    logger.warning("the machine can not be sampled: %s", error)
                self._complaint = str(error)
            if self._stop.wait(self._every):
                return


def _device_memory() -> dict[int, int]:
    """Return the bytes in use of each device that reports them."""
    jax = sys.modules.get("jax")
    if jax is None:
        return {}
    stats = [device.memory_stats() for device in jax.local_devices()]
    return {i: s["bytes_in_use"] for i, s in enumerate(stats) if s and "bytes_in_use" in s}
