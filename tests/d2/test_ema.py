"""The average of the weights in a Detectron2 run."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402

from mfuser_d2.core.checkpoint_file import read_checkpoint  # noqa: E402


@pytest.fixture
def ema_cfg(toy_cfg):
    toy_cfg.SOLVER.EMA_DECAY = 0.9
    toy_cfg.DATASETS.TEST = ()
    return toy_cfg


def run(cfg, trainer_class):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def test_average_is_written_beside_the_last_weights(ema_cfg, toy_trainer_class) -> None:
    trainer = run(ema_cfg, toy_trainer_class)
    folder = Path(ema_cfg.OUTPUT_DIR)
    average = read_checkpoint(str(folder / "model_final_ema.pth"))["model"]
    assert trainer.average.num_updates == ema_cfg.SOLVER.MAX_ITER
    assert not torch.equal(average["head.weight"], trainer.model.head.weight)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    other = toy_trainer_class.build_model(ema_cfg)
    from mfuser_d2.d2.checkpoint import MFuserCheckpointer

    MFuserCheckpointer(other).load(str(folder / "model_final_ema.pth"), checkpointables=[])
    assert torch.equal(other.head.weight, average["head.weight"])


def test_evaluation_uses_the_average_and_training_goes_on_from_its_own_weights(ema_cfg, toy_trainer_class) -> None:
    seen = {}
    ema_cfg.DATASETS.TEST = ("toy_sem_seg_val",)
    ema_cfg.TEST.EVAL_PERIOD = 100  # at the end only

    class Watching(toy_trainer_class):
        @classmethod
        def test(cls, cfg, model, evaluators=None, *, weights=None):
            seen["weights"], seen["head"] = weights, model.head.weight.detach().clone()
            return {}

    trainer = run(ema_cfg, Watching)
    average = trainer.average.state_dict()["average"]["head.weight"]
    assert torch.equal(seen["head"], average) and seen["weights"].endswith("averaged")
    assert not torch.equal(trainer.model.head.weight, average)


def test_a_resumed_run_ends_with_the_average_of_an_uninterrupted_one(ema_cfg, toy_trainer_class) -> None:
    whole = run(ema_cfg, toy_trainer_class)
    ema_cfg.OUTPUT_DIR += "_cut"
    first = toy_trainer_class(ema_cfg)
    first.resume_or_load(resume=True)
    first.max_iter = 3
    first.train()
    Path(ema_cfg.OUTPUT_DIR, "model_final.pth").unlink(missing_ok=True)
    Path(ema_cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000002.pth")
    resumed = run(ema_cfg, toy_trainer_class)
    for key, value in whole.average.state_dict()["average"].items():
        assert torch.equal(value, resumed.average.state_dict()["average"][key]), key


def test_without_a_decay_there_is_no_average(toy_cfg, toy_trainer_class) -> None:
    toy_cfg.DATASETS.TEST = ()
    toy_cfg.SOLVER.MAX_ITER = 3
    assert run(toy_cfg, toy_trainer_class).average is None
    assert not Path(toy_cfg.OUTPUT_DIR, "model_final_ema.pth").exists()
