"""Loaders from a config."""

import logging
import signal
from types import FrameType
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList
from detectron2.data.build import build_batch_data_loader, build_detection_test_loader, worker_init_reset_seed
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from mfuser_d2.data.mapper import TestMapper, TrainMapper
from mfuser_d2.data.reading import calm_opencv
from mfuser_d2.data.sampler import Draw, DrawSampler, RareClasses
from mfuser_d2.data.statistics import class_counts

logger = logging.getLogger(__name__)

_GRACE = 60  # seconds that a worker outlives the request to end, so that the step in progress gets its images


class DrawnDataset(Dataset):
    """Dataset dicts mapped for the draws of a `DrawSampler`."""

    def __init__(self, dicts: list[dict[str, Any]], mapper: TrainMapper) -> None:
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.mapper({**self.dicts[draw.index], "draw_number": draw.number, "rare_class": draw.rare_class})


def _rare_classes(cfg: CfgNode, sources: list[list[dict[str, Any]]]) -> list[RareClasses]:
    node = cfg.DATALOADER.MFUSER
    if not node.RARE_CLASS_SAMPLING:
        return []
    if not comm.is_main_process():
        comm.synchronize()  # the main process counts and leaves the cache for the others
    tables = [
        RareClasses.from_counts(
            class_counts([item["sem_seg_file_name"] for item in source]),
            temperature=node.RCS_TEMPERATURE,
            min_pixels=node.RCS_MIN_PIXELS,
        )
        for source in sources
    ]
    if comm.is_main_process():
        comm.synchronize()
    return tables


def build_train_loader(cfg: CfgNode, *, start_iter: int = 0) -> DataLoader:
    """An endless loader over DATASETS.TRAIN; each batch is a list of mapped dicts.

    The items depend on SEED alone, not on the number of workers. One pair of each source is read here, so that wrong
    labels or a crop larger than the images show before training.

    Args:
        cfg: with the keys of `add_data_config`.
        start_iter: iterations already trained, to go on with unseen draws.
    Raises:
        FileNotFoundError, ValueError: a data set is missing or unfit; says how to mend it.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one data set to train on")
    calm_opencv()
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sources = [DatasetCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    mapper = TrainMapper(cfg, seed=seed)
    for name, source in zip(cfg.DATASETS.TRAIN, sources, strict=True):
        mapper.read(source[0])
        logger.info("%s: %d training images", name, len(source))
    sampler = DrawSampler(
        sizes=[len(source) for source in sources],
        weights=cfg.DATALOADER.MFUSER.SOURCE_WEIGHTS,
        rare_classes=_rare_classes(cfg, sources),
        seed=seed,
        start=start_iter * cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    loader = build_batch_data_loader(
        DrawnDataset([item for source in sources for item in source], mapper),
        sampler,
        cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = start_worker
    return loader


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """A loader over one data set in order, one image a batch, scaled to its test size, split over the processes."""
    calm_opencv()
    loader = build_detection_test_loader(
        DatasetCatalog.get(dataset_name),
        mapper=TestMapper(cfg, dataset_name),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    loader.worker_init_fn = start_worker
    return loader


def start_worker(worker_id: int) -> None:
    """Seed a worker, and let it outlive the signals that ask a run to end: the trainer ends its workers itself.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group; without its worker the step in progress would fail.
    """
    worker_init_reset_seed(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    signal.alarm(_GRACE)
