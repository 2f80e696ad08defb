"""Hostile and damaged files: every case ends in success or in one of our own errors, raised by our own code.

Short here; MFUSER_D2_FUZZ=2000 tries that many cases of each kind.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import struct
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, currently_in_test_context, event, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mfuser_d2.core.checkpoint_file import read_checkpoint, write_checkpoint  # noqa: E402
from mfuser_d2.core.encoders.weights import read_encoder_file  # noqa: E402
from mfuser_d2.d2.checkpoint import MFuserCheckpointer  # noqa: E402
from mfuser_d2.d2.config import all_keys, load_config  # noqa: E402
from mfuser_d2.d2.validation import validate_config  # noqa: E402
from mfuser_d2.data.convert import Job, read_palette_ids  # noqa: E402
from mfuser_d2.data.reading import MAX_PIXELS, read_image, read_labels, read_pair, read_size  # noqa: E402
from mfuser_d2.evaluation.label_files import read_label, write_label  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"
CASES = int(os.environ.get("MFUSER_D2_FUZZ", "25"))
OURS = (ValueError, KeyError, FileNotFoundError)
cases = settings(
    max_examples=CASES,
    deadline=10_000,
    derandomize=CASES < 100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(action: Callable[[], object]) -> object:
    """What an action gives, or None after one of our own errors; anything else is raised."""
    try:
        result = action()
    except OURS as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        own = str(ROOT / "mfuser_d2"), str(ROOT / "datasets")
        assert innermost.startswith(own), f"{type(error).__name__} from deep inside, {innermost}: {error}"
        assert len(str(error)) > 20, f"the message says too little: {error}"
        note("refused")
        return None
    note("accepted")
    return result


def note(what: str) -> None:
    """Count it for --hypothesis-show-statistics."""
    if currently_in_test_context():
        event(what)


mutations = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(0, 64)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 200)),
        st.tuples(st.just("end"), st.floats(0, 1), st.none()),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, changes: list[tuple]) -> bytes:
    """A file with bytes flipped, cut out, inserted or zeroed, or with its end missing."""
    data = bytearray(content)
    for kind, place, what in changes:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        if not data:
            break
        if kind == "flip":
            data[at] ^= what
        elif kind == "cut":
            del data[at : at + what]
        elif kind == "insert":
            data[at:at] = what
        elif kind == "zero":
            data[at : at + what] = bytes(len(data[at : at + what]))
        else:
            del data[at:]
    return bytes(data)


# ---- configs

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.integers(-2, 8), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "nan", "[", "!!python/object/apply:os.system ['true']", "${HOME}", "../..", "1e999", "{a: 1"]),
    st.lists(st.one_of(st.integers(-3, 300), st.floats(), st.text(max_size=4)), max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip
KEYS = sorted(key for key in all_keys(load_config()) if not key.startswith(("MODEL.RPN", "MODEL.ROI", "MODEL.RETINA")))

SECTIONS = ("MODEL", "SOLVER", "MFUSER", "DATASETS", "_BASE_")


@cases
@example([("DATASETS.TRAIN", (3,))])
@example([("SOLVER.LOG_PERIOD", None)])
@example([("SEED", 2**40)])
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_config_values(pairs: list[tuple[str, object]]) -> None:
    opts = [part for key, value in pairs for part in (key, value if isinstance(value, str) else repr(value))]
    outcome(lambda: validate_config(load_config(str(CONFIG), opts)))


@cases
@given(mutations)
def test_config_files(tmp_path: Path, changes: list[tuple]) -> None:
    path = tmp_path / "config.yaml"
    text = CONFIG.read_text().replace("../Base-MFuser.yaml", str(ROOT / "configs" / "Base-MFuser.yaml"))
    path.write_bytes(mutated(text.encode(), changes))
    outcome(lambda: validate_config(load_config(str(path))))


@cases
@given(
    st.recursive(VALUES, lambda inner: st.dictionaries(st.sampled_from([*KEYS, "MODEL", "SOLVER", "_BASE_"]), inner))
)
def test_config_trees(tmp_path: Path, tree: object) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    outcome(lambda: validate_config(load_config(str(path))))


def test_config_that_runs_code_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
    assert outcome(lambda: load_config(str(path))) is None
    assert not (tmp_path / "ran").exists()


# ---- checkpoints


def same(left: object, right: object) -> bool:
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture
def model(toy_cfg):
    from detectron2.modeling import build_model

    return build_model(toy_cfg)


@cases
@given(changes=mutations)
def test_checkpoints_load_unaltered_or_not_at_all(tmp_path: Path, model, changes: list[tuple]) -> None:
    path, good = tmp_path / "model_final.pth", tmp_path / "good.pth"
    if not good.exists():
        MFuserCheckpointer(model, str(tmp_path)).save("good", iteration=3)
    expected = read_checkpoint(good)
    path.write_bytes(mutated(good.read_bytes(), changes))
    read = outcome(lambda: read_checkpoint(path))
    assert read is None or same(expected, read), "altered content was accepted"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.head.weight.data.add_(1)
    changed = {key: value.clone() for key, value in model.state_dict().items()}
    outcome(lambda: MFuserCheckpointer(model, str(tmp_path)).load(str(path), []))
    now = dict(model.state_dict())
    assert same(now, before) or same(now, changed), "a part of the file was loaded"
    model.load_state_dict(before)


LEAVES = st.one_of(
    st.none(), st.integers(), st.text(max_size=5), st.builds(lambda n: torch.ones(n), st.integers(0, 3)),
    st.builds(lambda: torch.ones(1).expand(10**9)), st.builds(lambda: torch.ones(2, dtype=torch.complex64)),
)  # fmt: skip
NAMES = st.sampled_from(
    ["model", "state_dict", "encoders", "head.weight", "norm.running_mean", "format", "module.x", ""]
)


@cases
@given(
    content=st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner)))
)
def test_checkpoints_of_any_structure(tmp_path: Path, model, content: object) -> None:
    path = tmp_path / "a.pth"
    torch.save(content, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome(lambda: MFuserCheckpointer(model, str(tmp_path)).load(str(path), []))
    assert same(before, dict(model.state_dict()))


def parts(value: object, path: tuple = ()) -> list[tuple]:
    """The places in nested dicts and lists, the whole first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [path, *(place for key, inner in items for place in parts(inner, (*path, key)))]


def replaced(value: object, path: tuple, by: object) -> object:
    """A copy in which the part at a place is another one."""
    if not path:
        return by
    if isinstance(value, dict):
        return {**value, path[0]: replaced(value[path[0]], path[1:], by)}
    return [replaced(inner, path[1:], by) if index == path[0] else inner for index, inner in enumerate(value)]


SPOILED = st.one_of(
    LEAVES, st.booleans(), st.floats(), st.lists(st.integers(-3, 3), max_size=3),
    st.sampled_from([{}, {"model": 1}, torch.ones(2).to_sparse(), torch.ones(3, 4, 1, 1, device="meta"), 10**30]),
)  # fmt: skip


@cases
@given(place=st.floats(0, 1, exclude_max=True), by=SPOILED)
def test_checkpoints_with_one_part_replaced(toy_cfg, toy_trainer_class, tmp_path: Path, place: float, by: object):
    """Of the whole content, training state included: the run goes on and trains, or refuses the file."""
    good = tmp_path / "good.pth"
    toy_cfg.DATASETS.TEST, toy_cfg.SOLVER.MAX_ITER, toy_cfg.SOLVER.EMA_DECAY = (), 4, 0.5
    toy_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    if not good.exists():
        toy_cfg.OUTPUT_DIR = str(tmp_path / "good")
        toy_trainer_class(toy_cfg).train()
        good.write_bytes((tmp_path / "good" / "model_0000001.pth").read_bytes())
    content = read_checkpoint(good)
    places = parts(content)
    path = places[int(place * len(places))]
    toy_cfg.OUTPUT_DIR = str(tmp_path / "run")
    shutil.rmtree(toy_cfg.OUTPUT_DIR, ignore_errors=True)
    (tmp_path / "run").mkdir()
    torch.save(replaced(content, path, by), tmp_path / "run" / "model_0000001.pth")
    trainer = toy_trainer_class(toy_cfg)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    outcome(lambda: trainer.resume_or_load(resume=True) or True)
    if trainer.checkpointer.resumed_from:
        with contextlib.suppress(FloatingPointError):  # weights that are no numbers are found in the first step
            trainer.train()
    else:
        assert same(before, dict(trainer.model.state_dict())), "a part of the file was loaded"


@cases
@given(kind=st.sampled_from(["safetensors", "legacy", "archive"]), changes=mutations)
def test_encoder_files(tmp_path: Path, kind: str, changes: list[tuple]) -> None:
    good = tmp_path / f"good_{kind}"
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if not good.exists():
        tensors = {"visual.conv1.weight": torch.arange(48.0).view(4, 3, 2, 2), "text.x": torch.ones(3)}
        if kind == "safetensors":
            save_file(tensors, path)
        elif kind == "legacy":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
        else:
            torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
        good.write_bytes(path.read_bytes())
    path.write_bytes(mutated(good.read_bytes(), changes))
    outcome(lambda: read_encoder_file(str(path), source="somewhere"))


# ---- pictures


@cases
@given(suffix=st.sampled_from([".png", ".jpg"]), is_checked=st.booleans(), changes=mutations)
def test_pictures(tmp_path: Path, suffix: str, is_checked: bool, changes: list[tuple]) -> None:
    good, path = tmp_path / f"good{suffix}", tmp_path / f"a{suffix}"
    if not good.exists():
        pixels = np.arange(24 * 31 * 3, dtype=np.uint8).reshape(24, 31, 3)
        Image.fromarray(pixels).save(good)
    content = mutated(good.read_bytes(), changes)
    path.write_bytes(png_with_checksums(content) if is_checked and suffix == ".png" else content)
    image = outcome(lambda: read_image(path))
    assert image is None or (image.ndim == 3 and image.shape[0] * image.shape[1] <= MAX_PIXELS)
    outcome(lambda: read_size(path))


@cases
@given(mode=st.sampled_from(["L", "P", "I;16"]), is_checked=st.booleans(), changes=mutations)
def test_label_files(tmp_path: Path, mode: str, is_checked: bool, changes: list[tuple]) -> None:
    good, path = tmp_path / f"good_{mode[0]}.png", tmp_path / "a.png"
    if not good.exists():
        labels = (np.arange(24 * 31) % 19).reshape(24, 31)
        if mode == "I;16":
            Image.fromarray(labels.astype(np.uint16)).save(good)
        else:
            write_label(good, labels, [(i, i, i) for i in range(19)] if mode == "P" else None)
    content = mutated(good.read_bytes(), changes)
    path.write_bytes(png_with_checksums(content) if is_checked else content)
    for read in (read_labels, read_label, read_palette_ids):
        labels = outcome(lambda read=read: read(path))
        assert labels is None or labels.ndim == 2
    outcome(lambda: read_pair(path, path))


def png_with_checksums(content: bytes) -> bytes:
    """A PNG whose checksums fit again, so that the damage reaches the decoder."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


@pytest.mark.parametrize("read", [read_image, read_labels, read_label, read_size, read_palette_ids])
@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_picture_past_the_limit_is_refused_before_it_is_decoded(tmp_path: Path, read: Callable, size: tuple[int, int]):
    """A bomb: some hundred bytes that say they are gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match="is not decoded|cannot be"):
        read(path)


# ---- polygons


@pytest.fixture(scope="module")
def cityscapes() -> ModuleType:
    pytest.importorskip("cityscapesscripts", reason="the publisher's own code draws the polygons")
    spec = importlib.util.spec_from_file_location("prepare_cityscapes", ROOT / "datasets" / "prepare_cityscapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


POINTS = st.lists(st.lists(st.one_of(st.integers(-50, 200), st.floats(), st.text(max_size=2)), max_size=3), max_size=4)
OBJECTS = st.fixed_dictionaries(
    {}, optional={"label": st.sampled_from(["car", "cargroup", "sky", "nonsense", "", "polegroup", 3, None]),
                  "polygon": st.one_of(POINTS, st.none(), st.text(max_size=3)), "deleted": st.integers(0, 1)},
)  # fmt: skip
SIZES = st.sampled_from([8, 31, 0, -4, 10**9, 2**70, "8", None, 2.5])


@cases
@example(height=0, width=10**9, objects=[])
@given(height=SIZES, width=SIZES, objects=st.one_of(st.lists(OBJECTS, max_size=3), st.integers()))
def test_polygon_files(cityscapes: ModuleType, tmp_path: Path, height: object, width: object, objects: object) -> None:
    path = tmp_path / "a_gtFine_polygons.json"
    path.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects}))
    labels = outcome(lambda: cityscapes.draw_polygons(Job(path, path, path)))
    assert labels is None or (labels.ndim == 2 and set(np.unique(labels)) <= {*range(19), 255})


@cases
@given(changes=mutations)
def test_polygon_texts(cityscapes: ModuleType, tmp_path: Path, changes: list[tuple]) -> None:
    path = tmp_path / "a_gtFine_polygons.json"
    square = [[1, 1], [20, 1], [20, 20]]
    objects = [{"label": "car", "polygon": square}, {"label": "sky", "polygon": square, "deleted": 0}]
    text = json.dumps({"imgHeight": 24, "imgWidth": 31, "objects": objects})
    path.write_bytes(mutated(text.encode(), changes))
    labels = outcome(lambda: cityscapes.draw_polygons(Job(path, path, path)))
    assert labels is None or labels.ndim == 2


def test_deeply_nested_polygon_file_is_refused(cityscapes: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a_gtFine_polygons.json"
    path.write_text("[" * 100_000)
    assert outcome(lambda: cityscapes.draw_polygons(Job(path, path, path))) is None


def test_compressed_bomb_is_no_checkpoint(tmp_path: Path) -> None:
    import zipfile

    write_checkpoint(tmp_path / "good.pth", {"model": {"w": torch.zeros(10**6)}})
    with zipfile.ZipFile(tmp_path / "good.pth") as source:
        with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="never compresses"):
        read_checkpoint(tmp_path / "a.pth")
