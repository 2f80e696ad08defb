import copy

import pytest
import torch
from torch import nn

from mfuser_d2.core.checkpoint import (
    encoder_identity,
    frozen_parts,
    load_trainable,
    trainable_keys,
    trainable_state_dict,
)


class Encoder(nn.Module):
    def __init__(self, name: str, is_random: bool, width: int = 6) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)
        self.pos_embed = nn.Parameter(torch.randn(1, 40, width))
        self.register_buffer("rope", torch.randn(4))
        self.encoder_name = name
        self.has_random_weights = is_random
        self.requires_grad_(False)


class Network(nn.Module):
    """A frozen encoder from a file, a frozen random one, and a trained head with batch statistics."""

    def __init__(self, seed: int = 0, vfm_random: bool = False, encoder_seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(encoder_seed)
        self.vfm = Encoder("vfm_a", vfm_random)
        self.vlm = Encoder("vlm_b", True)
        torch.manual_seed(seed + 100)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.prompt = nn.Parameter(torch.randn(3))


def trained_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_equal_states(expected: torch.nn.Module, got: torch.nn.Module) -> None:
    state = got.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_trainable_keys_take_batch_statistics_and_leave_frozen_buffers():
    keys = trainable_keys(Network())
    assert "prompt" in keys and "head.0.weight" in keys
    assert {"head.1.running_mean", "head.1.running_var", "head.1.num_batches_tracked"} <= set(keys)
    assert not any(key.startswith(("vfm.", "vlm.")) for key in keys)


def test_frozen_parts_are_the_marked_encoders_with_their_buffers():
    parts = frozen_parts(Network())
    assert set(parts) == {"vfm", "vlm"}
    assert parts["vfm"].name == "vfm_a" and not parts["vfm"].is_random and parts["vlm"].is_random
    assert parts["vfm"].keys == ("vfm.pos_embed", "vfm.rope", "vfm.proj.weight", "vfm.proj.bias")


def test_frozen_weights_outside_a_marked_encoder_are_grouped_by_the_largest_frozen_module():
    network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    assert list(frozen_parts(network)) == ["0"]


def test_state_holds_random_encoders_and_not_the_others():
    state = trainable_state_dict(Network())
    assert "vlm.proj.weight" in state and "vlm.rope" in state
    assert not any(key.startswith("vfm.") for key in state)


def test_round_trip_brings_trained_part_and_random_encoder():
    source, target = Network(seed=1), Network(seed=2)
    target.vlm.proj.weight.data.normal_()
    load_trainable(target, trainable_state_dict(source), encoder_identity(source))
    assert_equal_states(source, target)


def test_other_encoder_weights_are_refused_and_nothing_is_loaded():
    source, target = Network(seed=1), Network(seed=2, encoder_seed=5)
    before = trained_state(target)
    with pytest.raises(ValueError, match=r"another encoder at vfm.*'vfm_a' with weights from a file"):
        load_trainable(target, trainable_state_dict(source), encoder_identity(source))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_random_encoder_instead_of_the_file_it_was_trained_with_is_refused():
    source, target = Network(seed=1), Network(seed=2, vfm_random=True, encoder_seed=5)
    with pytest.raises(ValueError, match="this model has 'vfm_a' with random weights"):
        load_trainable(target, trainable_state_dict(source), encoder_identity(source))


def test_carried_random_encoder_does_not_silently_replace_one_from_a_file():
    source, target = Network(seed=1, vfm_random=True, encoder_seed=5), Network(seed=2)
    with pytest.raises(ValueError, match='WEIGHTS "": the checkpoint brings its random encoders'):
        load_trainable(target, trainable_state_dict(source), encoder_identity(source))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoder_kept_in_half_precision_is_recognised(dtype: torch.dtype):
    source, target = Network(seed=1), Network(seed=2)
    target.vfm.to(dtype)
    load_trainable(target, trainable_state_dict(source), encoder_identity(source))
    assert torch.equal(source.prompt, target.prompt)


def test_position_grid_of_another_image_size_is_no_other_encoder():
    source, target = Network(seed=1), Network(seed=2)
    target.vfm.pos_embed = nn.Parameter(torch.randn(1, 90, 6), requires_grad=False)
    load_trainable(target, trainable_state_dict(source), encoder_identity(source))
    target.vfm.proj = nn.Linear(4, 6).requires_grad_(False)
    with pytest.raises(ValueError, match=r"vfm.proj.weight is \(6, 4\) instead of \(6, 3\)"):
        load_trainable(target, trainable_state_dict(source), encoder_identity(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("prompt"), r"1 missing: prompt"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unknown: extra"),
        (lambda state: state.update(prompt=torch.zeros(4)), r"prompt \(\(4,\) in the file, \(3,\) in the model\)"),
        (lambda state: state.pop("vlm.rope"), r"1 missing: vlm.rope"),
        (lambda state: state.update(prompt=torch.ones(3).to_sparse()), r"1 of another kind: prompt .*sparse_coo"),
        (lambda state: state.update(prompt=torch.ones(3, device="meta")), r"1 of another kind: prompt .*meta"),
        (lambda state: state.update(prompt=torch.ones(3, dtype=torch.int64)), r"1 of another kind: prompt .*int64"),
    ],
)
def test_wrong_keys_are_named_and_nothing_is_loaded(change, message: str):
    source, target = Network(seed=1), Network(seed=2)
    state = trainable_state_dict(source)
    change(state)
    before = trained_state(target)
    with pytest.raises(ValueError, match=message):
        load_trainable(target, state, encoder_identity(source))
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3}, {"random": None}, {"keys": "abc"}, {"keys": [1]}, {"shapes": [[-1]]}, {"shapes": 4},
        {"sample": torch.ones(2)}, {"sample": None}, {"extra": 1},
    ],
)  # fmt: skip
def test_record_of_an_encoder_that_was_tampered_with_is_refused(change: dict):
    source, target = Network(seed=1), Network(seed=2)
    identity = encoder_identity(source)
    identity["vfm"] = {**identity["vfm"], **change}
    with pytest.raises(ValueError, match="record of the frozen encoder 'vfm' is no such record"):
        load_trainable(target, trainable_state_dict(source), identity)
    with pytest.raises(ValueError, match="'encoders' are a list"):
        load_trainable(target, trainable_state_dict(source), [identity])


def test_prefix_of_data_parallel_training_is_dropped():
    source, target = Network(seed=1), Network(seed=2)
    state = {f"module.{key}": value for key, value in trainable_state_dict(source).items()}
    load_trainable(target, state, encoder_identity(source))
    assert torch.equal(source.head[0].weight, target.head[0].weight)


def test_whole_state_without_identity_replaces_every_encoder():
    source, target = Network(seed=1), Network(seed=2, encoder_seed=5)
    load_trainable(target, copy.deepcopy(source.state_dict()))
    assert torch.equal(source.vfm.proj.weight, target.vfm.proj.weight)
