"""tools/report.py from the command line, and its page in a real browser where there is one."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mfuser_d2.data.labels import CLASSES, COLORS
from mfuser_d2.evaluation import TargetRecorder, summarize

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _run_tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)


def _load_tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("report_tool", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _evaluated(folder: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    name = "streets_night_sem_seg_val"
    recorder = TargetRecorder(
        dataset_name=name,
        class_names=CLASSES,
        colors=COLORS,
        output_dir=folder / "inference" / name,
        save_predictions=True,
        save_per_image=True,
        has_confusion_picture=False,
    )
    for index in range(3):
        truth = np.full((32, 64), 13, np.uint8)
        truth[:, 32:] = 0
        prediction = np.where(generator.random(truth.shape) < 0.1 * (index + 1), 8, truth).astype(np.uint8)
        files = [str(folder / f"{index}.{suffix}") for suffix in ("jpg", "png")]
        Image.fromarray(generator.integers(0, 256, (32, 64, 3)).astype(np.uint8)).save(files[0])
        Image.fromarray(truth).save(files[1])
        recorder.add(prediction, truth, image_file=files[0], label_file=files[1])
    summarize({name: recorder.finish()}, {}, folder / "inference")
    lines = ({"iteration": k, "total_loss": 9.0 - k, "lr": 0.1} for k in range(5))
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a").mkdir()
    return _evaluated(tmp_path / "a", 0)


def test_tool_writes_the_page_where_it_says(folder, tmp_path) -> None:
    done = _run_tool(folder, folder, "--output", tmp_path / "both.html", "--names", "first", "second", "--images", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "both.html"))
    assert "Comparison with first" in (tmp_path / "both.html").read_text()


def test_wrong_input_ends_with_one_line_and_no_page(folder, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert _load_tool().main([str(tmp_path / "nothing"), "--output", str(page)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "nothing holds no evaluation" in errors
    assert not page.exists()
    with pytest.raises(SystemExit):
        _load_tool().main([str(folder), "--images", "-1"])


# Drives the page as a reader would and puts what happened into the document for --dump-dom.
DRIVER = """
<script>
window.onerror = message => document.body.dataset.error = message;
addEventListener('load', async () => {
  const seen = {}, wait = () => new Promise(done => setTimeout(done, 60));
  const key = (target, name) => target.dispatchEvent(new KeyboardEvent('keydown', {key: name, bubbles: true}));
  const tab = document.querySelectorAll('[role=tab]');
  key(tab[0], 'ArrowRight');
  seen.pane = [...document.querySelectorAll('article')].map(pane => pane.hidden);
  document.querySelectorAll('article:not([hidden]) .panel.truth')[0].click();
  await wait();
  const stage = document.querySelector('.stage'), viewer = document.querySelector('.viewer');
  const shown = layer => getComputedStyle(stage.querySelector(layer)).display !== 'none';
  seen.open = viewer.open; seen.view = stage.dataset.view; seen.cut = stage.style.getPropertyValue('--cut');
  seen.caption = document.querySelector('.caption').textContent;
  const box = stage.getBoundingClientRect();
  stage.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * .9, clientY: box.top + 5}));
  seen.reading = document.querySelector('.reading').textContent;
  key(viewer, 'ArrowLeft'); seen.cutLeft = stage.style.getPropertyValue('--cut');
  key(viewer, '5'); seen.errors = [stage.dataset.view, shown('.errors'), shown('.truth')];
  key(viewer, 'n'); seen.next = document.querySelector('.caption').textContent;
  key(document.querySelector('article:not([hidden]) .chart svg'), 'ArrowLeft');
  seen.chart = document.querySelector('article:not([hidden]) .chart output').textContent;
  viewer.close();
  document.body.style.width = '375px';
  seen.overflow = [...document.querySelectorAll('article:not([hidden]) section')]
    .some(section => section.scrollWidth > section.clientWidth + 1);
  document.body.dataset.seen = JSON.stringify(seen);
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_page_works_in_a_browser_by_keyboard(folder, tmp_path) -> None:
    page = tmp_path / "driven.html"
    assert _load_tool().main([str(folder), str(folder), "--output", str(page)]) == 0
    page.write_text(page.read_text().replace("</body>", DRIVER))
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    switches += " --disable-background-networking --disable-sync --window-size=1200,900 --virtual-time-budget=3000"
    command = [BROWSER, *switches.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "data-error" not in done.stdout
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&quot;", '"'))
    assert seen["pane"] == [True, False, True]
    assert seen["open"] and seen["view"] == "slider" and seen["cut"] == "75%" and seen["cutLeft"] == "73%"
    assert seen["reading"] in ("road, right", "truth: road · predicted: vegetation")
    assert seen["errors"] == ["errors", True, False]
    assert seen["caption"] != seen["next"] and "mIoU" in seen["next"]
    assert seen["chart"] == "iteration 3: total_loss 6"
    assert not seen["overflow"]
