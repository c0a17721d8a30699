"""Two processes on this machine, with two devices of the CPU each.

    python examples/distributed/two_local_processes.py --directory runs/many --steps 301

The options are those of `train.py`. Ctrl-C or SIGTERM is a notice: the step is saved, and the same
command goes on after it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {
        **os.environ,
        "COORDINATOR_ADDRESS": address,
        "NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *sys.argv[1:]]
    processes = [
        # A session of its own, so that Ctrl-C in the terminal comes to this process alone.
        subprocess.Popen(  # noqa: S603  # the script beside this one
            command, env={**common, "PROCESS_ID": str(i)}, start_new_session=True
        )
        for i in range(2)
    ]

    def hand_on(number: int, frame: object) -> None:
        for process in processes:  # to one would be enough
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    codes = [process.wait() for process in processes]
    sys.exit(int(any(codes)))


if __name__ == "__main__":
    main()
