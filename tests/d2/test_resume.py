"""What a run that was cut off anywhere goes on from, and what it ends with."""

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

from mfuser_d2.core.checkpoint_file import DamagedFileError, read_checkpoint  # noqa: E402
from mfuser_d2.d2.metrics import MetricsFile, put_history, recent_history  # noqa: E402

CLOCKS = {"time", "data_time"}


class Cut(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.fixture
def train(toy_cfg, toy_trainer_class, tmp_path: Path):
    """Train into a folder, optionally cut off in the middle of something."""
    toy_cfg.SOLVER.MAX_ITER, toy_cfg.SOLVER.CHECKPOINT_PERIOD, toy_cfg.SOLVER.LOG_PERIOD = 12, 2, 3
    toy_cfg.SOLVER.EMA_DECAY, toy_cfg.TEST.EVAL_PERIOD = 0.5, 4

    def run(name: str, *, cut=None, resume: bool = True, **solver):
        cfg = toy_cfg.clone()
        cfg.OUTPUT_DIR = str(tmp_path / name)
        for key, value in solver.items():
            cfg.SOLVER[key] = value
        trainer = toy_trainer_class(cfg)
        trainer.resume_or_load(resume=resume)
        if cut is None:
            trainer.train()
            return trainer
        cut(trainer)
        with pytest.raises(Cut):
            trainer.train()
        return trainer

    return run


def at_step(number: int):
    def cut(trainer) -> None:
        step = trainer.run_step

        def stopping() -> None:
            if trainer.iter == number:
                raise Cut
            step()

        trainer.run_step = stopping

    return cut


def before_checkpoint(number: int):
    """After the row of metrics.json and the evaluation before it, when the file is about to be written."""

    def cut(trainer) -> None:
        save = trainer.checkpointer.save

        def stopping(name: str, **kwargs) -> None:
            if trainer.iter == number:
                raise Cut
            save(name, **kwargs)

        trainer.checkpointer.save = stopping

    return cut


def in_evaluation(number: int):
    def cut(trainer) -> None:
        calls = []
        test = type(trainer).test

        def stopping(*args, **kwargs):
            calls.append(0)
            if len(calls) == number:
                raise Cut
            return test(*args, **kwargs)

        trainer.test = stopping

    return cut


def between_final_files(trainer) -> None:
    save = trainer.checkpointer.save

    def stopping(name: str, **kwargs) -> None:
        if name == "model_final":
            raise Cut
        save(name, **kwargs)

    trainer.checkpointer.save = stopping


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def assert_same(expected: object, got: object, path: str = "") -> None:
    if path.rsplit("/", 1)[-1] in CLOCKS:
        return
    if isinstance(expected, dict):
        assert list(expected) == list(got), path
        for key in expected:
            assert_same(expected[key], got[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got), path
    else:
        assert expected == got, path


CUTS = [
    [at_step(0)], [at_step(3)], [at_step(5), at_step(6), at_step(11)], [before_checkpoint(1)], [before_checkpoint(5)],
    [before_checkpoint(11)], [in_evaluation(1)], [in_evaluation(2)], [in_evaluation(3)], [between_final_files],
]  # fmt: skip


@pytest.mark.parametrize("cuts", CUTS, ids=range(len(CUTS)))
def test_run_cut_off_anywhere_ends_as_one_left_alone(train, tmp_path: Path, cuts: list):
    """Weights, average, optimizer, schedule, recent numbers; rows of metrics.json, none missing and none twice."""
    train("whole")
    for cut in cuts:
        train("cut", cut=cut)
    train("cut")
    for name in ("model_final.pth", "model_final_ema.pth", "model_0000011.pth"):
        assert_same(read_checkpoint(tmp_path / "whole" / name), read_checkpoint(tmp_path / "cut" / name))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert [row["iteration"] for row in rows(tmp_path / "cut")] == [2, 3, 5, 7, 8, 11, 12]


def test_seed_that_the_config_leaves_open_is_kept_with_the_run(train, toy_cfg, tmp_path: Path):
    toy_cfg.SEED = -1
    first = train("run", cut=at_step(5))
    again = train("run")
    assert again.cfg.SEED == first.cfg.SEED >= 0 and again._trainer.seed == first.cfg.SEED


def test_resuming_with_another_batch_size_uses_no_image_twice(train, toy_cfg):
    toy_cfg.SOLVER.IMS_PER_BATCH = 2
    train("run", cut=at_step(5))  # the newest checkpoint has seen 4 batches of 2
    toy_cfg.SOLVER.IMS_PER_BATCH = 3
    again = train("run", cut=at_step(6))
    assert again.start_iter == 4 and again._trainer.data_loader.start_iter == 3
    assert read_checkpoint(again.checkpointer.get_checkpoint_file())["trainer"]["draws"] == 8 + 2 * 3


def damage(path: Path) -> None:
    """Alter one byte of the weights: torch would load the file."""
    content = bytearray(path.read_bytes())
    where = content.index(torch.load(path)["model"]["head.weight"].numpy().tobytes())
    content[where + 2] ^= 8
    path.write_bytes(content)


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(train, tmp_path: Path, caplog):
    train("whole")
    train("cut", cut=at_step(7))
    damage(tmp_path / "cut" / "model_0000005.pth")
    again = train("cut", cut=at_step(4))
    assert again.start_iter == 4
    assert "model_0000005.pth" in caplog.text and "a checksum in it does not fit" in caplog.text
    assert "Going on from" in caplog.text
    train("cut")
    assert_same(read_checkpoint(tmp_path / "whole/model_final.pth"), read_checkpoint(tmp_path / "cut/model_final.pth"))


def test_run_with_damaged_checkpoints_alone_does_not_begin_again(train, tmp_path: Path):
    train("run", cut=at_step(7))
    for path in (tmp_path / "run").glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match="None of the 2 checkpoints .* Bring a copy"):
        train("run")


@pytest.mark.parametrize("mark", [None, "", "\0\n", "../../etc/passwd", "model_9999999.pth"])
def test_lost_or_spoiled_mark_falls_back_to_the_newest_file(train, tmp_path: Path, mark: str | None):
    train("run", cut=at_step(7))
    path = tmp_path / "run" / "last_checkpoint"
    path.unlink() if mark is None else path.write_text(mark)
    assert train("run", cut=at_step(8)).start_iter == 6


def test_files_of_another_run_are_not_what_to_fall_back_to(train, tmp_path: Path):
    train("run", cut=at_step(7))
    folder = tmp_path / "run"
    (folder / "model_0000005.pth").rename(folder / "model_0000500.pth")
    assert train("run", cut=at_step(5)).start_iter == 4


@pytest.mark.parametrize("kept", [1, 2])
def test_only_good_checkpoint_outlives_damaged_ones(train, tmp_path: Path, kept: int):
    """The good file is the oldest and everything newer is damaged: each save must leave a whole file behind."""
    folder = tmp_path / "run"
    train("run", cut=at_step(9), CHECKPOINTS_KEPT=4)
    for name in ("model_0000005.pth", "model_0000007.pth"):
        damage(folder / name)
    whole = []

    def watch(trainer) -> None:
        at_step(10)(trainer)
        save = trainer.checkpoints.save

        def saving() -> None:
            save()
            whole.append({path.name for path in folder.glob("model_0*.pth") if is_whole(path)})

        trainer.checkpoints.save = saving

    train("run", cut=watch, CHECKPOINTS_KEPT=kept)
    newest = [f"model_{number:07d}.pth" for number in (5, 7, 9)]
    assert len(whole) >= 3 and all(whole)
    assert {path.name for path in folder.glob("model_0*.pth")} == set(newest[-kept:])


def is_whole(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path))
    except DamagedFileError:
        return False


def test_training_state_of_another_model_is_refused_and_nothing_is_changed(
    train, toy_cfg, toy_trainer_class, tmp_path: Path
):
    train("run", cut=at_step(7))
    path = tmp_path / "run" / "model_0000005.pth"
    data = torch.load(path)
    data["trainer"]["_trainer"]["optimizer"]["param_groups"].pop()
    torch.save(data, path)
    trainer = toy_trainer_class(toy_cfg)
    trainer.checkpointer.save_dir = str(tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="'trainer' in .*model_0000005.pth does not fit this run"):
        trainer.resume_or_load(resume=True)
    assert_same(before, dict(trainer.model.state_dict()))


def test_unfinished_files_of_a_killed_writer_are_removed(train, tmp_path: Path):
    train("run", cut=at_step(3))
    left = tmp_path / "run" / ".model_0000003.pth.4711.tmp"
    left.write_bytes(b"half")
    train("run", cut=at_step(4))
    assert not left.exists()


def test_new_run_sets_the_metrics_of_an_old_one_aside(train, tmp_path: Path):
    train("run", cut=at_step(5), resume=False)
    old = rows(tmp_path / "run")
    train("run", resume=False)
    assert [json.loads(line)["iteration"] for line in (tmp_path / "run/metrics.json.1").read_text().splitlines()] == [
        row["iteration"] for row in old
    ]
    assert len(rows(tmp_path / "run")) == 7


def test_metrics_file_leaves_out_half_lines_and_what_is_no_json_number(tmp_path: Path):
    file = MetricsFile(tmp_path / "new" / "metrics.json")
    file.append(1, {"a": 0.5, "b": float("inf")})
    file.append(2, {"a": 0.25})
    with open(file.path, "a") as stream:
        stream.write('{"a": 0.1, "itera')
    assert file.rows() == [{"a": 0.5, "iteration": 1}, {"a": 0.25, "iteration": 2}]
    file.cut(2)
    assert file.path.read_text() == '{"a": 0.5, "iteration": 1}\n'


def test_medians_after_a_restart_are_those_of_an_uninterrupted_run():
    with EventStorage() as whole:
        for step in range(50):
            whole.iter = step
            whole.put_scalar("loss", float(step * 7 % 13))
    with EventStorage() as first:
        for step in range(33):
            first.iter = step
            first.put_scalar("loss", float(step * 7 % 13))
        state = recent_history(first)
    with EventStorage(33) as second:
        put_history(second, state)
        for step in range(33, 50):
            second.iter = step
            second.put_scalar("loss", float(step * 7 % 13))
            if step in (33, 40):
                assert len(second.history("loss").values()) == 20 + step - 32
    assert whole.latest_with_smoothing_hint(20) == second.latest_with_smoothing_hint(20)
