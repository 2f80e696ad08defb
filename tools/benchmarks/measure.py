"""What the benchmarks share: timing, memory, the machine, cost exponents and plots."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""glibc's mallopt parameters M_MMAP_THRESHOLD and M_TRIM_THRESHOLD."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=int, default=5, help="calls a case; the best and the median are reported")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw time over length (needs matplotlib)")


def emit(row: dict[str, object]) -> dict[str, object]:
    """Prints a case as one JSON line."""
    print(json.dumps({key: round(v, 9) if isinstance(v, float) else v for key, v in row.items()}), flush=True)
    return row


def describe_machine(device: str) -> dict[str, object]:
    """The row that stands before all others."""
    return {
        "benchmark": "machine",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "has_gpu": torch.cuda.is_available(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def time_calls(call: Callable[[], object], repeats: int, device: str, warm_up: bool = True) -> dict[str, object]:
    """Best and median wall seconds of `call`, its least CPU seconds over all threads, and the machine's load after it.

    On a busy machine compare CPU seconds, on one thread (waiting threads of OpenMP spin, which counts).
    """
    seconds, cpu_seconds = [], []
    for index in range(repeats + warm_up):
        gc.collect()
        _wait(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        _wait(device)
        if index >= warm_up:
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    seconds.sort()
    return {
        "seconds": seconds[0],
        "median_seconds": seconds[len(seconds) // 2],
        "cpu_seconds": min(cpu_seconds),
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 2),
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def keep_freed_blocks() -> None:
    """Makes glibc keep freed memory, as PyTorch does on a GPU: else every block past 32 MiB pays for fresh pages."""
    _call_glibc("mallopt", MMAP_THRESHOLD, 1 << 30)
    _call_glibc("mallopt", TRIM_THRESHOLD, (1 << 31) - 1)


def prepare_memory_measurement() -> None:
    """Makes glibc hand freed blocks back to the system, so that resident memory shows what is in use. Slows timing."""
    _call_glibc("mallopt", MMAP_THRESHOLD, 1 << 16)
    _call_glibc("mallopt", TRIM_THRESHOLD, 1 << 17)
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (OSError, AttributeError):
        logger.warning("no %s here: times and memory on the CPU depend on the allocator", name)


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Highest memory in use during `call` beyond that before it, outputs and gradients included; None if unknown."""
    gc.collect()
    _call_glibc("malloc_trim", 0)  # or blocks freed before would be filled again unseen
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def memory_in_use(device: str) -> int:
    """Bytes in use now: allocated on the GPU, resident on the CPU, freed blocks handed back first."""
    gc.collect()
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        logger.warning("no malloc_trim here: memory on the CPU is overestimated")
    return _status("VmRSS")


@contextmanager
def peak_memory(device: str, before: int) -> Iterator[list[int]]:
    """A list that holds, when the block ends, the highest memory in use in it beyond `before` bytes; else empty."""
    result: list[int] = []
    memory_in_use(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        yield result
        return
    yield result
    result.append(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def cost_exponents(rows: Sequence[dict], key: str, shortest: int, longest: int) -> dict[str, float]:
    """Slopes of log(cost) over log(row[key]) by least squares: "exponent" of wall, "cpu_exponent" of CPU seconds.

    Empty with fewer than three lengths in the range.
    """
    inside = [row for row in rows if shortest <= row[key] <= longest]
    if len(inside) < 3:
        return {}
    lengths = [math.log(row[key]) for row in inside]
    costs = {"exponent": "seconds", "cpu_exponent": "cpu_seconds"}
    return {
        name: statistics.linear_regression(lengths, [math.log(row[cost]) for row in inside]).slope
        for name, cost in costs.items()
    }


def draw(rows: Iterable[dict], key: str, label: str, path: Path) -> None:
    """Time over length, a panel a direction and a line for each value of `label`, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(rows)
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure, panels = pyplot.subplots(1, len(directions), figsize=(6 * len(directions), 4.5), squeeze=False)
    for panel, direction in zip(panels[0], directions):
        for name in dict.fromkeys(row[label] for row in rows):
            points = sorted((r[key], r["seconds"]) for r in rows if (r[label], r["direction"]) == (name, direction))
            if points:
                panel.loglog(*zip(*points), marker="o", label=name)
        panel.set(title=direction.replace("_", " + "), xlabel=key, ylabel="seconds")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
