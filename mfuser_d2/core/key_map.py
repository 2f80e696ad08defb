"""Reversible renaming of state dicts: who wrote a file under other names, and how to get back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def _same(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some keys of theirs are some keys of ours.

    Attributes:
        theirs, ours: key patterns; `{}` stands for one name between dots, a final `**` for any rest. All patterns of a
            rule share the same wildcards in the same order.
        to_ours, to_theirs: what happens to the tensors, given and returned in the patterns' order.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = _same
    to_theirs: Callable[[Tensors], Tensors] = _same

    def inverse(self) -> Rule:
        return Rule(self.ours, self.theirs, self.to_theirs, self.to_ours)


def rename(theirs: str, ours: str) -> Rule:
    """One key, another name."""
    return Rule((theirs,), (ours,))


def concatenate(theirs: Sequence[str], ours: str) -> Rule:
    """Several tensors of one size stacked along their first axis."""
    count = len(theirs)
    return Rule(tuple(theirs), (ours,), lambda ts: [torch.cat(list(ts))], lambda ts: ts[0].chunk(count))


def split(theirs: str, ours: Sequence[str], parts: Sequence[int]) -> Rule:
    """One tensor cut along its first axis into shares of `parts`."""

    def cut(tensors: Tensors) -> Tensors:
        unit = tensors[0].shape[0] // sum(parts)
        return [part.contiguous() for part in tensors[0].split([unit * share for share in parts])]

    return Rule((theirs,), tuple(ours), cut, lambda ts: [torch.cat(list(ts))])


def transform(
    theirs: str, ours: str, to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]
) -> Rule:
    """One key whose tensor changes, both ways exactly."""
    return Rule((theirs,), (ours,), lambda ts: [to_ours(ts[0])], lambda ts: [to_theirs(ts[0])])


def prefixed(rules: Sequence[Rule], theirs: str, ours: str) -> list[Rule]:
    """The same rules below other prefixes."""
    return [
        Rule(
            tuple(theirs + pattern for pattern in rule.theirs),
            tuple(ours + pattern for pattern in rule.ours),
            rule.to_ours,
            rule.to_theirs,
        )
        for rule in rules
    ]


def apply_rules(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a state dict; the first rule that fits a key takes it.

    Args:
        state: names to tensors.
        rules: in order of precedence.
    Returns:
        the renamed state dict, and the keys that no rule took, in their order.
    Raises:
        ValueError: a rule wants a tensor that the state dict lacks.
    """
    compiled = [(re.compile(_pattern(rule.theirs[0])), rule) for rule in rules]
    # Keys that only follow another one in a rule are taken with it, never on their own.
    followers = [re.compile(_pattern(pattern)) for rule in rules for pattern in rule.theirs[1:]]
    result: dict[str, Tensor] = {}
    taken: set[str] = set()
    for key in state:
        for expression, rule in compiled:
            match = expression.fullmatch(key)
            if match is None:
                continue
            names = [_fill(pattern, match.groups()) for pattern in rule.theirs]
            missing = [name for name in names if name not in state]
            if missing:
                raise ValueError(
                    f"{key} is there, but {missing} that belong with it are missing: the file is incomplete"
                )
            outputs = rule.to_ours([state[name] for name in names])
            result.update(zip((_fill(pattern, match.groups()) for pattern in rule.ours), outputs, strict=True))
            taken.update(names)
            break
    left = [key for key in state if key not in taken]
    orphans = [key for key in left if any(expression.fullmatch(key) for expression in followers)]
    return result, sorted(left, key=lambda key: (key not in orphans, left.index(key)))


def _pattern(pattern: str) -> str:
    escaped = re.escape(pattern).replace(r"\{\}", "([^.]+)")
    return re.sub(r"\\\*\\\*$", "(.+)", escaped)


def _fill(pattern: str, values: Sequence[str]) -> str:
    parts = re.split(r"\{\}|\*\*$", pattern)
    return "".join(part + value for part, value in zip(parts, [*values, ""]))
