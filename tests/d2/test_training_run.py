"""Training, resuming and evaluating each variant through the real data, model and program; tiny, random, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402

from mfuser_d2.d2 import MFuserCheckpointer, MFuserTrainer, load_config  # noqa: E402
from mfuser_d2.data.prepare import Report  # noqa: E402
from mfuser_d2.data.streets.writer import write_streets
from mfuser_d2.evaluation import file_sha256  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("clip", "eva02", "siglip")
TINY = [
    "INPUT.CROP.SIZE", "[64,64]", "MODEL.MFUSER.IMAGE_SIZE", "[64,64]", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]",
    "MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]", "MODEL.SEM_SEG_HEAD.HIDDEN_DIM", "32",
    "MODEL.SEM_SEG_HEAD.MASK_DIM", "32", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "64",
    "MODEL.SEM_SEG_HEAD.ENC_LAYERS", "1", "MODEL.SEM_SEG_HEAD.DEC_LAYERS", "2", "DATALOADER.NUM_WORKERS", "0",
    "DATALOADER.MFUSER.RCS_MIN_PIXELS", "20", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3",
    "SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.MFUSER.CONFUSION_PICTURE", "False",
    "DATASETS.TEST", "('streets_sem_seg_val', 'streets_fog_sem_seg_val')",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets with small streets."""
    root = tmp_path_factory.mktemp("datasets")
    write_streets(root / "streets", report=Report(jobs=1), num_train=3, num_val=1, size=(64, 72))
    return root


@pytest.fixture
def streets(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root))
    return data_root


def configured(variant: str, output: Path, *opts: str):
    path = ROOT / "configs" / "quickstart" / f"mfuser_tiny_{variant}.yaml"
    return load_config(str(path), [*TINY, "OUTPUT_DIR", str(output), *opts])


def train(cfg, *, resume: bool = False) -> MFuserTrainer:
    torch.manual_seed(cfg.SEED)
    trainer = MFuserTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def assert_equal_states(expected: torch.nn.Module, got: torch.nn.Module) -> None:
    state = got.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_saves_evaluates_and_gives_the_same_table_again(variant: str, streets: Path, tmp_path: Path):
    cfg = configured(variant, tmp_path / "run")
    start = {name: p.clone() for name, p in MFuserTrainer.build_model(cfg).named_parameters() if not p.requires_grad}
    assert len(start) > 100
    trainer = train(cfg)
    table = json.loads((tmp_path / "run" / "inference" / "results.json").read_text())
    assert list(table["results"]) == list(cfg.DATASETS.TEST) and table["sources"] == ["streets_sem_seg_val"]
    for name in cfg.DATASETS.TEST:
        assert (tmp_path / "run" / "inference" / name / "confusion.json").is_file()
    assert table["protocol"]["weights"]["sha256"] == file_sha256(tmp_path / "run" / "model_final.pth") is not None

    torch.manual_seed(12345)  # other random encoders: those of the checkpoint must come back
    again = configured(variant, tmp_path / "again")
    model = MFuserTrainer.build_model(again)
    MFuserCheckpointer(model, again.OUTPUT_DIR).load(str(tmp_path / "run" / "model_final.pth"), [])
    assert_equal_states(trainer.model, model)
    results = MFuserTrainer.test(again, model)
    for name in cfg.DATASETS.TEST:
        assert results[name]["sem_seg"]["mIoU"] == table["results"][name]["mIoU"]


def test_run_cut_off_and_resumed_ends_bit_equal(streets: Path, tmp_path: Path):
    opts = ("DATASETS.TEST", "()")
    whole = train(configured("clip", tmp_path / "whole", *opts))
    cfg = configured("clip", tmp_path / "cut", *opts)
    torch.manual_seed(cfg.SEED)
    cut = MFuserTrainer(cfg)
    step = cut.run_step

    def cut_step() -> None:
        if cut.iter == 2:
            raise KeyboardInterrupt
        step()

    cut.run_step = cut_step
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    assert_equal_states(whole.model, resumed.model)


def test_frozen_encoders_do_not_move_and_everything_trained_does(streets: Path, tmp_path: Path):
    cfg = configured("eva02", tmp_path, "DATASETS.TEST", "()", "SOLVER.WARMUP_ITERS", "0")
    torch.manual_seed(cfg.SEED)
    trainer = MFuserTrainer(cfg)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) is not parameter.requires_grad, name


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_and_evaluates(precision: str, streets: Path, tmp_path: Path):
    test = ("DATASETS.TEST", "('streets_night_sem_seg_val',)", "MODEL.MFUSER.PRECISION", precision)
    trainer = train(configured("siglip", tmp_path, *test))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert json.loads((tmp_path / "inference" / "results.json").read_text())["protocol"]["precision"] == precision


def run_program(*args: str, data_root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), *args],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(data_root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_program_ends_with_one_line_for_a_config_that_contradicts_itself(data_root: Path):
    config = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_clip.yaml")
    done = run_program("--config-file", config, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7", data_root=data_root)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert "error: MODEL.SEM_SEG_HEAD.NUM_CLASSES=7, but streets_sem_seg_train" in done.stderr


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_program_misses_a_target_before_it_computes(flags: list[str], data_root: Path, tmp_path: Path):
    config = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_clip.yaml")
    opts = ["DATASETS.TEST", "('streets_sem_seg_val', 'acdc_fog_sem_seg_val')", "OUTPUT_DIR", str(tmp_path)]
    done = run_program("--config-file", config, *flags, *opts, data_root=data_root)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert "prepare_acdc.py" in done.stderr and "leave acdc_fog_sem_seg_val out of DATASETS.TEST" in done.stderr


def test_program_names_a_truncated_checkpoint(data_root: Path, tmp_path: Path):
    bad = tmp_path / "model_final.pth"
    torch.save({"model": {"w": torch.randn(5000)}}, bad)
    bad.write_bytes(bad.read_bytes()[:3000])
    config = str(ROOT / "configs" / "quickstart" / "mfuser_tiny_clip.yaml")
    opts = ["MODEL.WEIGHTS", str(bad), "OUTPUT_DIR", str(tmp_path / "run")]
    done = run_program("--config-file", config, "--eval-only", *opts, data_root=data_root)
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert f"error: {bad} (3,000 bytes) is truncated or no checkpoint" in done.stderr
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()
