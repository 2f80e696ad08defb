"""The table's four files hold the same numbers and parse back."""

import csv
import json
import math

import numpy as np
import pytest

from mfuser_d2.data.labels import CLASSES
from mfuser_d2.evaluation import describe_protocol, file_sha256, score_confusion, summarize


def _result(seed: int, absent: int | None = None) -> dict:
    counts = np.random.default_rng(seed).integers(0, 50, (19, 19)) + 200 * np.eye(19, dtype=np.int64)
    if absent is not None:
        counts[absent] = 0
    return {"sem_seg": score_confusion(counts, CLASSES)}


@pytest.fixture
def results() -> dict:
    train = CLASSES.index("train")
    return {
        "cityscapes_fine_sem_seg_val": _result(0),
        "bdd100k_sem_seg_val": _result(1, absent=train),
        "gta5_sem_seg_val": _result(2),
    }


@pytest.fixture
def protocol(tmp_path) -> dict:
    weights = tmp_path / "model.pth"
    weights.write_bytes(b"weights")
    return describe_protocol(
        weights=weights,
        crop_size=(512, 512),
        stride=(341, 341),
        test_sizes={"bdd100k_sem_seg_val": (720, 1280)},
        mappings={"mapillary19_sem_seg_val": "openseg"},
        train_datasets=["gta5_sem_seg_train"],
        note='a comma, a "quote" and a | bar',
    )


def _mean(results: dict, key: str) -> float:
    values = [results[name]["sem_seg"][key] for name in ("cityscapes_fine_sem_seg_val", "bdd100k_sem_seg_val")]
    return float(np.nanmean(values))


def test_json_holds_everything_in_full_precision(results, protocol, tmp_path) -> None:
    summarize(results, protocol, tmp_path, sources=["gta5_sem_seg_val"])
    content = json.loads((tmp_path / "results.json").read_text())
    for name, result in results.items():
        for key, value in result["sem_seg"].items():
            stored = content["results"][name][key]
            assert (stored is None and math.isnan(value)) or stored == value
    assert content["results"]["bdd100k_sem_seg_val"]["IoU-train"] is None
    assert content["mean"]["mIoU"] == _mean(results, "mIoU")
    assert content["sources"] == ["gta5_sem_seg_val"]
    assert content["classes_counted"] == {
        "cityscapes_fine_sem_seg_val": 19,
        "bdd100k_sem_seg_val": 18,
        "gta5_sem_seg_val": 19,
    }
    stated = content["protocol"]
    assert stated["weights"]["sha256"] == file_sha256(tmp_path / "model.pth")
    assert stated["inference"] == {"mode": "slide", "crop_size": [512, 512], "stride": [341, 341]}
    assert stated["absent_class"] == "skip" and stated["mapping"] == {"mapillary19_sem_seg_val": "openseg"}
    assert {"torch", "detectron2", "mfuser_d2"} <= set(stated["versions"])


def test_csv_parses_back_to_the_same_table(results, protocol, tmp_path) -> None:
    summarize(results, protocol, tmp_path, sources=["gta5_sem_seg_val"])
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_name = {(row["kind"], row["name"]): row for row in rows}
    assert len(by_name) == len(rows)
    for name, result in results.items():
        for label in CLASSES:
            value, cell = result["sem_seg"][f"IoU-{label}"], by_name["class", label][name]
            assert cell == "" if math.isnan(value) else float(cell) == pytest.approx(value, abs=5e-5)
    assert float(by_name["overall", "mIoU"]["mean"]) == pytest.approx(_mean(results, "mIoU"), abs=5e-5)
    first = "cityscapes_fine_sem_seg_val"
    assert by_name["protocol", "note"][first] == 'a comma, a "quote" and a | bar'
    assert by_name["protocol", "test_size.bdd100k_sem_seg_val"][first] == "720, 1280"


def test_markdown_is_one_table_with_a_cell_per_target(results, protocol, tmp_path) -> None:
    summarize(results, protocol, tmp_path, sources=["gta5_sem_seg_val"])
    lines = (tmp_path / "results.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {len(row) for row in cells} == {5}
    assert cells[0][1:] == ["cityscapes_fine_val", "bdd100k_val", "gta5_val (source)", "mean"]
    assert [row[0] for row in cells[2:21]] == list(CLASSES)
    train = cells[2 + CLASSES.index("train")]
    assert train[2] == "-" and train[4] == train[1]
    assert next(row for row in cells if row[0] == "**mIoU**")[4] == f"**{_mean(results, 'mIoU'):.2f}**"


def test_text_is_returned_and_written(results, protocol, tmp_path) -> None:
    text = summarize(results, protocol, tmp_path)
    assert text == (tmp_path / "results.txt").read_text()
    row = next(line for line in text.splitlines() if line.startswith("mIoU  "))
    expected = [result["sem_seg"]["mIoU"] for result in results.values()]
    np.testing.assert_allclose([float(cell) for cell in row.split()[1:]], [*expected, np.mean(expected)], atol=5e-3)
    assert "inference.stride: 341, 341" in text
    assert sorted(path.name for path in tmp_path.glob("*results*")) == [
        "results.csv",
        "results.json",
        "results.md",
        "results.txt",
    ]


def test_results_may_hold_their_mean_and_lack_their_level(results, protocol, tmp_path) -> None:
    plain = {name: result["sem_seg"] for name, result in results.items()}
    with_mean = {**results, "mean": {"mIoU": 1.0}}
    assert summarize(plain, protocol, tmp_path / "a") == summarize(with_mean, protocol, tmp_path / "b")


def test_number_of_images_stands_in_the_protocol(results, protocol, tmp_path) -> None:
    results["bdd100k_sem_seg_val"]["images"] = 17
    text = summarize(results, protocol, tmp_path)
    assert "images.bdd100k_sem_seg_val: 17\n" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["protocol"]["images"] == {"bdd100k_sem_seg_val": 17}
    assert "images" not in content["mean"] and "images" not in content["results"]["bdd100k_sem_seg_val"]


def test_only_sources_still_have_a_mean(results, protocol, tmp_path) -> None:
    one = {"gta5_sem_seg_val": results["gta5_sem_seg_val"]}
    summarize(one, protocol, tmp_path, sources=["gta5_sem_seg_val"])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["mean"]["mIoU"] == results["gta5_sem_seg_val"]["sem_seg"]["mIoU"]


def test_nothing_to_show_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no results"):
        summarize({"bdd100k_sem_seg_val": {}}, {}, tmp_path)
    assert not list(tmp_path.iterdir())
