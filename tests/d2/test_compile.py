"""MODEL.MFUSER.COMPILE: the same scores and losses through torch.compile; ignored, with a word, where it cannot be."""

import copy
import logging

import pytest
import torch

pytest.importorskip("detectron2", reason="the network is built from a Detectron2 config")

from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.core import segmenter  # noqa: E402
from mfuser_d2.core.segmenter import Segmenter, compiler_obstacle  # noqa: E402
from mfuser_d2.d2.config import load_config  # noqa: E402

# As small as the parts allow: tracing takes its time by the number of operators, not by their size.
SMALL = """
    MODEL.DEVICE cpu MODEL.MFUSER.VFM.NAME tiny_vfm MODEL.MFUSER.VLM.NAME tiny_eva02 MODEL.MFUSER.PROMPT_LENGTH 2
    MODEL.MFUSER.IMAGE_SIZE [64,64] MODEL.MFUSER.TAP_LAYERS [0,1,2,3] MODEL.MFUSER.MT_ENHANCER.WIDTH 32
    MODEL.MFUSER.ADAPTER.DROPOUT 0.0 MODEL.MFUSER.MT_ENHANCER.DROPOUT 0.0 MODEL.MFUSER.INFERENCE.CROP_SIZE [64,64]
    MODEL.MFUSER.INFERENCE.STRIDE [64,64] MODEL.SEM_SEG_HEAD.HIDDEN_DIM 32 MODEL.SEM_SEG_HEAD.MASK_DIM 32
    MODEL.SEM_SEG_HEAD.NUM_HEADS 2 MODEL.SEM_SEG_HEAD.ENC_LAYERS 1 MODEL.SEM_SEG_HEAD.DEC_LAYERS 1
    MODEL.SEM_SEG_HEAD.ENC_FFN_DIM 32 MODEL.SEM_SEG_HEAD.DEC_FFN_DIM 32 MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS 32
    DATASETS.TRAIN ("streets_sem_seg_train",) MODEL.MFUSER.COMPILE True
""".split()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    # Traces as "inductor" does, without minutes of C++ compilation.
    monkeypatch.setattr(segmenter, "COMPILE_BACKEND", "eager")
    torch.manual_seed(0)
    built = build_model(load_config("", SMALL))
    yield built
    torch.compiler.reset()


def test_scores_are_those_of_the_plain_network(model: Segmenter) -> None:
    model.eval()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    compiled = model.predict([image])[0]
    assert model._compiled is not None
    model.use_compile = False
    torch.testing.assert_close(compiled, model.predict([image])[0], rtol=1e-4, atol=1e-5)


def test_losses_and_gradients_are_those_of_the_plain_network(model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "COMPILE_BACKEND", "aot_eager")  # differentiates as "inductor" does, too
    model.train()
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    labels = [torch.randint(0, 19, (8, 8)).repeat_interleave(8, 0).repeat_interleave(8, 1) for _ in range(2)]
    results = []
    for use_compile in (True, False):
        model.use_compile = use_compile
        generator = torch.Generator().manual_seed(1)
        losses = model.losses(images, labels, rand=lambda shape: torch.rand(shape, generator=generator))  # noqa: B023
        model.zero_grad()
        sum(losses.values()).backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert model._compiled is not None
    (compiled, compiled_grads), (plain, plain_grads) = results
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
    assert compiled_grads.keys() == plain_grads.keys()
    largest = max(grad.abs().max() for grad in plain_grads.values())
    for name, grad in plain_grads.items():
        assert (compiled_grads[name] - grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-5 * largest, name


def test_without_a_compiler_it_runs_as_it_is(
    model: Segmenter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in compiler_obstacle(torch.device("cpu"))
    logging.getLogger("mfuser_d2").propagate = True
    with caplog.at_level(logging.WARNING, logger="mfuser_d2.core.segmenter"):
        scores = model.eval().predict([torch.zeros(3, 64, 64, dtype=torch.uint8)])[0]
    assert scores.shape == (19, 64, 64) and model._compiled is None
    assert "MODEL.MFUSER.COMPILE is not followed" in caplog.text


def test_a_copy_compiles_for_itself(model: Segmenter) -> None:
    model._network()
    assert model._compiled is not None and copy.deepcopy(model)._compiled is None
