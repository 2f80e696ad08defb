#!/usr/bin/env python
"""What a config costs: parameters, FLOPs and activation memory by part, the modules, and the paper's Table 3.

python tools/analyze_model.py --config-file configs/gta5/mfuser_eva02.yaml
python tools/analyze_model.py --config-file ... --tasks parameter flop MODEL.MFUSER.ADAPTER.NAME deformable
python tools/analyze_model.py --tasks adapters

Nothing is computed: the network runs on PyTorch's meta device, where tensors have shapes but no values. One
multiply-add is two FLOPs; the formulas are those of mfuser_d2/core/analysis.py, printed below the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import mfuser_d2  # noqa: E402
from mfuser_d2.core.adapters import ADAPTERS, TokenLayout, build_adapter  # noqa: E402
from mfuser_d2.core.analysis import Cost, count_parameters, measure  # noqa: E402

TASKS = ("parameter", "flop", "activation", "structure", "adapters")

FORMULAS = """\
Counted, two FLOPs per multiply-add: matrix products, convolutions, both products of attention; the scan as
4 x batch x channels x states x tokens (state update, read-out) + 2 x batch x channels x tokens (skip D); the width-3
convolution beside it as two multiply-adds per value, bilinear samples as four. Not counted: element-wise steps, norms.
"""

PAPER_TABLE_3 = {
    "self_attention_concat": (4.20, 98.64),
    "self_attention_separate": (8.40, 71.08),
    "deformable": (3.35, 34.65),
    "mvfuser": (1.67, 17.21),
}
"""Million parameters and giga FLOPs of one adapter as the paper prints them: 1024 channels, 512x512 pixels at patch 14,
two images. Its mvfuser leaves the scan out, its deformable the bilinear samples."""

PAPER_LAYOUT = TokenLayout(vfm_grid=(36, 36), vlm_grid=(36, 36), vfm_prefix=1, vlm_prefix=1)
PAPER_DIM, PAPER_BATCH = 1024, 2


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each; the first is aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def adapter_cost(name: str) -> tuple[int, int]:
    """Parameters and FLOPs of one adapter at the paper's setting, from the module that is built for that name."""
    adapter = build_adapter(name, vfm_dim=PAPER_DIM, vlm_dim=PAPER_DIM).eval()
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    adapter.to("meta")
    tokens = PAPER_LAYOUT.vfm_prefix + PAPER_LAYOUT.vfm_grid[0] * PAPER_LAYOUT.vfm_grid[1]
    vfm, vlm = (torch.empty(PAPER_BATCH, tokens, PAPER_DIM, device="meta") for _ in range(2))
    with torch.no_grad():
        cost = measure(adapter, lambda: adapter(vfm, vlm, PAPER_LAYOUT), parts={})
    return parameters, sum(cost.flops.values())


def adapters_report() -> str:
    """The paper's Table 3 beside what the modules of this package take."""
    rows = []
    for name in ADAPTERS:
        parameters, flops = (value / unit for value, unit in zip(adapter_cost(name), (1e6, 1e9)))
        row = [name, f"{parameters:.2f}", f"{flops:.2f}"]
        if name in PAPER_TABLE_3:
            paper_parameters, paper_flops = PAPER_TABLE_3[name]
            row += [f"{paper_parameters:.2f}", f"{paper_flops:.2f}"]
            row += [f"{parameters / paper_parameters - 1:+.2%}", f"{flops / paper_flops - 1:+.2%}"]
        rows.append([*row, *["-"] * (7 - len(row))])
    header = ["adapter", "params (M)", "FLOPs (G)", "paper: params", "paper: FLOPs", "params differ", "FLOPs differ"]
    tokens = PAPER_LAYOUT.vfm_prefix + PAPER_LAYOUT.vfm_grid[0] * PAPER_LAYOUT.vfm_grid[1]
    title = f"One adapter, {PAPER_DIM} channels, {tokens} + {tokens} tokens (512x512 at patch 14), batch {PAPER_BATCH}"
    return f"{title}\n{format_table(header, rows)}\n{FORMULAS}".rstrip()


def parameter_report(model: nn.Module) -> str:
    """Parameters by part, trained and frozen."""
    counts = count_parameters(model)
    totals = [sum(values) for values in zip(*counts.values())]
    rows = [[part, f"{trained:,}", f"{frozen:,}"] for part, (trained, frozen) in counts.items()]
    return format_table(["parameters", "trained", "frozen"], [*rows, ["all", *(f"{total:,}" for total in totals)]])


def flop_report(model: nn.Module, size: tuple[int, int]) -> str:
    """FLOPs of one window by part."""
    cost = forward_cost(model, size, batch=1, is_training=False)
    return f"{_by_part(cost.flops, f'FLOPs (G), one window of {size[0]}x{size[1]}', 1e9)}\n{FORMULAS}"


def activation_report(model: nn.Module, size: tuple[int, int], batch: int) -> str:
    """Memory that a training step's forward pass keeps for its backward pass, by part."""
    cost = forward_cost(model, size, batch=batch, is_training=True)
    table = _by_part(cost.saved, f"activations (MiB), {batch} crops of {size[0]}x{size[1]}, float32", 2**20)
    note = "Weights, gradients, optimizer state and losses come on top; attention and scan as fused kernels keep them."
    return f"{table}\n{note}"


def structure_report(model: nn.Module, depth: int = 4) -> str:
    """The modules down to a depth, with their parameters; rows of equal modules are drawn once."""
    lines = []

    def add(module: nn.Module, name: str, level: int) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        if not parameters or level > depth:
            return
        lines.append(f"{'  ' * level}{name}: {type(module).__name__}, {parameters:,} parameters")
        children = list(module.named_children())
        is_row = (
            len(children) > 2 and len({(type(c), sum(p.numel() for p in c.parameters())) for _, c in children}) == 1
        )
        for child_name, child in children[:1] if is_row else children:
            add(child, f"{child_name}..{children[-1][0]}, each" if is_row else child_name, level + 1)

    add(model, "model", 0)
    return "\n".join(lines)


def forward_cost(model: nn.Module, size: tuple[int, int], *, batch: int, is_training: bool) -> Cost:
    """Costs of a forward pass of windows of `size` pixels: all predictions with gradients, or the last one without."""
    images = torch.empty(batch, 3, *size, device="meta")
    model.train(is_training)
    if is_training:
        return measure(model, lambda: model.predict_all(images))
    with torch.no_grad():
        return measure(model, lambda: model.window_scores(images))


def _by_part(values: dict[str, int], title: str, unit: float) -> str:
    total = sum(values.values())
    rows = [
        [part, f"{value / unit:,.2f}", f"{value / total:.1%}"]
        for part, value in sorted(values.items(), key=lambda item: -item[1])
    ]
    return format_table([title, "", "share"], [*rows, ["all", f"{total / unit:,.2f}", ""]])


def model_reports(config_file: str, opts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The reports on the network of a config, in the order asked for."""
    from detectron2.modeling import build_model

    from mfuser_d2.d2 import load_config, one_line_errors, validate_config

    with one_line_errors():
        cfg = load_config(config_file, [*opts, "MODEL.DEVICE", "cpu"])
        validate_config(cfg)
        model = build_model(cfg).to("meta")
    size = tuple(cfg.MODEL.MFUSER.INFERENCE.CROP_SIZE)
    reports: dict[str, Callable[[], str]] = {
        "parameter": lambda: parameter_report(model),
        "flop": lambda: flop_report(model, size),
        "activation": lambda: activation_report(model, tuple(cfg.INPUT.CROP.SIZE), cfg.SOLVER.IMS_PER_BATCH),
        "structure": lambda: structure_report(model),
    }
    return [reports[task]() for task in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", help="YAML of configs/; not needed for --tasks adapters")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["parameter", "flop", "activation"],
        metavar="TASK",
        help=f"what to print, of {', '.join(TASKS)} (default: %(default)s)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    args = parser.parse_args()
    first_key = next((i for i, word in enumerate(args.tasks) if "." in word), len(args.tasks))
    args.tasks, args.opts = args.tasks[:first_key], [*args.tasks[first_key:], *args.opts]
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        parser.error(f"--tasks {' '.join(unknown)}: unknown; choose from {', '.join(TASKS)}")
    of_model = [task for task in args.tasks if task != "adapters"]
    if of_model and not args.config_file:
        parser.error(f"--tasks {' '.join(of_model)} need --config-file")
    if of_model:
        try:
            mfuser_d2.require_detectron2()
        except RuntimeError as error:
            sys.exit(str(error))
    reports = [adapters_report()] if "adapters" in args.tasks else []
    if of_model:
        reports += model_reports(args.config_file, args.opts, of_model)
    print("\n\n".join(reports))


if __name__ == "__main__":
    main()
