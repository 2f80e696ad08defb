import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "analyze_model.py"
QUICKSTART = ROOT / "configs" / "quickstart" / "mfuser_tiny_eva02.yaml"

spec = importlib.util.spec_from_file_location("analyze_model", TOOL)
analyze_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(analyze_model)


@pytest.mark.parametrize(
    ("name", "parameters", "flops", "tolerance"),
    [
        ("self_attention_concat", 4.20e6, 98.64e9, 0.01),
        ("self_attention_separate", 8.40e6, 71.08e9, 0.01),
        ("mvfuser", 1.67e6, 17.21e9, 0.01),
        ("deformable", 3.35e6, 34.65e9, 0.02),
    ],
)
def test_the_papers_table_comes_out_of_the_modules(
    name: str, parameters: float, flops: float, tolerance: float
) -> None:
    found = analyze_model.adapter_cost(name)
    assert found == (pytest.approx(parameters, rel=tolerance), pytest.approx(flops, rel=tolerance))


def test_adapters_report_needs_no_config() -> None:
    command = [sys.executable, str(TOOL), "--tasks", "adapters"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert rows["self_attention_concat"][:4] == ["4.20", "98.64", "4.20", "98.64"]
    assert rows["none"] == ["0.00", "0.00", "-", "-", "-", "-"]
    assert "x states x tokens" in done.stdout


def test_every_task_on_a_config_with_changed_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("detectron2", reason="configs are read by Detectron2")
    keys = ["MODEL.MFUSER.ADAPTER.NAME", "none", "MODEL.MFUSER.CHECKPOINT", "True"]
    tasks = ["--tasks", "parameter", "flop", "activation", "structure"]
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--config-file", str(QUICKSTART), *tasks, *keys])
    analyze_model.main()
    parameters, flops, activations, structure = capsys.readouterr().out.split("\n\n")
    rows = {line.rsplit(None, 2)[0].strip(): line.split()[-2:] for line in parameters.splitlines()}
    assert "adapters" not in rows and rows["prompts or queries"] == ["256", "0"]
    numbers = [[int(value.replace(",", "")) for value in values] for part, values in list(rows.items())[1:]]
    assert numbers[-1] == [sum(column) for column in zip(*numbers[:-1])]
    assert "pixel decoder" in flops and "FLOPs (G), one window of 128x128" in flops
    assert "activations (MiB), 8 crops of 128x128" in activations
    assert "0..2, each: TransformerDecoderLayer" in structure


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "flops"), "flops: unknown; choose from"),
        (("--tasks", "flop"), "need --config-file"),
        (("--config-file", "nowhere.yaml"), "nowhere.yaml does not exist"),
    ],
)
def test_wrong_use_says_what_to_do(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "--config-file":
        pytest.importorskip("detectron2", reason="configs are read by Detectron2")
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", *words])
    with pytest.raises(SystemExit) as stopped:
        analyze_model.main()
    assert stopped.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(stopped.value.code)
