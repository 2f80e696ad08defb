"""Detectron2's evaluator: metrics, files, processes and bad input."""

import json
import math
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.evaluation import SemSegEvaluator, print_csv_format  # noqa: E402

from mfuser_d2.data.labels import CLASSES, COLORS  # noqa: E402
from mfuser_d2.evaluation import DGSSEvaluator, build_evaluator, iou_per_class  # noqa: E402
from mfuser_d2.evaluation.label_files import read_label  # noqa: E402

SIZE = (12, 20)


@pytest.fixture
def dataset(tmp_path):
    """A registered data set of four labelled frames in two folders, two of them named alike."""
    name = f"toy_{uuid.uuid4().hex}_sem_seg_val"
    generator = np.random.default_rng(0)
    records = []
    for folder, stem in (("a", "0"), ("a", "1"), ("b", "0"), ("b", "2")):
        label = tmp_path / "labels" / folder / f"{stem}.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        truth = generator.integers(0, 17, SIZE).astype(np.uint8)
        truth[:2] = 255
        Image.fromarray(truth).save(label)
        image = tmp_path / "images" / folder / f"{stem}.jpg"
        records.append({"file_name": str(image), "sem_seg_file_name": str(label), "height": SIZE[0], "width": SIZE[1]})
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        stuff_classes=list(CLASSES),
        stuff_colors=list(COLORS),
        ignore_label=255,
        image_root=str(tmp_path / "images"),
    )
    yield name, records
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def _scores(seed: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(19, *size, generator=torch.Generator().manual_seed(seed))


def _run(evaluator, records) -> dict:
    evaluator.reset()
    for seed, record in enumerate(records):
        evaluator.process([record], [{"sem_seg": _scores(seed)}])
    return evaluator.evaluate()


def test_skip_convention_gives_detectron2s_own_numbers(dataset) -> None:
    name, records = dataset
    ours = _run(DGSSEvaluator(name), records)["sem_seg"]
    theirs = _run(SemSegEvaluator(name), records)["sem_seg"]
    for key, value in theirs.items():
        if "Bound" in key or "min(" in key:
            continue
        assert ours[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key
    assert math.isnan(ours["IoU-motorcycle"])


def test_zero_convention_counts_predicted_but_absent_classes(dataset) -> None:
    name, records = dataset
    skip = _run(DGSSEvaluator(name), records)["sem_seg"]
    zero = _run(DGSSEvaluator(name, absent_class="zero"), records)["sem_seg"]
    assert zero["IoU-motorcycle"] == zero["IoU-bicycle"] == 0
    assert zero["mIoU"] == pytest.approx(skip["mIoU"] * 17 / 19)


def test_batches_and_single_images_agree(dataset) -> None:
    name, records = dataset
    evaluator = DGSSEvaluator(name)
    evaluator.process(records, [{"sem_seg": _scores(seed)} for seed in range(4)])
    assert evaluator.evaluate()["sem_seg"] == pytest.approx(
        _run(DGSSEvaluator(name), records)["sem_seg"], rel=0, abs=0, nan_ok=True
    )


def test_reset_forgets(dataset) -> None:
    name, records = dataset
    evaluator = DGSSEvaluator(name)
    first = _run(evaluator, records)
    assert _run(evaluator, records)["sem_seg"] == pytest.approx(first["sem_seg"], nan_ok=True)


def test_images_are_counted(dataset) -> None:
    name, records = dataset
    assert _run(DGSSEvaluator(name), records[:3])["images"] == 3


def test_results_print_as_csv(dataset, caplog) -> None:
    name, records = dataset
    results = _run(DGSSEvaluator(name), records)
    with caplog.at_level("INFO"):
        print_csv_format(results)
    assert "mIoU,fwIoU,mACC,pACC" in caplog.text


def test_label_is_found_when_the_mapper_dropped_it(dataset) -> None:
    name, records = dataset
    bare = [{key: value for key, value in record.items() if key != "sem_seg_file_name"} for record in records]
    assert _run(DGSSEvaluator(name), bare)["sem_seg"] == pytest.approx(
        _run(DGSSEvaluator(name), records)["sem_seg"], nan_ok=True
    )
    with pytest.raises(KeyError, match="stranger.jpg is not an image of"):
        DGSSEvaluator(name).process([{"file_name": "stranger.jpg"}], [{"sem_seg": _scores(0)}])


def test_metrics_are_taken_at_the_labels_own_size(dataset) -> None:
    name, records = dataset
    evaluator = DGSSEvaluator(name)
    half = _scores(0, (SIZE[0] // 2, SIZE[1] // 2))
    evaluator.process(records[:1], [{"sem_seg": half}])
    resized = torch.nn.functional.interpolate(half[None], size=SIZE, mode="bilinear", align_corners=False)[0]
    expected = DGSSEvaluator(name)
    expected.process(records[:1], [{"sem_seg": resized}])
    assert evaluator.evaluate()["sem_seg"] == pytest.approx(expected.evaluate()["sem_seg"], nan_ok=True)


def test_files_of_a_target_lie_in_its_own_folder(dataset, tmp_path) -> None:
    name, records = dataset
    evaluator = build_evaluator(name, tmp_path, save_predictions=True, save_per_image=True, save_rle=True)
    _run(evaluator, records)
    folder = tmp_path / "inference" / name
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {f"predictions/{stem}.png" for stem in ("a/0", "a/1", "b/0", "b/2")}
    assert files == pictures | {"confusion.json", "confusion.png", "images.jsonl", "sem_seg_predictions.json"}
    for seed, record in enumerate(records):
        stored = folder / "predictions" / Path(record["file_name"]).relative_to(tmp_path / "images")
        np.testing.assert_array_equal(read_label(stored.with_suffix(".png")), _scores(seed).argmax(0).numpy())


def test_counts_of_the_images_sum_to_the_saved_confusion(dataset, tmp_path) -> None:
    name, records = dataset
    results = _run(build_evaluator(name, tmp_path, save_per_image=True), records)
    folder = tmp_path / "inference" / name
    confusion = json.loads((folder / "confusion.json").read_text())
    counts = np.array(confusion["counts"])
    assert confusion["num_images"] == 4 and counts.sum() == 4 * (SIZE[0] - 2) * SIZE[1]
    assert 100 * np.nanmean(iou_per_class(counts)) == pytest.approx(results["sem_seg"]["mIoU"])
    lines = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == sorted(record["file_name"] for record in records)
    for column, expected in enumerate((np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0))):
        total = [sum(line["counts"].get(str(k), [0, 0, 0])[column] for line in lines) for k in range(19)]
        np.testing.assert_array_equal(total, expected)


def test_masks_decode_to_the_prediction(dataset, tmp_path) -> None:
    mask_util = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    name, records = dataset
    _run(build_evaluator(name, tmp_path, save_rle=True), records[:1])
    stored = json.loads((tmp_path / "inference" / name / "sem_seg_predictions.json").read_text())
    labels = np.full(SIZE, 255)
    for record in stored:
        labels[mask_util.decode(record["segmentation"]) == 1] = record["category_id"]
    np.testing.assert_array_equal(labels, _scores(0).argmax(0).numpy())


def test_nothing_is_written_unless_asked(dataset, tmp_path) -> None:
    name, records = dataset
    before = set(tmp_path.rglob("*"))
    _run(DGSSEvaluator(name), records)
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="needs an output_dir"):
        DGSSEvaluator(name, save_predictions=True)


def test_no_image_gives_nan(dataset) -> None:
    assert math.isnan(DGSSEvaluator(dataset[0]).evaluate()["sem_seg"]["mIoU"])


def test_memory_does_not_grow_with_the_images(dataset, tmp_path) -> None:
    import pickle

    name, records = dataset
    evaluator = build_evaluator(name, tmp_path, save_per_image=True)
    sizes = []
    for _ in range(3):
        for seed, record in enumerate(records):
            evaluator.process([record], [{"sem_seg": _scores(seed)}])
        sizes.append(len(pickle.dumps(vars(evaluator))))
    assert max(sizes) - min(sizes) < 16  # the integers themselves grow by a few bytes


@pytest.mark.parametrize("shape", [(18, *SIZE), (20, *SIZE), SIZE])
def test_scores_of_another_class_list_are_refused(dataset, shape) -> None:
    name, records = dataset
    with pytest.raises(ValueError, match=r"has 19 classes but the model gives scores of shape"):
        DGSSEvaluator(name).process(records[:1], [{"sem_seg": torch.zeros(shape)}])


def test_bad_labels_are_named(dataset) -> None:
    name, records = dataset
    evaluator = DGSSEvaluator(name)
    with pytest.raises(ValueError, match=r"a/0.png is 12x20 .* but the prediction of its image is 20x12"):
        evaluator.process(records[:1], [{"sem_seg": _scores(0, (20, 12))}])
    raw_ids = np.full(SIZE, 26, np.uint8)
    Image.fromarray(raw_ids).save(records[0]["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"a/0.png: truth holds the values 26"):
        evaluator.process(records[:1], [{"sem_seg": _scores(0)}])
    os.remove(records[0]["sem_seg_file_name"])
    with pytest.raises(ValueError, match="a/0.png is missing"):
        evaluator.process(records[:1], [{"sem_seg": _scores(0)}])


def test_unknown_convention_is_refused_before_the_first_image(dataset) -> None:
    with pytest.raises(ValueError, match="TEST.MFUSER.ABSENT_CLASS='none' is unknown"):
        DGSSEvaluator(dataset[0], absent_class="none")


TWO_PROCESSES = textwrap.dedent("""
    import json, os, pathlib, sys, time
    import torch, torch.distributed as dist
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.utils import comm
    from mfuser_d2.evaluation import build_evaluator

    torch.set_num_threads(1)
    rank, meeting, folder, records = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
    DatasetCatalog.register("toy", lambda: records)
    MetadataCatalog.get("toy").set(stuff_classes=json.loads(sys.argv[5]), ignore_label=255)
    evaluator = build_evaluator("toy", folder, save_per_image=True, save_rle=True, has_confusion_picture=False)
    for seed in ((0, 1, 2), (3,))[rank]:
        scores = torch.randn(19, 12, 20, generator=torch.Generator().manual_seed(seed))
        evaluator.process([records[seed]], [{"sem_seg": scores}])
    result = evaluator.evaluate()
    assert (result is None) == (rank == 1)
    finished = pathlib.Path(meeting + ".finished")  # leaving first could reset the connection the other still reads
    if rank == 0:
        finished.touch()
    deadline = time.monotonic() + 100
    while not finished.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)  # all is written; gloo's threads sometimes abort the interpreter's own way out
""")


def test_two_processes_give_the_bits_of_one(dataset, tmp_path) -> None:
    name, records = dataset
    whole, split = tmp_path / "whole", tmp_path / "split"
    _run(build_evaluator(name, whole, save_per_image=True, save_rle=True), records)
    arguments = [str(tmp_path / "meeting"), str(split), json.dumps(records), json.dumps(CLASSES)]
    workers = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), *arguments], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    one, two = whole / "inference" / name, split / "inference" / "toy"
    counts = [json.loads((folder / "confusion.json").read_text()) for folder in (one, two)]
    assert counts[0]["counts"] == counts[1]["counts"] and counts[1]["num_images"] == 4
    for file in ("images.jsonl", "sem_seg_predictions.json"):
        assert (one / file).read_text() == (two / file).read_text()
