#!/usr/bin/env python
"""Train and evaluate MFuser in a plain PyTorch loop: the quickstart's network and data, without Detectron2.

    python tools/plain_train.py [--max-iter 660] [--output output/plain]

It shows how little the network needs around it. For configs, several GPUs, resuming and real data sets take
tools/train_net.py; its --eval-only reads the checkpoint that this loop writes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from draw_predictions import draw_output  # noqa: E402

from mfuser_d2.core.backbone import DualEncoderBackbone  # noqa: E402
from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, trainable_state_dict  # noqa: E402
from mfuser_d2.core.checkpoint_file import write_checkpoint  # noqa: E402
from mfuser_d2.core.criterion import Criterion  # noqa: E402
from mfuser_d2.core.encoders.presets import CLIP_MEAN, CLIP_STD  # noqa: E402
from mfuser_d2.core.factory import build_backbone_parts, build_head  # noqa: E402
from mfuser_d2.core.inference import InferenceSettings  # noqa: E402
from mfuser_d2.core.optim import parameter_groups, poly_lr  # noqa: E402
from mfuser_d2.core.segmenter import Segmenter  # noqa: E402
from mfuser_d2.data.labels import CLASSES, COLORS, NUM_CLASSES  # noqa: E402
from mfuser_d2.data.layouts import list_pairs  # noqa: E402
from mfuser_d2.data.plain import TrainItems, test_items, train_loader  # noqa: E402
from mfuser_d2.evaluation import ConfusionMatrix, describe_protocol, score_confusion, summarize  # noqa: E402
from mfuser_d2.evaluation.label_files import write_label  # noqa: E402

# The numbers of configs/quickstart/mfuser_tiny_eva02.yaml; a test compares them.
SOURCE, TARGETS = "streets_sem_seg_val", [f"streets_{name}_sem_seg_val" for name in ("night", "fog", "sketch")]
CROP, STRIDE = (128, 128), (96, 96)
BATCH, MAX_ITER, WARMUP_ITERS, BASE_LR, WEIGHT_DECAY = 8, 660, 50, 1e-3, 1e-5


def build_network() -> Segmenter:
    """The quickstart's MFuser: tiny random EVA02-CLIP and ViT, both frozen, and everything that is trained."""
    vlm = {"name": "tiny_eva02"}
    parts = build_backbone_parts(vfm={"name": "tiny_vfm"}, vlm=vlm, image_size=CROP, tap_layers=(0, 1, 2, 3))
    backbone = DualEncoderBackbone(**parts)
    head = build_head(
        vlm=vlm,
        class_names=CLASSES,
        in_dims=[backbone.pyramid.dim] * 4,
        prompt_length=4,
        refiner_kwargs={"width": 64},
        hidden_dim=64,
        mask_dim=64,
        num_heads=4,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
    )
    return Segmenter(
        backbone=backbone,
        sem_seg_head=head,
        criterion=Criterion(num_classes=NUM_CLASSES, num_points=1024),
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        crop_size=CROP,
        inference=InferenceSettings(mode="slide", crop_size=CROP, stride=STRIDE, batch=8),
    )


def train(network: Segmenter, *, max_iter: int, seed: int = 2023) -> None:
    """Train on the day pictures, with a progress line every 20 iterations."""
    loader = train_loader(TrainItems(name="streets_sem_seg_train", crop_size=CROP, seed=seed), batch_size=BATCH)
    optimizer = torch.optim.AdamW(parameter_groups(network, base_lr=BASE_LR, weight_decay=WEIGHT_DECAY))
    network.train()
    start = time.time()
    for iteration, items in zip(range(max_iter), loader):
        losses = network.losses([item["image"] for item in items], [item["sem_seg"] for item in items])
        total = sum(losses.values())
        if not math.isfinite(total.item()):
            sys.exit(f"error: the loss is {total.item()} at iteration {iteration}; lower BASE_LR")
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(iteration, base_lr=BASE_LR, max_iter=max_iter, warmup_iters=WARMUP_ITERS)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if (iteration + 1) % 20 == 0 or iteration + 1 == max_iter:
            left = (time.time() - start) / (iteration + 1) * (max_iter - iteration - 1)
            print(f"iter {iteration + 1}/{max_iter}  left {left:.0f} s  loss {total.item():.3f}", flush=True)


def evaluate(network: Segmenter, dataset: str, folder: Path) -> dict[str, float]:
    """Scores in percent on one data set; the predictions are saved below `folder`."""
    network.eval()
    confusion = ConfusionMatrix(num_classes=NUM_CLASSES)
    for item in test_items(dataset):
        scores = network.predict([item["image"]], [(item["height"], item["width"])])[0]
        prediction = scores.argmax(dim=0).byte().cpu().numpy()
        confusion.update(prediction, item["sem_seg"])
        write_label(folder / dataset / "predictions" / f"{Path(item['file_name']).stem}.png", prediction, COLORS)
    return score_confusion(confusion.counts, CLASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-iter", type=int, default=MAX_ITER, help="training iterations (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/plain"), help="folder for all results")
    args = parser.parse_args()
    try:
        for name in ("streets_sem_seg_train", SOURCE, *TARGETS):
            list_pairs(name)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(2023)
    network = build_network().to("cuda" if torch.cuda.is_available() else "cpu")
    train(network, max_iter=args.max_iter)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = args.output / "model_final.pth"
    checkpoint = {"model": trainable_state_dict(network), "encoders": encoder_identity(network), "format": FORMAT}
    write_checkpoint(weights, checkpoint)

    results = {name: evaluate(network, name, args.output / "inference") for name in [SOURCE, *TARGETS]}
    protocol = describe_protocol(
        weights=weights, crop_size=CROP, stride=STRIDE, train_datasets=["streets_sem_seg_train"], loop="plain PyTorch"
    )
    print(summarize(results, protocol, args.output / "inference", sources=[SOURCE]))
    print(f"Pictures: {draw_output(args.output)}")
    print("To go on with configs, several GPUs and real data sets, bring Detectron2: bash tools/setup_env.sh")


if __name__ == "__main__":
    main()
