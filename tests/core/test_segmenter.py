"""Images and labels to losses, images to scores: padding, sizes, windows, refusals."""

import pytest
import torch
from torch import nn

from mfuser_d2.core.criterion import Criterion
from mfuser_d2.core.inference import InferenceSettings
from mfuser_d2.core.segmenter import Segmenter, pad_to_common
from mfuser_d2.core.text_query_head import HeadOutput

CLASSES, IGNORE = 2, 255


class ToyHead(nn.Module):
    """Class 0 wherever the image is bright, class 1 elsewhere, at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(4.0))

    def forward(self, features: dict[str, torch.Tensor], *, last_only: bool = False) -> HeadOutput:
        bright = nn.functional.avg_pool2d(features["image"].mean(dim=1, keepdim=True), 2) * self.gain
        masks = torch.cat([bright, -bright], dim=1)[None]  # (1, N, K, h, w)
        classes = torch.eye(CLASSES, CLASSES + 1).mul(9).expand(1, len(bright), -1, -1)
        return HeadOutput(classes, masks, masks[0])


class ToyBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(tuple(images.shape))
        return {"image": images}


def segmenter(**options) -> Segmenter:
    settings = InferenceSettings(**{"crop_size": (8, 8), "stride": (6, 6), **options.pop("inference", {})})
    return Segmenter(
        backbone=ToyBackbone(),
        sem_seg_head=ToyHead(),
        criterion=Criterion(num_classes=CLASSES, num_points=16, ignore_label=IGNORE),
        pixel_mean=(100.0, 110.0, 120.0),
        pixel_std=(50.0, 60.0, 70.0),
        crop_size=(8, 8),
        inference=settings,
        **options,
    )


def image(height: int, width: int) -> torch.Tensor:
    """Bright left half."""
    pixels = torch.full((3, height, width), 20, dtype=torch.uint8)
    pixels[:, :, : width // 2] = 220
    return pixels


def label(height: int, width: int) -> torch.Tensor:
    classes = torch.ones(height, width, dtype=torch.long)
    classes[:, : width // 2] = 0
    return classes


def test_normalisation():
    pixel = segmenter().normalize(torch.tensor([150, 50, 190], dtype=torch.uint8).view(3, 1, 1))
    torch.testing.assert_close(pixel.flatten(), torch.tensor([1.0, -1.0, 1.0]))


def test_padding_is_mean_colour_and_ignored():
    model = segmenter()
    small, large = (6, 4), (10, 12)
    losses = model.losses([image(*small), image(*large)], [label(*small), label(*large)])
    assert model.backbone.seen == [(2, 3, 10, 12)]
    assert all(value.isfinite() for value in losses.values())
    padded = pad_to_common([model.normalize(image(*small)), model.normalize(image(*large))], at_least=(8, 8), value=0.0)
    assert padded[0, :, 6:].eq(0).all() and padded[0, :, :, 4:].eq(0).all() and padded[1].ne(0).all()


def test_small_images_are_padded_to_the_crop():
    model = segmenter()
    model.losses([image(4, 4)], [label(4, 4)])
    assert model.backbone.seen == [(1, 3, 8, 8)]


def test_losses_fall_along_their_gradient():
    model = segmenter()
    with torch.no_grad():
        model.sem_seg_head.gain.fill_(0.1)
    batch = ([image(8, 8)], [label(8, 8)])
    optimizer, totals = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(5):
        total = sum(model.losses(*batch).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


def test_batch_without_any_label():
    losses = segmenter().losses([image(8, 8)], [torch.full((8, 8), IGNORE)])
    assert losses["loss_mask"] == losses["loss_dice"] == losses["loss_align"] == 0


def test_label_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"image 1 of the batch is \(8, 8\), its label \(8, 6\)"):
        segmenter().losses([image(8, 8), image(8, 8)], [label(8, 8), label(8, 6)])


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("size", [(8, 8), (9, 21), (6, 14)])
def test_prediction_at_the_images_size(mode, size):
    (scores,) = segmenter(inference={"mode": mode}).predict([image(*size)])
    assert scores.shape == (CLASSES, *size) and scores.dtype is torch.float32
    wanted, middle = label(*size), size[1] // 2
    far = [c for c in range(size[1]) if abs(c - middle) > 2]
    assert torch.equal(scores.argmax(0)[:, far], wanted[:, far])


def test_images_of_one_size_go_together_and_results_keep_their_order():
    model = segmenter(inference={"mode": "whole"})
    images = [image(8, 8), image(8, 8), image(8, 12), image(8, 8)]
    scores = model.predict(images, [(8, 8), (4, 4), (3, 5), (16, 16)])
    assert model.backbone.seen == [(2, 3, 8, 8), (1, 3, 8, 12), (1, 3, 8, 8)]
    assert [tuple(s.shape[1:]) for s in scores] == [(8, 8), (4, 4), (3, 5), (16, 16)]
    assert torch.equal(scores[0], model.predict([images[0]])[0])


def test_softmax_at_the_end_is_a_choice():
    plain = segmenter().predict([image(8, 8)])[0]
    soft = segmenter(inference={"final_softmax": True}).predict([image(8, 8)])[0]
    torch.testing.assert_close(soft, plain.softmax(0))


def test_prediction_leaves_no_graph():
    assert not segmenter().predict([image(8, 8)])[0].requires_grad


def test_unknown_precision_lists_the_known():
    with pytest.raises(KeyError, match="PRECISION='float8'.*bfloat16"):
        segmenter(precision="float8")
