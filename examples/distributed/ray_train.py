"""Train under Ray Train: its JaxTrainer starts the processes and joins them (Ray 2.50 or newer).

    python examples/distributed/ray_train.py --directory /shared/runs/many --workers 4

Ray calls `jax.distributed.initialize` before the loop, so the loop is that of `train.py` as it is.
When a worker is lost, Ray starts all of them again (`max_failures`), and the run goes on from the
last complete checkpoint. Ray's own checkpoints (`ray.train.report`) are not needed for that.
"""

from __future__ import annotations

import argparse
from typing import Any


def loop(config: dict[str, Any]) -> None:
    """Run in each worker."""
    import train  # beside this file; has to be on the workers too

    train.main(["--directory", config["directory"], "--steps", str(config["steps"])])


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", required=True, help="one that all workers share")
    parser.add_argument("--steps", type=int, default=301)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    trainer = JaxTrainer(
        loop,
        train_loop_config={"directory": options.directory, "steps": options.steps},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=True),
        run_config=RunConfig(name="many", failure_config=FailureConfig(max_failures=100)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
