"""What a network costs: parameters, floating-point operations and activation memory by part, without computing a value.

Everything runs on PyTorch's "meta" device, where tensors have shapes but no numbers, so that a full-size model is
measured on a laptop. What is counted (two operations per multiply-add):

- matrix products, convolutions and attention (both products, scores included): from the shapes of the operands, by the
  formulas of `torch.utils.flop_counter`;
- the selective scan: 4 per batch, channel, state and step (one multiply-add updates the state, h = a h + b, one reads
  it, y += C h), and 2 per batch, channel and step for the skip D. Making a = exp(delta A) and b = delta B u takes
  products, exponentials and a softplus, but no multiply-adds;
- `addcmul`, one multiply-add per value, which is how the width-3 convolution beside the scan is written;
- bilinear sampling: four multiply-adds per value.

Norms, activations, softmax, interpolation and other element-wise steps are not counted, as in fvcore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mfuser_d2.core.ops.selective_scan.interface import BACKENDS, scan_backend

REST = "rest"

PARTS: dict[str, tuple[str, ...]] = {
    "VFM": ("backbone.encoder.vfm",),
    "VLM, image": ("backbone.encoder.vlm",),
    "encoder": ("backbone.encoder.tower",),
    "adapters": ("backbone.encoder.adapters",),
    "map to joint space": ("backbone.encoder.vfm_to_joint", "backbone.encoder.to_joint"),
    "pyramid": ("backbone.pyramid",),
    "VLM, text": ("sem_seg_head.text_encoder.tower",),
    "prompts or queries": ("sem_seg_head.text_encoder",),
    "text refinement": ("sem_seg_head.text_refiner",),
    "pixel decoder": ("sem_seg_head.pixel_decoder",),
    "transformer decoder": ("sem_seg_head.transformer_decoder",),
}
"""Parts of a `Segmenter` and where they are; the first that fits counts."""


def part_of(name: str, parts: Mapping[str, tuple[str, ...]] = PARTS) -> str:
    """The part that a module or parameter of this dotted name belongs to."""
    for part, paths in parts.items():
        if any(name == path or name.startswith(f"{path}.") for path in paths):
            return part
    return REST


def count_parameters(model: nn.Module, parts: Mapping[str, tuple[str, ...]] = PARTS) -> dict[str, tuple[int, int]]:
    """Trained and frozen parameters of each part, in the order of `parts`; parts without any are left out."""
    counts = {part: [0, 0] for part in (*parts, REST)}
    for name, parameter in model.named_parameters():
        counts[part_of(name, parts)][0 if parameter.requires_grad else 1] += parameter.numel()
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items() if trained or frozen}


class Cost:
    """What a forward pass takes, by part.

    Attributes:
        flops: operations.
        saved: bytes that the pass keeps for the backward pass, parameters not among them.
    """

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self._inside: list[str] = []

    @property
    def part(self) -> str:
        """The part that is running."""
        return self._inside[-1] if self._inside else REST

    def add_flops(self, count: int) -> None:
        self.flops[self.part] = self.flops.get(self.part, 0) + count

    def add_saved(self, count: int) -> None:
        self.saved[self.part] = self.saved.get(self.part, 0) + count

    @contextmanager
    def watching(self, model: nn.Module, parts: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
        """Know which part runs while a forward pass of the model goes on."""
        handles = []
        for name, module in model.named_modules():
            part = part_of(name, parts)
            if part != REST:
                handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._inside.append(part)))
                handles.append(module.register_forward_hook(lambda *_: _drop_last(self._inside), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._inside.clear()


def measure(model: nn.Module, run: Callable[[], object], parts: Mapping[str, tuple[str, ...]] = PARTS) -> Cost:
    """Costs of a forward pass.

    Args:
        model: on the meta device.
        run: calls it, with or without gradients; only with gradients is anything saved.
        parts: names of the parts and the module paths they cover.
    """
    cost = Cost()
    with ExitStack() as stack:
        stack.enter_context(cost.watching(model, parts))
        stack.enter_context(_saved_bytes(model, cost))
        stack.enter_context(_scan_by_formula(cost))
        stack.enter_context(_AttentionByFormula(cost))
        stack.enter_context(_OperatorCounter(cost))
        run()
    return cost


def _drop_last(names: list[str]) -> None:
    names.pop()  # a hook that returned it would replace the module's output


class _OperatorCounter(TorchDispatchMode):
    """Adds the operations of every operator that has a formula."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.cost.add_flops(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        elif packet is torch.ops.aten.addcmul:
            self.cost.add_flops(2 * out.numel())
        elif packet is torch.ops.aten.grid_sampler_2d:
            self.cost.add_flops(8 * out.numel())
        return out


class _AttentionByFormula(TorchFunctionMode):
    """Attention as the fused kernels do it: the scores are computed, but never kept."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        scores = query.shape[:-1].numel() * key.shape[-2]
        self.cost.add_flops(2 * scores * (query.shape[-1] + value.shape[-1]))
        mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
        return _FusedAttention.apply(query, key, value, mask)


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one number per row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        kept = [query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)]
        ctx.save_for_backward(*kept, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only the cost of the forward pass is measured")


class _FusedScan(torch.autograd.Function):
    """Keeps its inputs, from which a fused kernel computes the states again."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(u, *others)
        return torch.empty_like(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only the cost of the forward pass is measured")


@contextmanager
def _scan_by_formula(cost: Cost) -> Iterator[None]:
    """Makes the selective scan a single step of known cost."""

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None, softplus: bool
    ) -> tuple[Tensor, Tensor]:
        states = A.shape[1]
        cost.add_flops(u.numel() * (4 * states + (0 if D is None else 2)))
        others = [tensor for tensor in (delta, A, B, C, D, bias) if tensor is not None]
        return _FusedScan.apply(u, *others), u.new_empty(*u.shape[:2], states, dtype=torch.float32)

    BACKENDS["formula"] = (scan, lambda *_: None)
    try:
        with scan_backend("formula"):
            yield
    finally:
        del BACKENDS["formula"]


@contextmanager
def _saved_bytes(model: nn.Module, cost: Cost) -> Iterator[None]:
    """Adds up what autograd keeps; a storage that several steps keep counts once."""
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    alive = []  # storages that are gone could give their address to another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            cost.add_saved(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
