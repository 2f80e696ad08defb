"""Reversible renaming of state dicts."""

import pytest
import torch

from mfuser_d2.core.key_map import apply_rules, concatenate, prefixed, rename, split, transform

A, B, C = (torch.arange(6.0).view(3, 2) + 10 * i for i in range(3))


def there_and_back(rules, state):
    ours, left = apply_rules(state, rules)
    assert left == []
    theirs, left = apply_rules(ours, [rule.inverse() for rule in rules])
    assert left == []
    assert set(theirs) == set(state) and all(torch.equal(theirs[key], state[key]) for key in state)
    return ours


def test_wildcards_keep_what_they_matched():
    ours = there_and_back([rename("a.{}.x.{}", "b.{}.{}"), rename("c.**", "d.e.**")], {"a.3.x.w": A, "c.f.g": B})
    assert ours == {"b.3.w": A, "d.e.f.g": B}


def test_one_name_does_not_span_a_dot():
    assert apply_rules({"a.b.c": A}, [rename("a.{}", "x.{}")]) == ({}, ["a.b.c"])


def test_first_fitting_rule_wins():
    ours, _ = apply_rules({"a.b": A}, [rename("a.b", "x"), rename("**", "rest.**")])
    assert list(ours) == ["x"]


def test_concatenate_and_split_are_exact():
    ours = there_and_back([concatenate(["{}.q", "{}.k", "{}.v"], "{}.qkv")], {"0.q": A, "0.k": B, "0.v": C})
    assert torch.equal(ours["0.qkv"], torch.cat([A, B, C]))
    ours = there_and_back([split("w", ["q", "kv"], [1, 2])], {"w": A})
    assert torch.equal(ours["q"], A[:1]) and torch.equal(ours["kv"], A[1:])


def test_transform_goes_both_ways():
    ours = there_and_back([transform("a", "b", lambda t: t * 2, lambda t: t / 2)], {"a": A})
    assert torch.equal(ours["b"], 2 * A)


def test_prefixes_are_added_on_both_sides():
    ours = there_and_back(prefixed([rename("a.{}", "b.{}")], "theirs.", "ours."), {"theirs.a.w": A})
    assert list(ours) == ["ours.b.w"]


def test_incomplete_groups_are_named():
    with pytest.raises(ValueError, match=r"0\.q is there, but \['0\.v'\]"):
        apply_rules({"0.q": A, "0.k": B}, [concatenate(["{}.q", "{}.k", "{}.v"], "{}.qkv")])


def test_followers_without_their_first_key_are_left_over():
    ours, left = apply_rules({"x": A, "0.v": C}, [concatenate(["{}.q", "{}.v"], "{}.qv")])
    assert ours == {} and left == ["0.v", "x"]


def test_dots_in_patterns_are_dots():
    assert apply_rules({"axb": A}, [rename("a.b", "c")]) == ({}, ["axb"])
