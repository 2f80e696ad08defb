"""Training and evaluating with several processes: starting them, and computing as one process would."""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from mfuser_d2.d2.stopping import SIGNALS

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_processes(main: Callable[..., None], arguments: argparse.Namespace, args: tuple[Any, ...]) -> None:
    """Run `main(*args)` in every process of the run: those that torchrun has started, or --num-gpus new ones.

    SIGTERM and SIGINT reach all of them. The exit code is that of the process that ended first.

    Args:
        main: a function at the top of a module.
        arguments: of Detectron2's command line: `num_gpus`, `num_machines`, `machine_rank`, `dist_url`.
        args: of `main`; they have to be picklable.
    """
    if all(name in os.environ for name in _TORCHRUN):
        if arguments.num_gpus * arguments.num_machines > 1:
            sys.exit("error: torchrun starts the processes: leave --num-gpus and --num-machines out")
        _join_torchrun()
        main(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if arguments.num_gpus * arguments.num_machines == 1:
        main(*args)
        return
    try:
        with _handing_signals_on():
            launch(
                main,
                arguments.num_gpus,
                num_machines=arguments.num_machines,
                machine_rank=arguments.machine_rank,
                dist_url=arguments.dist_url,
                args=args,
            )
    except ProcessRaisedException as error:
        sys.exit(f"error: process {error.error_index} of this machine failed.{error}")
    except ProcessExitedException as error:
        sys.exit(_exit_code(error))


def _exit_code(error: ProcessExitedException) -> int:
    """The exit code for the end of a process, after a line about it where it did not end by a request."""
    code = 128 - error.exit_code if error.exit_code < 0 else error.exit_code
    if code not in [128 + number for number in SIGNALS]:
        how = f"was ended by {error.signal_name}" if error.signal_name else f"ended with exit code {code}"
        hint = " (SIGKILL: memory short?)" if error.signal_name == "SIGKILL" else "; its message is above"
        text = f"error: process {error.error_index} of this machine {how}{hint}, so the others were ended"
        print(f"{text}. Start again with --resume.", file=sys.stderr)
    return code


@contextmanager
def _handing_signals_on() -> Iterator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join_torchrun() -> None:
    """Join the processes that torchrun has started, as Detectron2's `launch` would."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=datetime.timedelta(minutes=30))
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def wrap_for_processes(model: nn.Module) -> nn.Module:
    """The model itself in a single process, else wrapped so that gradients are averaged over all processes."""
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Batch norms that take their statistics over all processes, as the release's SyncBN; names stay the same."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_modules()):  # torch's own needs a GPU
        if isinstance(module, nn.BatchNorm2d):
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, SharedBatchNorm.over(module))
    return model


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics and gradients are those of one process with the batches of all.

    Not Detectron2's `NaiveSyncBatchNorm`: that takes the variance as a difference of two means, which cancels, and
    keeps the biased one as running variance.
    """

    @classmethod
    def over(cls, module: nn.BatchNorm2d) -> SharedBatchNorm:
        """The same layer, sharing parameters and statistics."""
        shared = cls(module.num_features, eps=module.eps, momentum=module.momentum, affine=module.affine)
        for name, parameter in module.named_parameters():
            setattr(shared, name, parameter)
        for name, buffer in module.named_buffers():
            setattr(shared, name, buffer)
        return shared.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; N, H and W may differ between processes."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = torch.cat([wide.sum((0, 2, 3)), wide.new_tensor([x.numel() / x.shape[1]])])
        sums = differentiable_all_reduce(sums)
        count = sums[-1].detach()
        mean = (sums[:-1] / count).view(1, -1, 1, 1)
        squares = differentiable_all_reduce((wide - mean).square().sum((0, 2, 3)))
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.flatten().to(self.running_mean), self.momentum)
            self.running_var.lerp_((squares / (count - 1)).to(self.running_var), self.momentum)
        result = (wide - mean) * (squares / count + self.eps).rsqrt().view(1, -1, 1, 1)
        if self.affine:
            result = result * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return result.to(x.dtype)
