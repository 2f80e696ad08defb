import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import mfuser_d2  # noqa: E402
from mfuser_d2.d2.config import all_keys, load_config  # noqa: E402
from mfuser_d2.d2.validation import validate_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINED_ON = ("gta5", "synthia", "cityscapes")


def set_key(cfg, key: str, value) -> None:
    node = cfg
    for name in key.split(".")[:-1]:
        node = node[name]
    node[key.split(".")[-1]] = value


def test_package_function_declares_the_keys():
    from detectron2.config import get_cfg

    cfg = get_cfg()
    mfuser_d2.add_mfuser_config(cfg)
    assert cfg.MODEL.MFUSER.ADAPTER.NAME == "mvfuser"
    assert cfg.MODEL.SEM_SEG_HEAD.NAME == "MFuserHead"


def test_every_key_of_ours_has_its_meaning_above_it():
    lines = (ROOT / "mfuser_d2" / "d2" / "config.py").read_text().splitlines()
    inherited = {"META_ARCHITECTURE", "NAME", "PIXEL_MEAN", "PIXEL_STD", "BASE_LR", "MAX_ITER", "WARMUP_ITERS"}
    previous = ""
    for line in lines:
        match = re.match(r"    (node|cfg)\.([A-Z_.]+) = (?!CfgNode\(\)$)", line)
        name = match.group(2).split(".")[-1] if match else ""
        if match and name not in inherited:
            assert previous.strip().startswith("#"), line
        previous = line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_file_is_valid(path: Path):
    cfg = load_config(str(path))
    validate_config(cfg)
    assert cfg.is_frozen()
    assert cfg.MODEL.META_ARCHITECTURE == "MFuser"


def test_key_without_a_value_is_named(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("SOLVER:\n  MAX_ITER:\n  BASE_LR: 0.1\n")
    with pytest.raises(ValueError, match="a.yaml: no value for SOLVER.MAX_ITER; give one"):
        load_config(str(tmp_path / "a.yaml"))
    with pytest.raises(ValueError, match="no value for MODEL.MFUSER.ADAPTER.NAME"):
        load_config("", ["MODEL.MFUSER.ADAPTER.NAME", "None", "MODEL.MFUSER.VFM.KWARGS.depth", "None"])


def test_seed_that_numpy_does_not_take_is_refused():
    with pytest.raises(ValueError, match="SEED=4294967296 has to be below 2"):
        validate_config(load_config(str(CONFIGS[0]), ["SEED", str(2**32)]))


@pytest.mark.parametrize("value", ["['64', 64]", "[None]", "[[64], 64]", "[True, 64]"])
def test_list_of_numbers_with_something_else_in_it_is_named(value: str):
    with pytest.raises(ValueError, match=r"MODEL.MFUSER.IMAGE_SIZE=\[.* has to be numbers, such as \[512, 512\]"):
        load_config("", ["MODEL.MFUSER.IMAGE_SIZE", value])


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path):
    """A kilobyte that says it holds a thousand million entries."""
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 30))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="aliases .* more than 100,000 entries"):
        load_config(str(tmp_path / "a.yaml"))


def test_recorded_config_reads_again(tmp_path: Path):
    cfg = load_config(str(CONFIGS[-1]), ["MODEL.MFUSER.VFM.KWARGS.depth", "3", "SOLVER.BASE_LR", "2e-4"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert again.MODEL.MFUSER.VFM.KWARGS.depth == 3 and again.SOLVER.BASE_LR == 2e-4


def test_children_are_short():
    for path in CONFIGS:
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        if path.parent.name in TRAINED_ON:
            assert len(lines) <= 11, path  # _BASE_ and ten differing lines


@pytest.mark.parametrize("source", TRAINED_ON)
@pytest.mark.parametrize("vlm", ["clip", "eva02", "siglip"])
def test_setting_of_the_release(source: str, vlm: str):
    cfg = load_config(str(ROOT / "configs" / source / f"mfuser_{vlm}.yaml"))
    expected = {
        "clip": ("ViT-L-14-336-quickgelu", 16, 5, True, 1e-4, "norms", 0.07),
        "eva02": ("EVA02-L-14-336", 0, 8, False, 1e-5, "norms_embeddings", 0.07),
        "siglip": ("ViT-L-16-SigLIP-384", 16, 5, False, 1e-5, "norms_embeddings", 0.0),
    }[vlm]
    node = cfg.MODEL.MFUSER
    assert expected == (
        node.VLM.NAME, node.PATCH_SIZE, node.PROMPT_LENGTH, node.ADAPTER.PROJECT_VFM, cfg.SOLVER.WEIGHT_DECAY,
        cfg.SOLVER.NO_DECAY, node.ALIGN_LOSS.TEMPERATURE,
    )  # fmt: skip
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (2, 20000, 1e-4)
    assert (list(node.INFERENCE.CROP_SIZE), list(node.INFERENCE.STRIDE)) == ([512, 512], [341, 341])
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED and not cfg.SOLVER.AMP.ENABLED
    assert all(name.startswith(source) for name in cfg.DATASETS.TRAIN)
    assert not any(name.startswith(source) for name in cfg.DATASETS.TEST) and len(cfg.DATASETS.TEST) >= 2


def test_unknown_key_names_similar_ones():
    with pytest.raises(KeyError, match="MODEL.MFUSER.PROMPT_LENGHT; did you mean MODEL.MFUSER.PROMPT_LENGTH"):
        load_config("", ["MODEL.MFUSER.PROMPT_LENGHT", "3"])


def test_odd_number_of_options_is_refused():
    with pytest.raises(ValueError, match="pairs KEY VALUE"):
        load_config("", ["SOLVER.MAX_ITER"])


def test_flag_behind_the_options_is_refused():
    with pytest.raises(ValueError, match="--resume came after the KEY VALUE pairs"):
        load_config("", ["SOLVER.MAX_ITER", "3", "--resume"])


def test_wrong_type_is_refused():
    with pytest.raises(ValueError, match="MAX_ITER|Type mismatch"):
        load_config("", ["SOLVER.MAX_ITER", "many"])


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


def test_yaml_that_would_run_code_is_refused(tmp_path: Path):
    trap = tmp_path / "ran"
    path = tmp_path / "bad.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{trap}"]\n')
    with pytest.raises(ValueError, match="bad.yaml"):
        load_config(str(path))
    assert not trap.exists()


def test_kwargs_of_encoders_are_free():
    cfg = load_config("", ["MODEL.MFUSER.VFM.KWARGS.depth", "3"])
    assert dict(cfg.MODEL.MFUSER.VFM.KWARGS) == {"depth": 3}


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("MODEL.MFUSER.ADAPTER.NAME", "mamba", KeyError, "choose from .*mvfuser"),
        ("MODEL.MFUSER.PRECISION", "float8", KeyError, "bfloat16"),
        ("MODEL.MFUSER.ALIGN_LOSS.KIND", "none", KeyError, "sigmoid"),
        ("MODEL.MFUSER.INFERENCE.MODE", "tiles", KeyError, "slide"),
        ("MODEL.MFUSER.RESAMPLE", "nearest", KeyError, "bilinear"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", KeyError, "WarmupPolyLR"),
        ("SOLVER.NO_DECAY", "all", KeyError, "norms"),
        ("INPUT.FORMAT", "BGR", KeyError, "RGB"),
        ("MODEL.MFUSER.INFERENCE.STRIDE", [600, 341], ValueError, r"STRIDE=\[600, 341\] is larger than CROP_SIZE"),
        ("MODEL.MFUSER.INFERENCE.CROP_SIZE", [512], ValueError, r"CROP_SIZE=\[512\].*\[height, width\]"),
        ("INPUT.CROP.SIZE", [256, 512], ValueError, r"INPUT.CROP.SIZE=\[256, 512\] is smaller than .*CROP_SIZE"),
        ("MODEL.MFUSER.PATCH_SIZE", 300, ValueError, "smaller than two patches of MODEL.MFUSER.PATCH_SIZE=300"),
        ("MODEL.MFUSER.TAP_LAYERS", [1, 2, 3], ValueError, "four ascending"),
        ("MODEL.MFUSER.TAP_LAYERS", [3, 2, 1, 0], ValueError, "four ascending"),
        ("MODEL.MFUSER.MT_ENHANCER.NUM_HEADS", 7, ValueError, "WIDTH=256 has to be a multiple of .*NUM_HEADS=7"),
        ("MODEL.SEM_SEG_HEAD.NUM_HEADS", 0, ValueError, "HIDDEN_DIM=256 has to be a multiple"),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 16, ValueError, "has 19 classes; set it to that"),
        ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 19, ValueError, "ignores 255"),
        ("MODEL.SEM_SEG_HEAD.IMPORTANCE_SAMPLE_RATIO", 1.5, ValueError, "outside 0..1"),
        ("MODEL.MFUSER.ADAPTER.DROPOUT", 1.0, ValueError, "ADAPTER.DROPOUT=1.0"),
        ("SOLVER.WARMUP_ITERS", 30000, ValueError, "end during its warm-up"),
        ("SOLVER.BASE_LR", 0.0, ValueError, "BASE_LR=0.0"),
        ("SOLVER.IMS_PER_BATCH", 0, ValueError, "IMS_PER_BATCH=0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, ValueError, "CHECKPOINT_PERIOD=0"),
        ("DATASETS.TEST", ("cityscape_fine_sem_seg_val",), KeyError, "did you mean.*cityscapes_fine_sem_seg_val"),
        ("DATASETS.TRAIN", ("coco_2017_train",), ValueError, "coco_2017_train has no stuff_classes"),
    ],
)
def test_contradiction_is_refused(key: str, value, error: type[Exception], message: str):
    import mfuser_d2.data  # noqa: F401  (the data sets' names)

    cfg = load_config(str(ROOT / "configs" / "Base-MFuser.yaml"))
    cfg.defrost()
    assert key in all_keys(cfg)
    set_key(cfg, key, value)
    with pytest.raises(error, match=message):
        validate_config(cfg)


def test_batch_that_cannot_be_split_over_processes_is_refused(monkeypatch: pytest.MonkeyPatch):
    from detectron2.utils import comm

    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="cannot be split evenly over 3 processes"):
        validate_config(load_config(str(ROOT / "configs" / "Base-MFuser.yaml")))


def test_device_becomes_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level("WARNING", logger="mfuser_d2.d2.config"):
        assert load_config().MODEL.DEVICE == "cpu"
    assert "becomes cpu" in caplog.text
