"""The benchmark tool prints rows that hold what its tables are made of."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

TINY = "--device cpu --repeats 1 --threads 1"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the tool puts its own folders in front
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOLS / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(output):
    return [json.loads(line) for line in output.splitlines()]


def test_scan_measures_each_backend_against_the_reference(benchmark, capsys):
    arguments = (
        "scan --device cpu --lengths 8 16 --channels 4 --states 2 --repeats 1 --threads 1 --backends torch reference"
    )
    assert benchmark.main(arguments.split()) == 0
    machine, *rows = rows_of(capsys.readouterr().out)
    assert machine["benchmark"] == "machine" and machine["cores"] >= 1
    rows = [row for row in rows if row["benchmark"] == "scan"]
    assert {(row["backend"], row["direction"], row["length"]) for row in rows} == {
        (backend, direction, length)
        for backend in ("torch", "reference")
        for direction in ("forward", "forward_backward")
        for length in (8, 16)
    }
    for row in rows:
        assert 0 < row["seconds"] <= row["median_seconds"]
        assert row["error"] < 1e-5
        if row["backend"] == "reference":
            assert row["seconds_against_reference"] == 1


def test_scan_says_why_a_backend_is_left_out(benchmark, capsys):
    benchmark.main(
        "scan --device cpu --lengths 8 --channels 4 --states 2 --repeats 1 --threads 1 --backends mamba_ssm".split()
    )
    assert "GPU" in rows_of(capsys.readouterr().out)[1]["skipped"]


def test_adapter_measures_what_is_asked(benchmark, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    plot = tmp_path / "adapter.png"
    arguments = f"adapter {TINY} --sides 2 3 --width 16 --adapters mvfuser --plot {plot}"
    assert benchmark.main(arguments.split()) == 0
    rows = [row for row in rows_of(capsys.readouterr().out) if row["benchmark"] == "adapter"]
    assert [row["tokens"] for row in rows] == [8, 8, 18, 18]
    assert plot.stat().st_size > 1000


def test_exponent_is_the_slope_of_the_cost(benchmark):
    from benchmarks.measure import cost_exponents

    rows = [{"length": 2**k, "seconds": 2.0**k, "cpu_seconds": 3.0 * 4.0**k} for k in range(8)]
    assert cost_exponents(rows, "length", 2, 64) == pytest.approx({"exponent": 1.0, "cpu_exponent": 2.0})
    assert cost_exponents(rows[:2], "length", 1, 64) == {}


def test_unknown_benchmark_is_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["nothing"])
    assert "scan" in capsys.readouterr().err
