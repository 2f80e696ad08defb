"""Reading an evaluation from disk."""

import json
import math
import shutil

import numpy as np
import pytest

from mfuser_d2.evaluation import iou_per_class
from mfuser_d2.evaluation.report.run import load_run

NIGHT = "streets_night_sem_seg_val"


def test_everything_an_evaluation_left_is_found(make_run) -> None:
    folder = make_run("eva02")
    run = load_run(folder)
    assert run.name == "eva02" and run.sources == ["streets_sem_seg_val"]
    night = next(target for target in run.targets if target.name == NIGHT)
    assert run.scores(NIGHT)["mIoU"] == pytest.approx(100 * np.nanmean(iou_per_class(night.counts)))
    assert [record["mIoU"] for record in night.images] == sorted(record["mIoU"] for record in night.images)
    assert len(night.images) == 5
    assert run.protocol["inference"]["stride"] == [341, 341]


def test_run_folder_inference_folder_and_file_are_the_same_run(make_run) -> None:
    folder = make_run()
    runs = [load_run(path) for path in (folder, folder / "inference", folder / "inference" / "results.json")]
    assert [run.name for run in runs] == ["run"] * 3
    assert all(run.mean == runs[0].mean and len(run.metrics) == len(runs[0].metrics) > 0 for run in runs)


def test_results_beside_the_target_folders_are_found_too(make_run, tmp_path) -> None:
    """A loop that calls `summarize(..., output_dir)` instead of output_dir/inference."""
    folder = make_run()
    shutil.move(folder / "inference" / "results.json", folder / "results.json")
    run = load_run(folder)
    assert all(target.counts is not None and target.images for target in run.targets) and run.metrics


def test_null_becomes_nan_and_non_finite_metrics_drop_out(make_run) -> None:
    folder = make_run()
    file = folder / "inference" / "results.json"
    content = json.loads(file.read_text())
    content["results"][NIGHT]["IoU-train"] = None
    file.write_text(json.dumps(content))
    run = load_run(folder)
    assert math.isnan(run.scores(NIGHT)["IoU-train"])
    assert run.series(f"{NIGHT}/sem_seg/mIoU") == []
    assert run.series("lr") == [(iteration, 1e-4) for iteration in range(0, 100, 20)]
    assert run.scores("unknown") == {}


def test_repeated_iterations_and_damaged_lines_of_metrics(make_run, caplog) -> None:
    folder = make_run()
    with (folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 40, "total_loss": 77.0}\n{"iteration": 60, "total_lo')
    run = load_run(folder)
    series = dict(run.series("total_loss"))
    assert series[40] == 77.0 and list(series) == sorted(series)
    assert dict(run.series("lr"))[40] == 1e-4
    assert "metrics.json: line 8 is damaged" in caplog.text


def test_parts_may_be_missing(make_run) -> None:
    folder = make_run()
    for file in ("metrics.json", f"inference/{NIGHT}/confusion.json", f"inference/{NIGHT}/images.jsonl"):
        (folder / file).unlink()
    run = load_run(folder, name="short")
    night = next(target for target in run.targets if target.name == NIGHT)
    assert run.metrics == [] and night.counts is None and night.images == [] and run.name == "short"


def test_no_evaluation_damaged_and_foreign_files_are_named(make_run, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nothing holds no evaluation .*--eval-only"):
        load_run(tmp_path / "nothing")
    folder = make_run()
    (folder / "inference" / "results.json").write_text('{"results": {')
    with pytest.raises(ValueError, match=r"results.json is damaged"):
        load_run(folder)
    (folder / "inference" / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"lacks \['classes', 'mean', 'results'\]"):
        load_run(folder)
