"""The one-call interface, and Detectron2's own predictor and demo logic on our configs."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import mfuser_d2  # noqa: E402
from mfuser_d2.core.checkpoint_file import write_checkpoint  # noqa: E402
from mfuser_d2.d2 import MFuserCheckpointer, load_config  # noqa: E402
from mfuser_d2.predictor import clean_names  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]"),
    *("MODEL.MFUSER.INFERENCE.STRIDE", "[48,48]"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    predictor = mfuser_d2.Predictor(CONFIG, "", opts=SMALL)
    with torch.no_grad():  # masks that differ, so that labels say something
        decoder = predictor.model.sem_seg_head.transformer_decoder
        for layer in (decoder.query_embed, decoder.class_head, decoder.mask_head[-1]):
            layer.weight.normal_(std=1.0)
    MFuserCheckpointer(predictor.model, save_dir=str(folder)).save("model")
    return folder / "model.pth"


@pytest.fixture(scope="module")
def predictor(checkpoint) -> mfuser_d2.Predictor:
    return mfuser_d2.Predictor(CONFIG, checkpoint, opts=SMALL)


def picture(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_labels_are_the_best_scores_of_the_meta_architecture(predictor):
    image = picture(80, 130)
    labels, scores = predictor(image)
    assert labels.shape == (80, 130) and labels.dtype == np.uint8
    assert scores.shape == (19, 80, 130) and scores.dtype == np.float32
    assert len(np.unique(labels)) > 1
    assert np.array_equal(scores.argmax(0), labels)
    with torch.no_grad():
        wanted = predictor.model([{"image": torch.from_numpy(image).permute(2, 0, 1)}])[0]["sem_seg"]
    np.testing.assert_allclose(scores, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert np.mean(predictor.labels(image) != labels) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (20, 9), (130, 3)])
def test_small_images(predictor, size):
    labels, scores = predictor(picture(*size))
    assert labels.shape == size and scores.shape == (19, *size) and np.isfinite(scores).all()
    assert predictor.labels(picture(*size)).shape == size


def test_too_many_scores_are_refused_and_labels_are_not(predictor, monkeypatch):
    import mfuser_d2.predictor as module

    monkeypatch.setattr(module, "MAX_SCORES", 1000)
    with pytest.raises(ValueError, match="Predictor.labels"):
        predictor(picture(70, 70))
    assert predictor.labels(picture(70, 70)).shape == (70, 70)


def test_files_are_read(predictor, tmp_path):
    from PIL import Image

    Image.fromarray(picture(30, 40)).save(tmp_path / "a.png")
    assert np.array_equal(predictor(tmp_path / "a.png").labels, predictor(picture(30, 40)).labels)


@pytest.fixture
def renamed(predictor):
    """The predictor, for tests that change its classes; it has the trained ones again afterwards."""
    trained = predictor.class_names
    yield predictor
    predictor.set_classes(trained)


def test_other_classes_and_back(renamed):
    before, trained = renamed(picture(40, 50)).scores, renamed.class_names
    parents = renamed.set_classes(["tractor", " car ", "road"])
    assert renamed.class_names == ["tractor", "car", "road"]
    assert parents["car"][0] == "car" and parents["car"][1] == pytest.approx(1)
    assert renamed.colors[1:] == [(0, 0, 142), (128, 64, 128)]
    labels, scores = renamed(picture(40, 50))
    assert scores.shape == (3, 40, 50) and labels.max() <= 2
    renamed.set_classes(trained)
    np.testing.assert_allclose(renamed(picture(40, 50)).scores, before, rtol=1e-4, atol=1e-6)


def test_many_classes_need_wider_labels(renamed):
    renamed.set_classes([a + b for a in "abcdefghijklmno" for b in "abcdefghijklmnopqrst"])
    assert renamed.labels(picture(40, 50)).dtype == np.uint16


@pytest.mark.parametrize(
    "names, reason",
    [([], "list is empty"), (["car", " "], "class 2 of 2"), (["car", "road", "Car"], "'Car' occurs twice, .* 1 and 3")],
)
def test_names_are_checked(names, reason):
    with pytest.raises(ValueError, match=reason):
        clean_names(names)


def test_a_wrong_checkpoint_is_refused(tmp_path, checkpoint):
    state = torch.load(checkpoint, weights_only=False)
    state["model"].popitem()
    write_checkpoint(str(tmp_path / "part.pth"), state)
    with pytest.raises(ValueError):
        mfuser_d2.Predictor(CONFIG, tmp_path / "part.pth", opts=SMALL)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        mfuser_d2.Predictor(CONFIG, tmp_path / "none.pth", opts=SMALL)


def test_detectron2s_default_predictor_and_demo_work_unchanged(checkpoint, predictor):
    from detectron2.data import MetadataCatalog
    from detectron2.engine import DefaultPredictor
    from detectron2.utils.video_visualizer import VideoVisualizer
    from detectron2.utils.visualizer import Visualizer

    cfg = load_config(str(CONFIG), [*SMALL, "MODEL.WEIGHTS", str(checkpoint)])
    image = picture(72, 100)
    predictions = DefaultPredictor(cfg)(image[..., ::-1])
    # The same pixels went in: nothing was resized, and BGR was turned into the RGB that the network wants.
    np.testing.assert_allclose(predictions["sem_seg"].numpy(), predictor(image).scores, rtol=1e-4, atol=1e-5)
    labels = predictions["sem_seg"].argmax(dim=0).to("cpu")
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert Visualizer(image, metadata).draw_sem_seg(labels).get_image().shape == (72, 100, 3)
    assert VideoVisualizer(metadata).draw_sem_seg(image, labels).get_image().shape == (72, 100, 3)
