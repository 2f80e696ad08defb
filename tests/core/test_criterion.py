import math

import pytest
import torch
import torch.nn.functional as F

from mfuser_d2.core import criterion as criterion_module
from mfuser_d2.core.criterion import Criterion, alignment_loss
from mfuser_d2.core.ops.point_sampling import point_sample

K, IGNORE = 4, 255
POINTS = 8


def make(**changes) -> Criterion:
    return Criterion(**{"num_classes": K, "num_points": POINTS, **changes})


def labels_of(*rows: str) -> torch.Tensor:
    """One image per row: a stripe of 4 x 2 pixels for each character, '.' is ignored."""
    columns = [[IGNORE if c == "." else int(c) for c in row] for row in rows]
    return torch.tensor(columns).repeat_interleave(2, 1)[:, None].expand(-1, 4, -1).contiguous()


def predictions(num: int = 3, batch: int = 2, k: int = K, **options):
    classes = torch.randn(num, batch, k, k + 1, **options)
    return classes, torch.randn(num, batch, k, 5, 7, **options), torch.randn(batch, k, 3, 2, **options)


class Replay:
    """Gives the same random numbers again, in order."""

    def __init__(self, seed: int = 3) -> None:
        self.generator, self.shapes = torch.Generator().manual_seed(seed), []

    def __call__(self, shape):
        self.shapes.append(tuple(shape))
        return torch.rand(shape, generator=self.generator)


def one_by_one(classes, masks, labels, rand, no_object=0.1):
    """The class, mask and dice losses with plain loops over predictions and targets."""
    pairs = [(n, c) for n in range(len(labels)) for c in range(K) if (labels[n] == c).any()]
    out = {}
    for i in range(len(classes)):
        total = weight = 0.0
        for n in range(len(labels)):
            for query in range(K):
                present = (n, query) in pairs
                w = 1.0 if present else no_object
                total -= w * classes[i, n, query].log_softmax(-1)[query if present else K].item()
                weight += w
        candidates, free = rand((len(pairs), 3 * POINTS, 2)), rand((len(pairs), POINTS // 4, 2))
        mask = dice = 0.0
        for m, (n, c) in enumerate(pairs):
            logits = masks[i, n, c][None, None]
            order = point_sample(logits, candidates[m][None])[0, 0].abs().argsort()
            points = torch.cat((candidates[m][order[: POINTS * 3 // 4]], free[m]))[None]
            x = point_sample(logits, points)[0, 0]
            t = point_sample((labels[n] == c).float()[None, None], points)[0, 0]
            p = 1 / (1 + (-x).exp())
            mask -= (t * p.log() + (1 - t) * (1 - p).log()).sum().item() / POINTS
            dice += 1 - ((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)).item()
        suffix = "" if i == len(classes) - 1 else f"_{i}"
        out[f"loss_cls{suffix}"] = 2 * total / weight
        out[f"loss_mask{suffix}"] = 5 * mask / len(pairs)
        out[f"loss_dice{suffix}"] = 5 * dice / len(pairs)
    return out


def test_matches_loops_over_predictions_and_targets():
    labels = labels_of("0.22", "1330")
    classes, masks, alignment = predictions()
    losses = make()(classes, masks, alignment, labels, Replay())
    wanted = one_by_one(classes, masks, labels, Replay())
    assert set(losses) == {*wanted, "loss_align"}
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name


def test_draws_random_numbers_per_prediction():
    rand = Replay()
    make()(*predictions(), labels_of("0.22", "1330"), rand)
    assert rand.shapes == [(5, 24, 2), (5, 2, 2)] * 3


def test_gradients_reach_present_masks_and_all_classes():
    classes, masks, alignment = predictions()
    for x in (classes, masks, alignment):
        x.requires_grad_()
    sum(make(num_points=64)(classes, masks, alignment, labels_of("0.22", "1330")).values()).backward()
    assert classes.grad.any(-1).all() and alignment.grad.any()
    touched = masks.grad.flatten(3).any(-1)
    assert torch.equal(touched, torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]]).bool().expand(3, -1, -1))


def test_gradients_by_finite_differences():
    classes, masks, alignment = (x.double().requires_grad_() for x in predictions(num=2))
    criterion, labels = make(importance_ratio=0.0), labels_of("0.22", "1330")
    points = [torch.rand(shape, dtype=torch.float64) for shape in [(5, 24, 2), (5, 8, 2)] * 2]

    def total(*logits):
        it = iter(points)
        return sum(criterion(*logits, labels, lambda shape: next(it)).values())

    assert torch.autograd.gradcheck(total, (classes, masks, alignment))


def test_ignored_pixels_are_background_of_masks():
    masks = torch.full((1, 1, K, 4, 8), -20.0)
    masks[..., :2] = 20.0  # class 0 where it is; the rest says "not here", also where ignored
    classes, _, alignment = predictions(num=1, batch=1)
    rand = Replay()
    good = make(importance_ratio=0.0, num_points=64)(classes, masks, alignment, labels_of("0..."), rand)
    masks[..., 2:] = 20.0
    bad = make(importance_ratio=0.0, num_points=64)(classes, masks, alignment, labels_of("0..."), Replay())
    assert good["loss_mask"] < 5 and bad["loss_mask"] > 5 * 10


@pytest.mark.parametrize("alignment", ["softmax", "sigmoid"])
def test_no_targets_at_all(alignment):
    classes, masks, similarity = predictions()
    for x in (classes, masks, similarity):
        x.requires_grad_()
    rand = Replay()
    losses = make(alignment=alignment)(classes, masks, similarity, labels_of("....", "...."), rand)
    assert rand.shapes == []
    zero = [value.item() for name, value in losses.items() if not name.startswith("loss_cls")]
    assert zero == [0.0] * 7
    # Every query is asked for "no object", so the weight of that class cancels.
    assert losses["loss_cls"].item() == pytest.approx(-2 * classes[-1].log_softmax(-1)[..., K].mean().item(), rel=1e-5)
    sum(losses.values()).backward()
    assert not masks.grad.any() and not similarity.grad.any() and classes.grad.any()


def test_one_ignored_image_does_not_disturb_the_other():
    classes, masks, alignment = predictions()
    both = make()(classes, masks, alignment, labels_of("....", "0123"), Replay())
    alone = make()(classes[:, 1:], masks[:, 1:], alignment[1:], labels_of("0123"), Replay())
    for name in ("loss_mask", "loss_dice", "loss_mask_0", "loss_dice_1"):
        torch.testing.assert_close(both[name], alone[name])
    # The alignment is averaged over all pixels, ignored ones included.
    torch.testing.assert_close(both["loss_align"], alone["loss_align"] / 2)


@pytest.mark.parametrize("alignment", ["softmax", "sigmoid"])
def test_a_single_class(alignment):
    classes, masks, similarity = predictions(k=1)
    losses = make(num_classes=1, alignment=alignment)(classes, masks, similarity, labels_of("00..", "...."))
    assert all(value.isfinite() for value in losses.values())
    if alignment == "softmax":
        assert losses["loss_align"] == 0


def test_hundreds_of_classes_and_another_ignore_label():
    criterion = Criterion(num_classes=300, num_points=POINTS, ignore_label=-1)
    labels = labels_of("0.22", "1330")
    labels[labels == IGNORE] = -1
    labels[0, 0, 0] = 299
    assert all(value.isfinite() for value in criterion(*predictions(k=300), labels).values())


def test_perfect_predictions_cost_little():
    labels = labels_of("0022", "1133")
    present = torch.stack([labels == c for c in range(K)], 1)
    masks = torch.where(present, 50.0, -50.0)[None]
    classes = torch.full((1, 2, K, K + 1), -50.0)
    index = torch.where(present.flatten(2).any(2), torch.arange(K), K)
    classes.scatter_(-1, index[None, ..., None], 50.0)
    alignment = torch.where(present, 50.0, -50.0)
    # Points on the border between two stripes stay uncertain; drawing evenly meets few of them.
    losses = make(num_points=4096, importance_ratio=0.0)(classes, masks, alignment, labels)
    assert losses["loss_cls"] < 1e-6 and losses["loss_align"] < 1e-6
    assert losses["loss_mask"] < 5 * 4 and losses["loss_dice"] < 5 * 0.2


def test_weights_scale_their_losses():
    args = (*predictions(), labels_of("0.22", "1330"))
    ones = make(class_weight=1, mask_weight=1, dice_weight=1, alignment_weight=1)(*args, Replay())
    many = make(class_weight=3, mask_weight=5, dice_weight=7, alignment_weight=11)(*args, Replay())
    for name, weight in {"loss_cls_0": 3, "loss_mask_1": 5, "loss_dice": 7, "loss_align": 11}.items():
        torch.testing.assert_close(many[name], weight * ones[name])


def test_alignment_can_be_left_out():
    classes, masks, _ = predictions()
    assert "loss_align" not in make(alignment_weight=0)(classes, masks, None, labels_of("0.22", "1330"))


def test_softmax_alignment_by_hand():
    logits, labels = torch.randn(2, K, 3, 2), labels_of("0.22", "1330")
    resized = F.interpolate(logits, size=(4, 8), mode="bilinear", align_corners=False)
    total = 0.0
    for n, y, x in (labels != IGNORE).nonzero().tolist():
        total -= resized[n, :, y, x].log_softmax(0)[labels[n, y, x]].item()
    loss = alignment_loss(logits, labels, form="softmax", ignore_label=IGNORE)
    assert loss.item() == pytest.approx(total / labels.numel(), rel=1e-5)


def test_sigmoid_alignment_by_hand():
    logits, labels = torch.randn(2, K, 3, 2) * 3, labels_of("0.22", "1330")
    resized = F.interpolate(logits, size=(4, 8), mode="bilinear", align_corners=False)
    valid = (labels != IGNORE).nonzero().tolist()
    total = 0.0
    for n, y, x in valid:
        for c in range(K):
            z = 1 if labels[n, y, x] == c else -1
            total += math.log1p(math.exp(-z * resized[n, c, y, x].item()))
    loss = alignment_loss(logits, labels, form="sigmoid", ignore_label=IGNORE)
    assert loss.item() == pytest.approx(total / len(valid), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_under_autocast(dtype):
    logits = [x.to(dtype) for x in predictions()]
    labels = labels_of("0.22", "1330")
    with torch.autocast("cpu", dtype=dtype):
        losses = make()(*logits, labels, Replay())
    wanted = make()(*(x.float() for x in logits), labels, Replay())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_end_in_a_non_finite_loss(value):
    classes, masks, alignment = predictions()
    masks[:] = value
    losses = make()(classes, masks, alignment, labels_of("0.22", "1330"))
    assert not losses["loss_mask"].isfinite() and losses["loss_cls"].isfinite()


@pytest.mark.parametrize("value", [K, 254, -1, 7000])
def test_names_a_label_that_is_no_class(value):
    labels = labels_of("0.22", "1330")
    labels[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"labels hold \[{value}\].*0\.\.3.*ignore_label=255"):
        make()(*predictions(), labels)


def test_refuses_shapes_that_do_not_fit():
    classes, masks, alignment = predictions()
    labels = labels_of("0.22", "1330")
    with pytest.raises(ValueError, match="class_logits"):
        make()(classes[..., :-1], masks, alignment, labels)
    with pytest.raises(ValueError, match="mask_logits"):
        make()(classes, masks[:, :, 1:], alignment, labels)
    for broken in (None, alignment[:1]):
        with pytest.raises(ValueError, match="alignment_logits"):
            make()(classes, masks, broken, labels)
    for broken in (labels.float(), labels[0]):
        with pytest.raises(ValueError, match="labels"):
            make()(classes, masks, alignment, broken)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("alignment", "cosine"), ("ignore_label", 3), ("num_classes", 0), ("num_points", 0), ("importance_ratio", 1.5)],
)
def test_refuses_bad_settings(argument, value):
    with pytest.raises(ValueError, match=argument):
        make(**{argument: value})


def test_classes_and_masks_are_normalised_over_processes(monkeypatch):
    args = (*predictions(), labels_of("0.22", "1330"))
    alone = make()(*args, Replay())
    monkeypatch.setattr(criterion_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion_module.dist, "get_world_size", lambda: 2)
    # The other process has three times the class weights, and 15 targets where this one has 5: the mean is 10.
    others = [lambda x: x.mul_(4), lambda x: x.add_(15)]
    monkeypatch.setattr(criterion_module.dist, "all_reduce", lambda x: others.pop(0)(x))
    both = make()(*args, Replay())
    for name in alone:
        scale = 0.5 if name != "loss_align" else 1.0
        torch.testing.assert_close(both[name], alone[name] * scale)


def test_a_process_without_targets_takes_part_in_the_mean(monkeypatch):
    calls = []
    monkeypatch.setattr(criterion_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(criterion_module.dist, "all_reduce", lambda x: calls.append(x.clone()))
    make()(*predictions(), labels_of("....", "...."))
    assert len(calls) == 2 and calls[0].item() > 0 and calls[1].item() == 0.0
