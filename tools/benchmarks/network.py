"""What `inference` and `train` share: a config's network, a clock for its parts, the rate of products, the chart."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import add_common_arguments, describe_machine, emit, time_calls
from mfuser_d2.core.analysis import PARTS, REST, measure, part_of
from mfuser_d2.core.segmenter import PRECISIONS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORK_PARTS = {**PARTS, "losses": ("criterion",)}
TEXT = "VLM, text"
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product whose rate stands for the machine's."""


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both benchmarks."""
    default = CONFIGS / "gta5" / "mfuser_eva02.yaml"
    parser.add_argument("--config-file", nargs="+", default=[str(default)], metavar="FILE", help="one case each")
    parser.add_argument("--precision", nargs="+", choices=sorted(PRECISIONS), default=["float32", "bfloat16"])
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys to change")
    add_common_arguments(parser)


def start(arguments: argparse.Namespace) -> None:
    """Threads, seed and the machine's line."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    emit(describe_machine(arguments.device))


def build_network(config_file: str, options: Sequence[str], arguments: argparse.Namespace) -> tuple:
    """Config and model, with random weights where the config names none, on the device."""
    from detectron2.modeling import build_model

    import mfuser_d2.d2  # noqa: F401  registers the network
    from mfuser_d2.d2.config import load_config

    cfg = load_config(config_file, ["MODEL.DEVICE", arguments.device, *options, *arguments.opts])
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return cfg, build_model(cfg)


def name_of(config_file: str) -> str:
    """A config's folder and stem, e.g. "gta5/mfuser_eva02"."""
    path = Path(config_file).resolve()
    return f"{path.parent.name}/{path.stem}"


class PartClock:
    """Seconds spent in each part of a network, adding up to the whole; a part is where its modules are being called.

    Args:
        model: its modules are named as in a `Segmenter`.
        device: on a GPU, the time of its own queue is taken.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model = model
        self.is_cuda = device.startswith("cuda")
        self._marks: list[tuple[object, str]] = []
        self._inside: list[str] = []

    def enter(self, part: str) -> None:
        """From here on time belongs to `part`."""
        self._inside.append(part)
        self._mark()

    def leave(self) -> None:
        """From here on time belongs again to what was interrupted."""
        self._inside.pop()
        self._mark()

    def _mark(self) -> None:
        now = torch.cuda.Event(enable_timing=True) if self.is_cuda else time.perf_counter()
        if self.is_cuda:
            now.record()
        self._marks.append((now, self._inside[-1] if self._inside else REST))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watches the modules inside the block."""
        handles = []
        for name, module in self.model.named_modules():
            part = part_of(name, NETWORK_PARTS)
            if part != REST:
                handles.append(module.register_forward_pre_hook(lambda *_, part=part: self.enter(part)))
                handles.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))
        self._marks.clear()
        self._mark()
        try:
            yield
        finally:
            self._mark()
            for handle in handles:
                handle.remove()

    def seconds(self) -> dict[str, float]:
        """Of every part that took any, in the network's order."""
        if self.is_cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for (begin, part), (end, _) in zip(self._marks, self._marks[1:]):
            sums[part] = sums.get(part, 0.0) + (begin.elapsed_time(end) / 1000 if self.is_cuda else end - begin)
        order = [*NETWORK_PARTS, *(part for part in sums if part not in NETWORK_PARTS)]
        return {part: round(sums[part], 6) for part in order if part in sums}


def matrix_product(precision: str, device: str) -> tuple[Callable[[], Tensor], int]:
    """A square product in a precision, and its operations."""
    size = MATRIX_SIZE["cuda" if device.startswith("cuda") else "cpu"]
    left, right = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    return lambda: left @ right, 2 * size**3


def matrix_rates(precision: str, device: str) -> dict[str, float]:
    """Operations a second of a square product, by the clock and by CPU time."""
    product, flops = matrix_product(precision, device)
    timed = time_calls(product, 7, device)
    return {"wall": flops / timed["seconds"], "cpu": flops / timed["cpu_seconds"]}


def add_efficiency(row: dict, flops: float, rates: Sequence[dict[str, float]]) -> dict:
    """The row with its rate of operations and that of matrix products; the better of those measured around it."""
    row["flops"] = flops
    row["flops_per_second"] = flops / row["seconds"]
    row["matrix_flops_per_second"] = max(rate["wall"] for rate in rates)
    row["efficiency"] = row["flops_per_second"] / row["matrix_flops_per_second"]
    if not row["device"].startswith("cuda"):
        # On a busy machine this is the one to look at, with one thread.
        row["cpu_efficiency"] = flops / row["cpu_seconds"] / max(rate["cpu"] for rate in rates)
    return row


def count_flops(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Operations of one window by part, the text encoder's among them; the model loses its values."""
    model.to("meta").float().eval()
    window = torch.empty(1, 3, *size, device="meta")
    with torch.no_grad():
        return measure(model, lambda: model.window_scores(window)).flops


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each part's share of the whole, to a tenth of a percent."""
    total = sum(seconds.values())
    return {part: round(value / total, 3) for part, value in seconds.items()}


def draw_parts(rows: Sequence[dict], path: Path) -> None:
    """A stacked bar for each row, its parts' seconds one upon the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(3 + 1.9 * len(rows), 5.5))
    heights = [0.0] * len(rows)
    colors = pyplot.get_cmap("tab20").colors
    names = list(dict.fromkeys(part for row in rows for part in row["part_seconds"]))
    for index, part in enumerate(names):
        values = [row["part_seconds"].get(part, 0.0) for row in rows]
        panel.bar(range(len(rows)), values, 0.7, bottom=heights, label=part, color=colors[index % len(colors)])
        heights = [height + value for height, value in zip(heights, values)]
    labels = [f"{row['config']}\n{row['precision']}\n{row['case']}" for row in rows]
    panel.set_xticks(range(len(rows)), labels, fontsize=7)
    panel.set(ylabel="seconds", title=f"{rows[0]['benchmark']} on {rows[0]['device']}")
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
