"""Only process 0 talks to a tracker."""

from pathlib import Path

import embedded
from distributed.launch import run


def test_one_run_of_one_process(tmp_path: Path, count: int) -> None:
    where = {
        "tracking_uri": embedded.uri(tmp_path),
        "artifact_location": str(tmp_path / "artifacts"),
        # Made by a thread of process 0, which reads checkpoints while the others go on.
        "payload": {"only": "params"},
    }

    ended = run(tmp_path / "run", count, devices=4 // count, steps=20, mlflow=where)

    assert [process.last("modules") for process in ended] == [["mlflow"], *[[]] * (count - 1)]
    client = embedded.client(tmp_path)
    experiment = client.get_experiment_by_name("many")
    assert experiment
    (of_mlflow,) = client.search_runs([experiment.experiment_id])
    assert of_mlflow.info.status == "FINISHED"
    history = client.get_metric_history(of_mlflow.info.run_id, "loss")
    assert [point.step for point in history] == list(range(20))
    assert sorted(embedded.models(tmp_path)) == [18, 19]
    versions = {v.version: v.tags for v in client.search_model_versions("name = 'many'")}
    assert embedded.aliases(tmp_path, "many").keys() == {"last"}
    assert len(versions) == 2
    for source in (model.artifact_location for model in embedded.models(tmp_path).values()):
        assert (Path(source.removeprefix("file://")) / "weights" / "model.safetensors").is_file()
