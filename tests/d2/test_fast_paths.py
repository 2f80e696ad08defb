"""What inference does to be fast changes nothing but the rounding, on the quickstart's network."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="the network is built from a Detectron2 config")

from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.core.inference import class_scores, resize_scores, window_offsets  # noqa: E402
from mfuser_d2.core.ops import cpu_attention, deformable_attention  # noqa: E402
from mfuser_d2.core.segmenter import Segmenter  # noqa: E402
from mfuser_d2.d2 import load_config  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"


def build(precision: str) -> Segmenter:
    torch.manual_seed(0)
    return build_model(load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "MODEL.MFUSER.PRECISION", precision])).eval()


def plain_scores(model: Segmenter, image: torch.Tensor) -> torch.Tensor:
    """One window after the other, texts encoded for each, every layer's prediction, nothing folded: with gradients."""
    (crop_height, crop_width), stride = model.inference.crop_size, model.inference.stride
    pixels = model.normalize(image)
    total, count = 0.0, torch.zeros(image.shape[-2:])
    for top in window_offsets(image.shape[-2], crop_height, stride[0]):
        for left in window_offsets(image.shape[-1], crop_width, stride[1]):
            place = (..., slice(top, top + crop_height), slice(left, left + crop_width))
            with torch.enable_grad():
                output = model.sem_seg_head(model.backbone(pixels[place][None]))
            scores = torch.zeros(model.criterion.num_classes, *image.shape[-2:])
            window = class_scores(output.class_logits[-1], output.mask_logits[-1])
            scores[place] = resize_scores(window, (crop_height, crop_width))[0].detach()
            total, count[place] = total + scores, count[place] + 1
    return total / count


def test_float32_scores_are_those_of_the_plain_path() -> None:
    model = build("float32")
    image = torch.randint(0, 256, (3, 128, 220), dtype=torch.uint8)
    plain = plain_scores(model, image)
    fast = model.predict([image])[0]
    assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_bfloat16_takes_the_fast_paths_and_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for module, name in ((cpu_attention, "attend_by_head"), (deformable_attention, "_look_up")):
        plain = getattr(module, name)

        def counted(*args, name=name, plain=plain, **kwargs):
            taken.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    exact, rounded = (build(precision).predict([image])[0] for precision in ("float32", "bfloat16"))
    # Both encoders' blocks attend in bfloat16; both networks sample in each of the pixel decoder's two layers.
    assert taken.count("attend_by_head") >= 8 and taken.count("_look_up") == 4
    error = (exact - rounded).abs().max() / exact.abs().max()
    assert error <= 0.03
    assert (exact.argmax(0) == rounded.argmax(0)).float().mean() >= 0.99
