"""A model small enough to train in a test, registered like any other, and data sets that live in memory."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

NUM_CLASSES = 3
CLASSES = ["a", "b", "c"]

if importlib.util.find_spec("detectron2") is not None:
    from detectron2.config import CfgNode
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.modeling import META_ARCH_REGISTRY

    @META_ARCH_REGISTRY.register()
    class ToyMFuser(nn.Module):
        """A frozen random encoder, batch norm, dropout and a trained classifier per pixel; same interface as MFuser."""

        def __init__(self, cfg: CfgNode) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.encoder = nn.Conv2d(3, 4, 1).requires_grad_(False)
            self.encoder.encoder_name = cfg.MODEL.MFUSER.VFM.NAME
            self.encoder.has_random_weights = not cfg.MODEL.MFUSER.VFM.WEIGHTS
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, NUM_CLASSES, 1)

        def forward(self, batched_inputs: list[dict]) -> dict | list:
            images = torch.stack([item["image"] for item in batched_inputs]).to(self.head.weight.device).float() / 255
            logits = self.head(nn.functional.dropout(self.norm(self.encoder(images)), 0.2, self.training))
            if self.training:
                labels = torch.stack([item["sem_seg"] for item in batched_inputs]).to(logits.device)
                loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=255)
                return {"loss_cls": loss, "loss_cls_0": 0.5 * loss}
            return [{"sem_seg": scores.float()} for scores in logits.softmax(1)]


def make_items(count: int, seed: int) -> list[dict]:
    """Images whose brightest channel is the class."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        image = torch.randint(0, 256, (3, 8, 10), generator=generator, dtype=torch.uint8)
        items.append(
            {"image": image, "sem_seg": image.argmax(0), "file_name": f"image_{index}.png", "height": 8, "width": 10}
        )
    return items


class ToyLoader:
    """Endless batches that depend on nothing but their number."""

    def __init__(self, batch_size: int, start_iter: int = 0) -> None:
        self.batch_size = batch_size
        self.start_iter = start_iter

    def __iter__(self):
        for step in itertools.count(self.start_iter):
            yield make_items(self.batch_size, seed=step)


@pytest.fixture
def toy_trainer_class():
    """The trainer on data that lives in memory."""
    from detectron2.evaluation import DatasetEvaluator

    from mfuser_d2.d2.trainer import MFuserTrainer

    class ToyEvaluator(DatasetEvaluator):
        """Counts right pixels; writes nothing."""

        def reset(self) -> None:
            self.right = self.all = 0

        def process(self, inputs: list[dict], outputs: list[dict]) -> None:
            for item, output in zip(inputs, outputs):
                self.right += int((output["sem_seg"].argmax(0) == item["sem_seg"]).sum())
                self.all += item["sem_seg"].numel()

        def evaluate(self) -> dict:
            return {"sem_seg": {"mIoU": 100 * self.right / self.all}}

    class ToyTrainer(MFuserTrainer):
        @classmethod
        def build_train_loader(cls, cfg, *, start_iter: int = 0):
            return ToyLoader(cfg.SOLVER.IMS_PER_BATCH, start_iter)

        @classmethod
        def build_test_loader(cls, cfg, dataset_name: str):
            return [[item] for item in make_items(3, seed=len(dataset_name))]

        @classmethod
        def build_evaluator(cls, cfg, dataset_name: str):
            return ToyEvaluator()

    return ToyTrainer


@pytest.fixture
def toy_cfg(tmp_path: Path):
    """A config of the toy model on registered toy data sets, one a source and two unseen."""
    from mfuser_d2.d2.config import load_config

    for name in ("toy_sem_seg_train", "toy_sem_seg_val", "toynight_sem_seg_val", "toyfog_sem_seg_val"):
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, lambda: [])
            MetadataCatalog.get(name).set(stuff_classes=CLASSES, ignore_label=255, evaluator_type="sem_seg")
    cfg = load_config()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "ToyMFuser"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.MFUSER.VFM.NAME = "toy_vfm"
    cfg.DATASETS.TRAIN = ("toy_sem_seg_train",)
    cfg.DATASETS.TEST = ("toy_sem_seg_val", "toynight_sem_seg_val", "toyfog_sem_seg_val")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR = 8, 2, 0.05
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.LOG_PERIOD = 3, 2
    cfg.SEED = 5
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg
