"""Computes the same things in one, two and three processes, for test_processes.py."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from mfuser_d2.d2 import MFuserTrainer, load_config
from mfuser_d2.d2.processes import synchronise_batch_norm, wrap_for_processes

ROOT = Path(__file__).resolve().parents[2]
OPTS = [
    "INPUT.CROP.SIZE", "[64,64]", "MODEL.MFUSER.IMAGE_SIZE", "[64,64]", "MODEL.MFUSER.INFERENCE.CROP_SIZE", "[64,64]",
    "MODEL.MFUSER.INFERENCE.STRIDE", "[64,64]", "MODEL.SEM_SEG_HEAD.TRAIN_NUM_POINTS", "64",
    "MODEL.SEM_SEG_HEAD.ENC_LAYERS", "1", "MODEL.SEM_SEG_HEAD.DEC_LAYERS", "2", "DATALOADER.NUM_WORKERS", "0",
    "DATALOADER.MFUSER.RCS_MIN_PIXELS", "20", "SOLVER.IMS_PER_BATCH", "6", "TEST.MFUSER.CONFUSION_PICTURE", "False",
    "TEST.MFUSER.SAVE_PER_IMAGE", "True", "DATASETS.TEST", "('streets_sem_seg_val',)",
]  # fmt: skip


def batch() -> list[dict]:
    """Four images whose labels hold one, two, four and eight classes, some of their pixels ignored."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(4):
        blocks = torch.randint(0, 2**index, (8, 8), generator=generator) * 2
        blocks[0, : 2 * index] = 255
        labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        items.append({"image": image, "sem_seg": labels, "file_name": f"{index}.png"})
    return items


def make_repeatable(model: nn.Module, dtype: torch.dtype) -> None:
    """No dropout, and points that do not depend on the number of masks in the process."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.to(dtype)
    normalize, criterion = model.normalize, model.criterion.forward
    model.normalize = lambda image: normalize(image).to(dtype)

    def rand(shape: tuple[int, ...]) -> torch.Tensor:
        one = torch.rand(1, *shape[1:], generator=torch.Generator().manual_seed(shape[1]))
        return one.expand(shape)

    model.criterion.forward = lambda *args, **kwargs: criterion(*args, **{**kwargs, "rand": rand})


def gradients(folder: Path, dtype: torch.dtype, kind: str) -> None:
    """One backward pass of this process's part of the batch."""
    torch.manual_seed(3)
    model = MFuserTrainer.build_model(load_config(config(), [*OPTS, "MODEL.MFUSER.ALIGN_LOSS.KIND", kind]))
    make_repeatable(model, dtype)
    if comm.get_world_size() > 1:
        synchronise_batch_norm(model)
    wrapped = wrap_for_processes(model).train()
    items, share = batch(), 4 // comm.get_world_size()
    losses = wrapped(items[comm.get_rank() * share :][:share])
    sum(losses.values()).backward()
    state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: b for name, b in model.named_buffers() if "running" in name or "num_batches" in name}
    data = {"gradients": state, "statistics": statistics, "losses": {k: v.detach() for k, v in losses.items()}}
    torch.save(data, folder / f"{str(dtype)[6:]}_{kind}_{comm.get_world_size()}_{comm.get_rank()}.pt")


def evaluation(folder: Path) -> None:
    torch.manual_seed(3)
    output = folder / f"evaluated_by_{comm.get_world_size()}"
    cfg = load_config(config(), [*OPTS, "OUTPUT_DIR", str(output)])
    MFuserTrainer.test(cfg, MFuserTrainer.build_model(cfg))


def draws(folder: Path) -> None:
    """Which images this process sees, from the beginning and from the third iteration on."""
    cfg = load_config(config(), OPTS)
    seen = {}
    for start in (0, 2):
        loader = iter(MFuserTrainer.build_train_loader(cfg, start_iter=start))
        seen[start] = [
            [[item["file_name"], int(item["image"].sum())] for item in next(loader)] for _ in range(4 - start)
        ]
    torch.save(seen, folder / f"draws_{comm.get_world_size()}_{comm.get_rank()}.pt")


def config() -> str:
    return str(ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml")


def run(world: int, rank: int, folder: Path, tasks: list[Callable[[Path], None]]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/.meet_{world}", rank=rank, world_size=world)
        comm.create_local_process_group(world)
    for task in tasks:
        task(folder)


def start(world: int, folder: Path, tasks: list[Callable[[Path], None]]) -> None:
    """Fork the processes, which have everything imported already, and wait for them."""
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(world, rank, folder, tasks)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        sys.exit(f"a process of {world} failed")


def main(folder: Path) -> None:
    passes = [lambda f: gradients(f, torch.float64, "softmax"), lambda f: gradients(f, torch.float32, "sigmoid")]
    start(1, folder, [*passes, evaluation, draws])
    start(2, folder, [*passes, evaluation, draws])
    start(3, folder, [evaluation, draws])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
