"""The protocol beside a table."""

import hashlib
import json

import pytest
import torch

from mfuser_d2.evaluation.protocol import describe_protocol, file_sha256, library_versions


def test_sha256_of_a_file_longer_than_a_block(tmp_path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "model.pth").write_bytes(content)
    assert file_sha256(tmp_path / "model.pth") == hashlib.sha256(content).hexdigest()
    assert file_sha256(tmp_path / "absent.pth") is None


def test_versions_name_what_runs() -> None:
    versions = library_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["mfuser_d2"] not in ("absent", "unknown")


def test_protocol_fits_json_and_whole_images_have_no_window() -> None:
    protocol = describe_protocol(inference_mode="whole", absent_class="zero", test_sizes={"a": (1024, 2048)})
    assert json.loads(json.dumps(protocol))["test_size"] == {"a": [1024, 2048]}
    assert protocol["inference"] == {"mode": "whole"}
    assert "mmseg" in protocol["absent_class_meaning"]


def test_images_that_keep_their_size_say_so() -> None:
    protocol = describe_protocol(test_sizes={"a": (0, 0), "b": None, "c": (1024, 0), "d": 512})
    assert protocol["test_size"] == {"a": "own size", "b": "own size", "c": [1024, 0], "d": 512}


def test_splits_follow_from_the_names_where_they_are_not_given() -> None:
    protocol = describe_protocol(
        train_datasets=["gta5_sem_seg_all"],
        test_sizes={"acdc_fog_sem_seg_val": (0, 0), "mine": (0, 0)},
        splits={"mine": "the first hundred"},
    )
    assert protocol["split"] == {
        "gta5_sem_seg_all": "all", "acdc_fog_sem_seg_val": "val", "mine": "the first hundred"
    }  # fmt: skip


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="'both'.*skip"):
        describe_protocol(absent_class="both")
