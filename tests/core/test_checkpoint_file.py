import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfuser_d2.core.checkpoint_file import check_kinds, read_checkpoint, write_checkpoint, write_text


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_what_is_written_is_read_again_and_no_other_file_stays(tmp_path: Path):
    write_checkpoint(tmp_path / "a.pth", {"model": {"w": torch.arange(3)}, "iteration": 7})
    data = read_checkpoint(tmp_path / "a.pth")
    assert data["iteration"] == 7 and torch.equal(data["model"]["w"], torch.arange(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"model": {"w": torch.zeros(1)}})

    def full_disk(data: object, file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="Free space or change OUTPUT_DIR"):
        write_checkpoint(path, {"model": {"w": torch.ones(1)}})
    assert read_checkpoint(path)["model"]["w"].item() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_text(tmp_path / "new" / "a", "old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="a could not be written.*Free space"):
        write_text(tmp_path / "new" / "a", "newer")
    assert (tmp_path / "new" / "a").read_text() == "old" and len(list((tmp_path / "new").iterdir())) == 1


OWN = {"lr": 0.1, "betas": (0.9, 0.9), "fused": True, "count": 3, "later": None, "w": torch.ones(2)}


@pytest.mark.parametrize("change", [{"lr": 1}, {"betas": [0.5, 0.5]}, {"count": 10**30}, {"more": 1}])
def test_state_of_the_same_kind_passes(change: dict):
    check_kinds(OWN, {**OWN, **change})
    check_kinds(OWN, {})
    check_kinds({"n": 1}, {})


@pytest.mark.parametrize(
    "change",
    [
        {"lr": None}, {"lr": float("nan")}, {"lr": True}, {"betas": (0.9,)}, {"betas": 0.9}, {"betas": (0.9, "x")},
        {"fused": 1}, {"fused": None}, {"fused": False}, {"later": True},
        {"count": 3.0}, {"count": None}, {"w": torch.ones(3)}, {"w": torch.ones(2).to_sparse()}, {"w": 1},
    ],
)  # fmt: skip
def test_state_of_another_kind_is_refused_with_its_place(change: dict):
    with pytest.raises(ValueError, match=rf"^here\.{next(iter(change))}.* wanted something like"):
        check_kinds(OWN, {**OWN, **change}, "here")
    with pytest.raises(ValueError, match=r"^here\.lr is None"):
        check_kinds(OWN, {"count": 3}, "here")


def test_bare_state_dict_and_safetensors_are_wrapped(tmp_path: Path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": {"epoch": 1}}, tmp_path / "b.pth")
    for name in ("a.pth", "a.safetensors", "b.pth"):
        assert torch.equal(read_checkpoint(tmp_path / name)["model"]["w"], torch.ones(2))


def test_truncated_file_is_named_with_its_size(tmp_path: Path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"model": {"w": torch.randn(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.pth \(2,000 bytes\) is truncated or no checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 100, "refused|truncated or no checkpoint"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_file_that_would_run_code_is_refused_without_running_it(tmp_path: Path, protocol: str):
    content = {"model": {"w": torch.ones(1)}, "trap": Trap(tmp_path / "ran")}
    if protocol == "torch":
        torch.save(content, tmp_path / "a.pth")
    else:
        (tmp_path / "a.pth").write_bytes(pickle.dumps({"trap": Trap(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"is refused.*asks for \w+\.mkdir"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_numpy_scalars_beside_the_weights_are_read(tmp_path: Path):
    """A trainer that keeps its best score writes them."""
    torch.save({"state_dict": {"w": torch.ones(1)}, "meta": {"best": np.float64(0.5)}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["meta"]["best"] == 0.5


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"model": {"w": 3}}, torch.ones(2)])
def test_files_without_weights_are_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_checkpoint(tmp_path / "a.pth")


def test_missing_file_says_which_key_to_check(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="check MODEL.WEIGHTS"):
        read_checkpoint(tmp_path / "none.pth")
