import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="the Detectron2 side needs Detectron2")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from mfuser_d2.d2.processes import synchronise_batch_norm  # noqa: E402
from mfuser_d2.d2.trainer import MFuserTrainer, source_datasets  # noqa: E402


def rows(cfg) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]


def assert_equal_states(expected: torch.nn.Module, got: torch.nn.Module) -> None:
    state = got.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_training_learns_saves_evaluates_and_reports(toy_cfg, toy_trainer_class):
    toy_cfg.SOLVER.MAX_ITER = 60
    toy_cfg.SOLVER.CHECKPOINT_PERIOD = 25
    trainer = toy_trainer_class(toy_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    folder = Path(toy_cfg.OUTPUT_DIR)
    assert {"model_0000024.pth", "model_0000049.pth", "model_final.pth"} == {f.name for f in folder.glob("*.pth")}
    losses = [row["total_loss"] for row in rows(toy_cfg) if "total_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    last = rows(toy_cfg)[-1]
    unseen = [last[f"{name}/sem_seg/mIoU"] for name in ("toynight_sem_seg_val", "toyfog_sem_seg_val")]
    assert last["mean/mIoU"] == pytest.approx(sum(unseen) / 2)
    assert "toy_sem_seg_val/sem_seg/mIoU" in last
    assert list(folder.glob("events.out.tfevents*"))
    table = json.loads((folder / "inference" / "results.json").read_text())
    assert table["sources"] == ["toy_sem_seg_val"] and table["mean"]["mIoU"] == pytest.approx(last["mean/mIoU"])


def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(toy_cfg, toy_trainer_class):
    toy_cfg.DATASETS.TEST = ()
    whole = toy_trainer_class(toy_cfg)
    whole.resume_or_load(resume=False)
    whole.train()

    class Stop(Exception):
        pass

    toy_cfg.OUTPUT_DIR += "_cut"
    cut = toy_trainer_class(toy_cfg)
    cut.resume_or_load(resume=True)
    step = cut.run_step

    def stopping_step() -> None:
        if cut.iter == 4:
            raise Stop
        step()

    cut.run_step = stopping_step
    with pytest.raises(Stop):
        cut.train()
    assert [file.name for file in Path(toy_cfg.OUTPUT_DIR).glob("*.pth")] == ["model_0000002.pth"]

    again = toy_trainer_class(toy_cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 3
    again.train()
    assert_equal_states(whole.model, again.model)


def test_only_the_newest_periodic_checkpoints_stay_also_after_resuming(toy_cfg, toy_trainer_class):
    toy_cfg.DATASETS.TEST = ()
    toy_cfg.SOLVER.CHECKPOINT_PERIOD, toy_cfg.SOLVER.CHECKPOINTS_KEPT = 1, 2
    for max_iter in (3, 6):
        toy_cfg.SOLVER.MAX_ITER = max_iter
        trainer = toy_trainer_class(toy_cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
    names = sorted(file.name for file in Path(toy_cfg.OUTPUT_DIR).glob("*.pth"))
    assert names == ["model_0000004.pth", "model_0000005.pth", "model_final.pth"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_on_the_cpu(toy_cfg, toy_trainer_class, precision: str):
    toy_cfg.DATASETS.TEST = ()
    toy_cfg.MODEL.MFUSER.PRECISION = precision
    toy_cfg.SOLVER.MAX_ITER = 40
    trainer = toy_trainer_class(toy_cfg)
    seen = []
    trainer.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {getattr(torch, precision)}
    assert trainer.model.head.weight.dtype == torch.float32
    losses = [row["total_loss"] for row in rows(toy_cfg) if "total_loss" in row]
    assert losses[-1] < losses[0]
    assert trainer._trainer.grad_scaler.is_enabled() is (precision == "float16")


def test_amp_switch_of_detectron2_means_float16(toy_cfg, toy_trainer_class):
    toy_cfg.SOLVER.AMP.ENABLED = True
    assert toy_trainer_class(toy_cfg)._trainer.dtype is torch.float16


def test_loss_that_is_not_finite_names_iteration_terms_and_images(toy_cfg, toy_trainer_class):
    toy_cfg.DATASETS.TEST = ()
    trainer = toy_trainer_class(toy_cfg)

    def spoil(module, inputs, output):
        return {**output, "loss_cls_0": output["loss_cls_0"] * float("nan")} if trainer.iter == 3 else output

    trainer.model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"iteration 3: loss_cls_0=nan.*image_0.png, image_1.png"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_gradient_that_is_not_finite_names_the_first_tensor(toy_cfg, toy_trainer_class):
    toy_cfg.DATASETS.TEST = ()
    trainer = toy_trainer_class(toy_cfg)
    trainer.model.head.bias.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(FloatingPointError, match="iteration 0: all losses are finite.*first in head.bias"):
        trainer.train()


def test_float16_gradient_that_no_loss_scale_heals_ends_the_run(toy_cfg, toy_trainer_class):
    toy_cfg.DATASETS.TEST, toy_cfg.SOLVER.MAX_ITER, toy_cfg.MODEL.MFUSER.PRECISION = (), 100, "float16"
    trainer = toy_trainer_class(toy_cfg)
    trainer.model.head.bias.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(FloatingPointError, match="iteration 16: all losses are finite.*first in head.bias"):
        trainer.train()


def test_full_model_clipping_bounds_the_update(toy_cfg, toy_trainer_class):
    toy_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    toy_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    toy_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-3
    toy_cfg.SOLVER.MAX_ITER = 1
    toy_cfg.SOLVER.WARMUP_ITERS = 0
    toy_cfg.DATASETS.TEST = ()
    trainer = toy_trainer_class(toy_cfg)
    trainer.train()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(1e-3, rel=1e-3)
    assert rows(toy_cfg)[0]["grad_norm"] > 1e-2


def test_evaluator_gets_the_run_folder_and_the_switches_of_the_config(toy_cfg, monkeypatch: pytest.MonkeyPatch):
    from mfuser_d2.d2 import trainer

    calls = []
    monkeypatch.setattr(trainer, "build_evaluator", lambda *args, **options: calls.append((args, options)))
    toy_cfg.TEST.MFUSER.ABSENT_CLASS = "zero"
    for name in toy_cfg.DATASETS.TEST:
        MFuserTrainer.build_evaluator(toy_cfg, name)
    assert [args for args, _ in calls] == [(name, toy_cfg.OUTPUT_DIR) for name in toy_cfg.DATASETS.TEST]
    assert all(options["absent_class"] == "zero" for _, options in calls)


def test_source_is_another_split_of_a_training_set(toy_cfg):
    assert source_datasets(toy_cfg) == ["toy_sem_seg_val"]


def test_synchronised_batch_norm_keeps_names_and_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    model[1][0].running_mean.fill_(2.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = synchronise_batch_norm(model).state_dict()
    assert type(model[1][0]).__name__ == "SharedBatchNorm"
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_progress_line_tells_what_one_waits_for(toy_cfg, toy_trainer_class, caplog: pytest.LogCaptureFixture):
    toy_cfg.DATASETS.TEST = ()
    toy_cfg.SOLVER.MAX_ITER = 12
    with caplog.at_level("INFO", logger="mfuser_d2.d2.hooks"):
        toy_trainer_class(toy_cfg).train()
    lines = [record.message for record in caplog.records if record.message.startswith("iter ")]
    assert len(lines) == 6
    for word in ("iter 12/12", "left 0:00:00", "loss ", "(cls ", "lr ", "s/iter", "images/s", "data ", "GiB"):
        assert word in lines[-1]
    assert "cls_0" not in lines[-1]
