from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.d2.checkpoint import MFuserCheckpointer  # noqa: E402


class Counter:
    """A checkpointable thing."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def saved(cfg, folder: Path, name: str = "model_final") -> Path:
    model = build_model(cfg)
    model.head.weight.data.fill_(3.0)
    MFuserCheckpointer(model, str(folder), trainer=Counter(5)).save(name, iteration=11)
    return folder / f"{name}.pth"


def test_file_holds_the_trained_part_the_random_encoder_and_its_identity(toy_cfg, tmp_path: Path):
    data = torch.load(saved(toy_cfg, tmp_path), weights_only=True)
    assert set(data) == {"format", "model", "encoders", "trainer", "iteration"}
    assert {"head.weight", "norm.running_mean", "encoder.weight"} <= set(data["model"])
    assert data["encoders"]["encoder"]["name"] == "toy_vfm"
    toy_cfg.MODEL.MFUSER.VFM.WEIGHTS = "file.pth"
    data = torch.load(saved(toy_cfg, tmp_path), weights_only=True)
    assert "encoder.weight" not in data["model"] and "head.weight" in data["model"]


def test_last_checkpoint_moves_after_the_file_is_whole(toy_cfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(toy_cfg, tmp_path, "model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"

    def full_disk(data: object, file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="Free space"):
        saved(toy_cfg, tmp_path, "model_0000005")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last_checkpoint", "model_0000002.pth"]


def test_weights_alone_leave_the_training_state(toy_cfg, tmp_path: Path):
    path = saved(toy_cfg, tmp_path)
    model, counter = build_model(toy_cfg), Counter()
    checkpointer = MFuserCheckpointer(model, str(tmp_path / "other"), trainer=counter)
    rest = checkpointer.resume_or_load(str(path), resume=True)
    assert (model.head.weight == 3.0).all() and counter.value == 0 and rest["iteration"] == 11


def test_resuming_brings_the_training_state_and_ignores_the_given_weights(toy_cfg, tmp_path: Path):
    saved(toy_cfg, tmp_path)
    model, counter = build_model(toy_cfg), Counter()
    MFuserCheckpointer(model, str(tmp_path), trainer=counter).resume_or_load("nowhere.pth", resume=True)
    assert (model.head.weight == 3.0).all() and counter.value == 5


def test_resuming_from_bare_weights_is_refused(toy_cfg, tmp_path: Path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    checkpointer = MFuserCheckpointer(build_model(toy_cfg), str(tmp_path), trainer=Counter())
    with pytest.raises(ValueError, match="no training state .trainer.*give it as MODEL.WEIGHTS"):
        checkpointer.resume_or_load("", resume=True)


def test_checkpointer_works_on_after_a_file_that_cannot_be_read(toy_cfg, tmp_path: Path):
    good = saved(toy_cfg, tmp_path)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(good.read_bytes()[:500])
    model = build_model(toy_cfg)
    checkpointer = MFuserCheckpointer(model, str(tmp_path))
    with pytest.raises(ValueError, match="bad.pth"):
        checkpointer.load(str(bad), [])
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        checkpointer.load("nowhere.pth", [])
    checkpointer.load(str(good), [])
    assert (model.head.weight == 3.0).all()


def test_other_encoder_is_refused(toy_cfg, tmp_path: Path):
    toy_cfg.MODEL.MFUSER.VFM.WEIGHTS = "file.pth"
    path = saved(toy_cfg, tmp_path)
    toy_cfg.MODEL.MFUSER.VFM.NAME = "other_vfm"
    model = build_model(toy_cfg)
    model.encoder.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="'toy_vfm' with weights from a file, but this model has 'other_vfm'"):
        MFuserCheckpointer(model).load(str(path), [])


def test_empty_path_loads_nothing(toy_cfg):
    assert MFuserCheckpointer(build_model(toy_cfg)).load("", []) == {}
