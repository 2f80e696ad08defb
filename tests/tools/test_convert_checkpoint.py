"""The command that converts checkpoints: files in, files out, one clear line for everything else."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.core.checkpoint_file import read_checkpoint, write_checkpoint  # noqa: E402
from mfuser_d2.core.official import to_official  # noqa: E402
from mfuser_d2.d2 import MFuserCheckpointer, load_config  # noqa: E402
from mfuser_d2.d2.official import empty_model_state  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"


@pytest.fixture(scope="module")
def convert():
    """`convert(*arguments)`: the command with the tiny config."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object, config: Path = CONFIG) -> None:
        module.main(["--config-file", str(config), *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """An authors' state dict of the tiny model, with a parameter that carries nothing."""
    generator = torch.Generator().manual_seed(2)
    state = empty_model_state(load_config(str(CONFIG)))
    ours = {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(1)
        for key, value in state.items()
    }
    return {**to_official(ours, "eva02"), "random_text": torch.ones(19, 64)}


@pytest.fixture
def source(official, tmp_path: Path) -> Path:
    """The same as mmcv writes it."""
    path = tmp_path / "authors.pth"
    state = {f"module.{key}": value for key, value in official.items()}
    torch.save({"meta": {"iter": 20000, "CLASSES": ("road",)}, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


def test_there_and_back(convert, official, source, tmp_path, capsys):
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    convert(source, ours)
    assert "random_text: a parameter the release never reads" in capsys.readouterr().out
    convert("--reverse", ours, back)
    state = torch.load(back, weights_only=True)
    assert len(state["meta"]["CLASSES"]) == 19
    assert set(state["state_dict"]) == set(official) - {"random_text"}
    assert all(torch.equal(value, official[key]) for key, value in state["state_dict"].items())


def test_converted_file_evaluates(convert, official, source, tmp_path):
    convert(source, tmp_path / "ours.pth")
    model = build_model(load_config(str(CONFIG), ["MODEL.DEVICE", "cpu"])).eval()
    MFuserCheckpointer(model).load(str(tmp_path / "ours.pth"), [])
    image = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    (scores,) = model([{"image": image, "height": 64, "width": 80}])
    assert scores["sem_seg"].shape == (19, 64, 80)
    assert torch.equal(model.backbone.pyramid.up2.weight, official["backbone.fpn2.0.weight"])


def test_reverse_needs_the_encoders(convert, source, tmp_path):
    ours, part = tmp_path / "ours.pth", tmp_path / "part.pth"
    convert(source, ours)
    state = read_checkpoint(ours)["model"]
    write_checkpoint(part, {"model": {key: value for key, value in state.items() if ".vfm." not in key}})
    with pytest.raises(SystemExit, match="lacks the frozen encoders"):
        convert("--reverse", part, tmp_path / "back.pth")


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trap",))


def test_bad_files_are_refused_by_what_they_are(convert, source, tmp_path):
    bad, target = tmp_path / "bad.pth", tmp_path / "ours.pth"
    contents = {"is a web page": b"<!DOCTYPE html><html></html>", "truncated": source.read_bytes()[:100_000]}
    for message, content in contents.items():
        bad.write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            convert(bad, target)
    torch.save({"state_dict": {}, "hook": Trap()}, bad)
    with pytest.raises(SystemExit, match=r"asks for \w+\.mkdir"):
        convert(bad, target)
    torch.save({"state_dict": {"layer.weight": torch.ones(1)}}, bad)
    with pytest.raises(SystemExit, match="no weights of the authors"):
        convert(bad, target)
    with pytest.raises(SystemExit, match="does not exist"):
        convert(tmp_path / "none.pth", target)
    assert not target.exists() and not (tmp_path / "trap").exists()


def test_wrong_variant_and_wrong_sizes_are_told(convert, source, tmp_path):
    target = tmp_path / "ours.pth"
    with pytest.raises(SystemExit, match=r"use a config named mfuser_eva02\.yaml"):
        convert(source, target, config=CONFIG.with_name("mfuser_tiny_clip.yaml"))
    with pytest.raises(SystemExit, match=r"MODEL\.MFUSER\.PROMPT_LENGTH is 2, the checkpoint has [^2]"):
        convert(source, target, "MODEL.MFUSER.PROMPT_LENGTH", 2)
    assert not target.exists()


@pytest.mark.parametrize(
    ("target", "message"), [("ours.safetensors", "end in .pth"), ("authors.pth", "both"), ("no/ours.pth", "folder")]
)
def test_targets_that_make_no_sense(convert, source, target, message):
    before = source.read_bytes()
    with pytest.raises(SystemExit, match=message):
        convert(source, source.parent / target)
    assert source.read_bytes() == before
