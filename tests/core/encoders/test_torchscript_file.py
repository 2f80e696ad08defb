"""TorchScript archives give their tensors, and run nothing."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mfuser_d2.core.encoders.torchscript_file import is_torchscript, read_torchscript
from mfuser_d2.core.encoders.weights import read_encoder_file


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.register_buffer("ids", torch.arange(5).view(1, 5).t())
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float16))
        self.sizes = [1, 2]
        self.mask = torch.ones(2)  # no buffer: not in a state dict

    def forward(self, x):
        return self.layers(x) * self.scale


@pytest.mark.parametrize("is_traced", [False, True])
def test_tensors_are_those_of_torch_jit_load(tmp_path: Path, is_traced: bool):
    block = Block().eval()
    made = torch.jit.trace(block, torch.ones(2, 3)) if is_traced else torch.jit.script(block)
    made.save(str(tmp_path / "a.pt"))
    expected = torch.jit.load(tmp_path / "a.pt").state_dict()
    got = read_torchscript(tmp_path / "a.pt")
    assert is_torchscript(tmp_path / "a.pt") and set(got) == set(expected)
    assert all(torch.equal(got[key], value) and got[key].dtype == value.dtype for key, value in expected.items())


class Writer(nn.Module):
    """Writes a file where torch.jit.load reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save("ran", "ran.txt")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x):
        return x


def test_archive_that_brings_code_is_refused_and_none_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writer()).save("a.pt")
    with pytest.raises(ValueError, match="a.pt is refused: .*__setstate__"):
        read_encoder_file("a.pt", source="somewhere")
    assert not os.path.exists("ran.txt")
    torch.jit.load("a.pt")
    assert os.path.exists("ran.txt")


def test_archive_that_asks_for_a_function_is_refused_by_its_name(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Trap(), 2))
        archive.writestr("a/constants.pkl", b"")
    with pytest.raises(ValueError, match="a.pt is refused: .*posix.mkdir"):
        read_encoder_file(str(tmp_path / "a.pt"), source="somewhere")
    assert not (tmp_path / "ran").exists()
