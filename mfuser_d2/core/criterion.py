"""Training losses: class, mask and dice at every decoder prediction, and the pixel-text alignment."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mfuser_d2.core.ops.point_sampling import Rand, choose_uncertain_points, point_sample

ALIGNMENTS = ("softmax", "sigmoid")
DICE_SMOOTHING = 1.0


class Criterion(nn.Module):
    """All losses of MFuser, weighted; their sum is the training loss (Eq. 11-12).

    Query k is class k, so there is no matching: in an image, query k is asked for the mask of class k where that class
    is present and for "no object" where it is not. Masks are compared at points, most of them where the prediction is
    least certain. Ignored pixels belong to no class: they count as background of every mask, and not at all for the
    alignment.
    All losses are computed in float32 (float64 stays), also under autocast.
    Where several processes train, all counts that losses are divided by are taken over all of them: the average of the
    processes' losses is the loss of one process with the whole batch. Differs from the release there, which divides the
    class loss by the process's own weights, and bounds the mean number of masks by 1, not their sum.

    Differs from the paper: `alignment="softmax"` is what the release does for every variant; `"sigmoid"` is the
    paper's choice for SigLIP.

    Args:
        num_classes: K.
        class_weight, mask_weight, dice_weight, alignment_weight: weights of the losses; 0 for the last leaves it out.
        no_object_weight: weight of the "no object" class in the class loss.
        num_points: points per mask at which masks are compared.
        oversample_ratio: candidate points per point, at least 1.
        importance_ratio: share of points chosen by uncertainty, 0..1.
        alignment: form of the alignment loss, see `alignment_loss`.
        ignore_label: label of pixels without a class.
    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        alignment_weight: float = 1.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
        alignment: str = "softmax",
        ignore_label: int = 255,
    ) -> None:
        super().__init__()
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment={alignment!r} is unknown; choose from {list(ALIGNMENTS)}")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} has to be at least 1")
        if 0 <= ignore_label < num_classes:
            raise ValueError(
                f"ignore_label={ignore_label} is also one of the {num_classes} classes; use a label outside 0.."
                f"{num_classes - 1}"
            )
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
            raise ValueError(
                f"num_points={num_points}, oversample_ratio={oversample_ratio}, importance_ratio={importance_ratio}: "
                "wanted at least 1, at least 1, and 0..1"
            )
        self.num_classes, self.ignore_label, self.alignment = num_classes, ignore_label, alignment
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.alignment_weight = alignment_weight
        self.num_points, self.oversample_ratio, self.importance_ratio = num_points, oversample_ratio, importance_ratio
        weights = torch.ones(num_classes + 1)
        weights[-1] = no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        alignment_logits: Tensor | None,
        labels: Tensor,
        rand: Rand | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one batch.

        Args:
            class_logits: (L+1, N, K, K+1), the last entry of the last axis is "no object".
            mask_logits: (L+1, N, K, h, w), one mask per query.
            alignment_logits: (N, K, h', w'), scaled similarity of each patch to each class; None only where
                `alignment_weight` is 0.
            labels: (N, H, W) integers, 0..K-1 or `ignore_label`.
            rand: stands in for `torch.rand`; see `choose_uncertain_points` for the order of its calls.
        Returns:
            scalars `loss_cls`, `loss_mask`, `loss_dice` of the last prediction, the same with `_{i}` for each earlier
            prediction i, and `loss_align`.
        Raises:
            ValueError: shapes that do not fit each other, or a label that is neither a class nor `ignore_label`.
        """
        self._check_shapes(class_logits, mask_logits, alignment_logits, labels)
        with torch.autocast(labels.device.type, enabled=False):
            labels = labels.long()
            images, classes = self._find_targets(labels)
            losses = {"loss_cls": self.class_weight * self._class_losses(_widen(class_logits), images, classes)}
            mask, dice = self._mask_losses(_widen(mask_logits), labels, images, classes, rand)
            losses |= {"loss_mask": self.mask_weight * mask, "loss_dice": self.dice_weight * dice}
            named = {name: values[-1] for name, values in losses.items()}
            for i in range(class_logits.shape[0] - 1):
                named |= {f"{name}_{i}": values[i] for name, values in losses.items()}
            if self.alignment_weight:
                align = alignment_loss(
                    _widen(alignment_logits), labels, form=self.alignment, ignore_label=self.ignore_label
                )
                named["loss_align"] = self.alignment_weight * align
        return named

    def _check_shapes(
        self, class_logits: Tensor, mask_logits: Tensor, alignment_logits: Tensor | None, labels: Tensor
    ) -> None:
        if labels.dim() != 3 or labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; wanted integers (N, H, W)")
        num_predictions, batch, k = class_logits.shape[0], labels.shape[0], self.num_classes
        if class_logits.shape != (num_predictions, batch, k, k + 1):
            wanted = (num_predictions, batch, k, k + 1)
            raise ValueError(f"class_logits are {tuple(class_logits.shape)}; wanted {wanted}: one query per class")
        if mask_logits.dim() != 5 or mask_logits.shape[:3] != class_logits.shape[:3]:
            wanted = (num_predictions, batch, k, "h", "w")
            raise ValueError(f"mask_logits are {tuple(mask_logits.shape)}; wanted {wanted}")
        if not self.alignment_weight:
            return
        if alignment_logits is None or alignment_logits.dim() != 4 or alignment_logits.shape[:2] != (batch, k):
            got = None if alignment_logits is None else tuple(alignment_logits.shape)
            raise ValueError(f"alignment_logits are {got}; wanted {(batch, k, 'h', 'w')}, or alignment_weight=0")

    def _find_targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Image and class index, (M,) each, of every class present in an image, in ascending order."""
        k = self.num_classes
        wrong = (labels != self.ignore_label) & ((labels < 0) | (labels >= k))
        # Column K collects what is ignored and column K+1 what is wrong, so one copy to the host tells everything.
        columns = torch.where(labels == self.ignore_label, k, labels).masked_fill(wrong, k + 1)
        present = torch.zeros(labels.shape[0], k + 2, dtype=torch.bool, device=labels.device)
        table = present.scatter_(1, columns.flatten(1), True).tolist()
        if any(row[k + 1] for row in table):
            values = labels[wrong].unique().tolist()
            raise ValueError(
                f"labels hold {values[:10]}, which are neither one of the {k} classes 0..{k - 1} nor "
                f"ignore_label={self.ignore_label}; map the data set's ids to train ids first"
            )
        pairs = [(image, c) for image, row in enumerate(table) for c in range(k) if row[c]]
        images, classes = torch.tensor(pairs, dtype=torch.long).view(-1, 2).to(labels.device).unbind(1)
        return images, classes

    def _class_losses(self, logits: Tensor, images: Tensor, classes: Tensor) -> Tensor:
        """Weighted cross entropy of every query's class, (L+1,), per unit of weight."""
        num_predictions, batch, num_queries, _ = logits.shape
        targets = images.new_full((batch, num_queries), self.num_classes)
        targets[images, classes] = classes
        weights = self.class_weights.to(logits.dtype)
        every = targets.flatten().repeat(num_predictions)
        losses = F.cross_entropy(logits.flatten(0, 2), every, weights, reduction="none")
        return losses.view(num_predictions, -1).sum(1) / _mean_over_processes(weights[targets].sum())

    def _mask_losses(
        self, logits: Tensor, labels: Tensor, images: Tensor, classes: Tensor, rand: Rand | None
    ) -> tuple[Tensor, Tensor]:
        """Binary cross entropy and dice of the masks of present classes, (L+1,) each, per target."""
        # Every process has to take part in the mean, also one without any target.
        normaliser = _mean_over_processes(logits.new_full((), len(images)), at_least=1)
        logits = logits[:, images, classes]  # (L+1, M, h, w)
        if not len(images):
            nothing = logits.sum((1, 2, 3))  # an empty sum: zeros that still reach the masks in backward
            return nothing, nothing
        points = choose_uncertain_points(
            logits,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_ratio=self.importance_ratio,
            rand=rand,
        )  # (L+1, M, P, 2)
        sampled = point_sample(logits.flatten(0, 1)[:, None], points.flatten(0, 1)).view(points.shape[:3])
        masks = (labels.int()[images] == classes[:, None, None]).to(logits.dtype)  # (M, H, W)
        # One look-up per mask serves the points of all predictions.
        targets = point_sample(masks[:, None], points.transpose(0, 1).flatten(1, 2))  # (M, 1, (L+1) * P)
        targets = targets.view(len(images), -1, self.num_points).transpose(0, 1)  # (L+1, M, P)
        bce = F.binary_cross_entropy_with_logits(sampled, targets, reduction="none").sum((1, 2)) / self.num_points
        return bce / normaliser, _dice_losses(sampled, targets).sum(1) / normaliser


def alignment_loss(logits: Tensor, labels: Tensor, *, form: str, ignore_label: int) -> Tensor:
    """How badly pixels match the texts of their classes (Eq. 12); a scalar per pixel.

    Logits are resized bilinearly to the labels' size. "softmax": cross entropy over the classes, summed over the
    pixels with a class and divided by the number of all pixels, as in the release. "sigmoid": each pixel-class pair is
    a yes-or-no question, softplus(-z * logit) with z = 1 for the pixel's class and -1 for every other; summed
    over the classes and averaged over the pixels that have a class.

    Args:
        logits: (N, K, h, w), scaled (and, for "sigmoid", shifted) similarities.
        labels: (N, H, W) int64, 0..K-1 or `ignore_label`.
        form: "softmax" or "sigmoid".
        ignore_label: label of pixels without a class; with none left the loss is 0.
    """
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    if form == "softmax":
        return F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="sum") / labels.numel()
    valid = labels != ignore_label
    own = logits.gather(1, torch.where(valid, labels, 0)[:, None]).squeeze(1)
    # softplus(-x) = softplus(x) - x: all pairs are summed as wrong ones, then the true one is put right.
    per_pixel = F.softplus(logits).sum(1) - own  # (N, H, W)
    return torch.where(valid, per_pixel, 0).sum() / _mean_over_processes(valid.sum().to(logits.dtype), at_least=1)


def _dice_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the smoothed overlap of each mask, over its points: (..., P) -> (...)."""
    probabilities = logits.sigmoid()
    overlap = (probabilities * targets).sum(-1)
    total = probabilities.sum(-1) + targets.sum(-1)
    return 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)


def _mean_over_processes(x: Tensor, at_least: float = 0.0) -> Tensor:
    """Mean of a number that counts something, so that the average of the processes' losses is the loss of one process.

    `at_least` bounds the count over all processes, as it would in one.
    """
    if dist.is_available() and dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        return x.clamp(min=at_least) / dist.get_world_size()
    return x.clamp(min=at_least)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
