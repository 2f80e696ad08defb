"""Several processes compute what one would, start in two ways, and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mfuser_d2.d2.processes import SharedBatchNorm, synchronise_batch_norm  # noqa: E402
from mfuser_d2.data.prepare import Report  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PORT = 29400 + os.getpid() % 2000


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_streets(root / "streets", report=Report(jobs=1), num_train=7, num_val=4, size=(64, 72))
    return root


def environment(data_root: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "DETECTRON2_DATASETS": str(data_root), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@pytest.fixture(scope="module")
def computed(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two and three processes computed."""
    folder = tmp_path_factory.mktemp("computed")
    worker = Path(__file__).with_name("process_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        capture_output=True, text=True, timeout=400, env=environment(data_root),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to the largest entry of each; tensors that are rounding noise alone are left out."""
    assert list(left) == list(right) and len(left) > 3
    top = max(value.abs().max().item() for value in left.values())
    relative = [
        ((left[name] - right[name]).abs().max() / left[name].abs().max()).item()
        for name in left
        if left[name].abs().max() > 1e-7 * top
    ]
    return max(relative)


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Of all tensors taken as one long vector."""
    difference = torch.stack([(left[name] - right[name]).norm() for name in left]).norm()
    return (difference / torch.stack([value.norm() for value in left.values()]).norm()).item()


@pytest.mark.parametrize(("case", "bound"), [("float64_softmax", 1e-9), ("float32_sigmoid", 1e-4)])
def test_two_processes_with_half_the_batch_have_the_gradients_of_one(computed: Path, case: str, bound: float):
    one, first, second = (torch.load(computed / f"{case}_{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for data in (first, second):
        assert relative_difference(one["gradients"], data["gradients"]) < 1e-6
        assert largest_difference(one["gradients"], data["gradients"]) < bound
        for name, value in one["statistics"].items():
            torch.testing.assert_close(data["statistics"][name], value, rtol=1e-5, atol=1e-7)
    for name, value in one["losses"].items():
        mean = (first["losses"][name] + second["losses"][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(first["losses"][name], second["losses"][name])


def test_evaluation_counts_are_the_same_for_one_two_and_three_processes(computed: Path):
    read = [json.loads(path.read_text()) for path in sorted(computed.glob("evaluated_by_*/inference/*/confusion.json"))]
    assert len(read) == 3 and read[0]["num_images"] == 4
    assert np.array(read[0]["counts"]).sum() > 0
    assert read[0] == read[1] == read[2]
    lines = [path.read_text() for path in sorted(computed.glob("evaluated_by_*/inference/*/images.jsonl"))]
    assert len(lines) == 3 and lines[0] == lines[1] == lines[2]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_different_images_in_one_order_also_when_resuming(computed: Path, world: int):
    alone = torch.load(computed / "draws_1_0.pt")
    parts = [torch.load(computed / f"draws_{world}_{rank}.pt") for rank in range(world)]
    for start in (0, 2):
        for step, whole in enumerate(alone[start]):
            shares = [part[start][step] for part in parts]
            assert [item for items in zip(*shares) for item in items] == whole
    assert alone[2] == alone[0][2:]


def test_batch_norm_keeps_names_values_and_what_is_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)))
    model[1][0].running_mean.fill_(2.0)
    model[1][0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = synchronise_batch_norm(model).state_dict()
    assert isinstance(model[1][0], SharedBatchNorm) and not model[1][0].weight.requires_grad
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


TRAIN = [
    "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.LOG_PERIOD", "1",
    "INPUT.CROP.SIZE", "[64,64]", "MODEL.MFUSER.IMAGE_SIZE", "[64,64]", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]",
    "MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "64",
    "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.MFUSER.RCS_MIN_PIXELS", "20",
    "TEST.MFUSER.CONFUSION_PICTURE", "False", "DATASETS.TEST", "()",
]  # fmt: skip
PROGRAM = [str(ROOT / "tools" / "train_net.py"), "--config-file"]
CONFIG = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_clip.yaml")
LAUNCH = [sys.executable, *PROGRAM, CONFIG, "--resume", "--num-gpus", "2", "--dist-url", f"tcp://127.0.0.1:{PORT}"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(PORT + 1),
    *PROGRAM, CONFIG, "--resume",
]  # fmt: skip
COMMANDS = {"launch": LAUNCH, "torchrun": TORCHRUN}


def start(command: list[str], output: Path, data_root: Path, *opts: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *TRAIN, *opts, "OUTPUT_DIR", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(data_root), cwd=ROOT,
    )  # fmt: skip


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Children that run the program, in the order they were started."""
    found = []
    for line in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{line}/cmdline").read_bytes():
            found.append(int(line))
    return found


def test_torchrun_and_launch_train_the_same_weights_and_save_on_a_signal(data_root: Path, tmp_path: Path):
    endless = ("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINTS_KEPT", "1000")
    runs = {name: start(command, tmp_path / name, data_root, *endless) for name, command in COMMANDS.items()}
    for name, run in runs.items():
        wait_until((tmp_path / name / "model_0000001.pth").exists, run)
    for run in runs.values():
        run.send_signal(signal.SIGTERM)
    for name, run in runs.items():
        text, _ = run.communicate(timeout=150)
        assert run.returncode == 143 if name == "launch" else run.returncode != 0, text[-3000:]
        last = (tmp_path / name / "last_checkpoint").read_text()
        assert f"{last} has everything" in text, text[-3000:]
        rows = [json.loads(line)["iteration"] for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        assert rows == list(range(len(rows))) and last == f"model_{rows[-1]:07d}.pth"
    states = [torch.load(tmp_path / name / "model_0000001.pth")["model"] for name in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes by /proc")
def test_when_one_process_dies_the_others_end_with_its_reason_and_resume(data_root: Path, tmp_path: Path):
    run = start(LAUNCH, tmp_path, data_root, "SOLVER.MAX_ITER", "100000")
    wait_until(lambda: (tmp_path / "last_checkpoint").exists(), run)
    victim = children(run.pid)[1]
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    text, _ = run.communicate(timeout=100)
    assert time.monotonic() - begin < 60
    assert run.returncode == 128 + signal.SIGKILL, text[-3000:]
    assert "error: process 1 of this machine was ended by SIGKILL" in text
    assert "another process of this run was gone" in text and "Traceback" not in text
