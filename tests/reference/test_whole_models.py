"""The three recorded tiny models, stage by stage, from the pixels to the labels."""

import re

import pytest
import torch

from mfuser_d2.core.backbone import DENSE_EMBEDDING, GLOBAL_EMBEDDING, PYRAMID_LEVELS
from mfuser_d2.core.inference import InferenceSettings, class_scores
from mfuser_d2.core.ops.grid import map_to_tokens

TOLERANCE = 5e-5


class Stages:
    """Everything the network computes of the recorded image, computed once per variant."""

    @torch.no_grad()
    def __init__(self, tiny) -> None:
        self.model = model = tiny.build()
        head = model.sem_seg_head
        self.images = tiny.shared["in.image"]
        self.features = model.backbone(self.images)
        self.raw = head.class_texts()
        dense = self.features[DENSE_EMBEDDING]
        visual = torch.cat([self.features[GLOBAL_EMBEDDING], map_to_tokens(dense)], dim=1)
        self.residual = head.text_refiner.residual(self.raw.expand(len(dense), -1, -1), visual)
        self.texts = head.refined_texts(self.features)
        self.mask_features, self.memories = head.pixel_decoder(
            [self.features[level] for level in PYRAMID_LEVELS], self.texts
        )
        self.output = head(self.features)


@pytest.fixture(scope="module")
def stages(tiny) -> Stages:
    return Stages(tiny)


@pytest.fixture
def compare(tiny, check):
    """`compare(stage, got, name)`: our tensor against the recorded output of that name."""

    def run(stage: str, got: torch.Tensor, name: str) -> None:
        wanted, stride = tiny.recorded(name)
        got = got[..., ::stride, ::stride] if stride > 1 else got
        check(stage, got, wanted, max(TOLERANCE, tiny.noise(name)), group=tiny.variant)

    return run


def numbered(tiny, prefix: str) -> list[int]:
    """Indices of the recorded outputs `prefix.<i>`."""
    found = {re.match(re.escape(prefix) + r"\.(\d+)", key) for key in tiny.io}
    indices = sorted(int(match[1]) for match in found if match)
    assert indices == list(range(len(indices))) and indices, f"{prefix}.* is not recorded from 0 on"
    return indices


def test_normalisation(tiny, stages, check):
    pixels = tiny.shared["in.image_rgb_u8"]
    got = torch.stack([stages.model.normalize(image) for image in pixels])
    check("normalised input", got, stages.images, 1e-6, group=tiny.variant)


def test_class_tokens(tiny, stages):
    assert torch.equal(stages.model.sem_seg_head.text_encoder.class_tokens, tiny.io["in.texts"])


def test_pyramid(tiny, stages, compare):
    levels = numbered(tiny, "out.fpn")
    assert len(levels) == len(PYRAMID_LEVELS)
    for i, level in enumerate(PYRAMID_LEVELS):
        compare(f"pyramid {i}", stages.features[level], f"out.fpn.{i}")


def test_global_embedding(stages, compare):
    compare("global embedding", stages.features[GLOBAL_EMBEDDING], "out.global")


def test_dense_embedding(stages, compare):
    compare("dense embedding", stages.features[DENSE_EMBEDDING], "out.visual")


def test_class_texts(tiny, stages, compare):
    wanted, _ = tiny.recorded("out.text_raw")
    compare("class texts", stages.raw.view(wanted.shape), "out.text_raw")


def test_text_refiner(stages, compare):
    compare("text refiner", stages.residual, "out.context_decoder_out")


def test_refined_texts(stages, compare):
    compare("refined texts", stages.texts, "out.text_refined")


def test_score_map(stages, compare):
    """Cosine similarity of patches and texts; the network gives it scaled and shifted."""
    head = stages.model.sem_seg_head
    scores = (stages.output.alignment_logits - head.alignment_bias) / head.alignment_scale
    compare("score map", scores, "out.score_map")


def test_mask_features(stages, compare):
    compare("mask features", stages.mask_features, "out.mask_feature")


def test_pixel_decoder_memories(tiny, stages, compare):
    levels = numbered(tiny, "out.multi_scale")
    assert len(levels) == len(stages.memories)
    for i in levels:
        compare(f"memory {i}", stages.memories[i], f"out.multi_scale.{i}")


def test_class_logits_of_every_layer(tiny, stages, compare):
    layers = numbered(tiny, "out.cls")
    assert len(layers) == len(stages.output.class_logits)
    for i in layers:
        compare(f"class logits {i}", stages.output.class_logits[i], f"out.cls.{i}")


def test_mask_logits_of_every_layer(tiny, stages, compare):
    layers = numbered(tiny, "out.mask")
    assert len(layers) == len(stages.output.mask_logits)
    for i in layers:
        compare(f"mask logits {i}", stages.output.mask_logits[i], f"out.mask.{i}")


def test_scores_at_mask_resolution(stages, compare):
    scores = class_scores(stages.output.class_logits[-1], stages.output.mask_logits[-1])
    compare("scores, mask resolution", scores, "out.seg_lowres")


@torch.no_grad()
def test_encode_decode(stages, compare):
    compare("encode_decode", stages.model.window_scores(stages.images), "out.logits")


def predict(tiny, stages, *, size=None, **changes) -> torch.Tensor:
    model, settings = stages.model, stages.model.inference
    model.inference = InferenceSettings(**{**vars(settings), **changes})
    try:
        images = list(tiny.shared["in.big_image_rgb_u8"])
        return torch.stack(model.predict(images, None if size is None else [size] * len(images)))
    finally:
        model.inference = settings


@pytest.mark.parametrize("batch", [1, 4])
def test_sliding_window_on_an_oblong_image(tiny, stages, compare, check, batch):
    height, width = tiny.shared["in.big_image_rgb_u8"].shape[-2:]
    assert height != width
    scores = predict(tiny, stages, batch=batch)
    compare("sliding window", scores, "out.slide")
    means = scores.double().mean(dim=(0, 2, 3))
    check("sliding window, class means", means, tiny.io["out.slide.mean_per_class"], TOLERANCE, group=tiny.variant)


def test_rescaled_output(tiny, stages, compare):
    names = {re.match(r"out\.slide_rescaled_(\d+)x(\d+)", key) for key in tiny.io} - {None}
    assert names
    for match in names:
        size = (int(match[1]), int(match[2]))
        compare("rescaled output", predict(tiny, stages, size=size), match[0])


def test_softmax_of_the_output(tiny, stages, compare):
    compare("final softmax", predict(tiny, stages, final_softmax=True), "out.inference_softmax")


def test_labels(tiny, stages):
    """The argmax at the image's own size; pixels whose two best classes differ by less than the noise may fall out."""
    wanted = tiny.io["out.simple_test_argmax"].long()
    scores = predict(tiny, stages)
    best = scores.topk(2, dim=1).values
    is_clear = best[:, 0] - best[:, 1] > TOLERANCE * scores.abs().max()
    assert is_clear.float().mean() > 0.99
    assert torch.equal(scores.argmax(dim=1)[is_clear], wanted[is_clear])


def test_every_recorded_output_is_compared(tiny):
    """A folder with a stage that no test above knows is not covered by them."""
    known = r"out\.(fpn|multi_scale|cls|mask)\.\d+|out\.(global|visual|text_raw|context_decoder_out|text_refined)"
    known += r"|out\.(score_map|mask_feature|seg_lowres|logits|slide|slide\.mean_per_class|inference_softmax)"
    known += r"|out\.(simple_test_argmax|slide_rescaled_\d+x\d+)"
    unknown = [
        key for key in tiny.io if key.startswith("out.") and not re.fullmatch(known, re.sub(r"\.strided\d+$", "", key))
    ]
    assert unknown == []
