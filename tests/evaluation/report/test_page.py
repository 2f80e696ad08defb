"""The whole page: self-contained, well-formed, honest about what is missing."""

import re
from html.parser import HTMLParser

import pytest

from mfuser_d2.evaluation.report import load_run, write_report

VOID = {"meta", "input", "br", "img", "line", "rect", "circle", "polyline"}


class Checker(HTMLParser):
    """Collects ids, link targets and outside references, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "aria-controls"):
                self.links.append(value.lstrip("#"))
            if name in ("src", "href") and not value.startswith(("#", "data:")):
                self.outside.append(value)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> does not match"


def _check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == [], "unclosed tags"
    return checker


@pytest.mark.parametrize("num_runs", [1, 2])
def test_page_is_well_formed_and_needs_no_other_file(make_run, num_runs) -> None:
    folders = [make_run(f"run {k} & <co>", noise=0.3 + 0.2 * k) for k in range(num_runs)]
    page = write_report(folders)
    assert page == folders[0] / "inference" / "report.html"
    text = page.read_text()
    checker = _check(text)
    assert checker.outside == [] and "http://" not in text and "https://" not in text
    assert all(uri.startswith("data:image/") for uri in re.findall(r"url\(([^v)][^)]*)\)", text))
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.links) <= set(checker.ids)
    assert "run 0 &amp; &lt;co&gt;" in text and "<co>" not in text
    assert text.count('role="tab"') == (0 if num_runs == 1 else 3)
    assert not list(page.parent.glob(".*part"))


def test_numbers_of_the_table_are_those_of_the_results(make_run) -> None:
    folder = make_run()
    text = write_report([folder]).read_text()
    run = load_run(folder)
    assert f"<b>{run.mean['mIoU']:.2f}</b><span>mean over targets</span>" in text
    row = re.search(r"<tr><th scope=\"row\"><i[^>]*></i>road</th>(.*?)</tr>", text).group(1)
    expected = [*(run.scores(target.name)["IoU-road"] for target in run.targets), run.mean["IoU-road"]]
    assert re.findall(r">(\d+\.\d\d)<", row) == [f"{value:.2f}" for value in expected]


def test_best_and_worst_images_are_shown_once_each(make_run) -> None:
    folder = make_run(num_images=5)
    text = write_report([folder], num_images=2).read_text()
    run = load_run(folder)
    night = text.split("<summary>streets_night_val</summary>")[2].split("</details>")[0]
    shown = [float(value) for value in re.findall(r"<figcaption><b>([\d.]+)</b> mIoU", night)]
    records = run.targets[1].images
    order = [records[-1], records[-2], records[0], records[1]]
    assert shown == [round(record["mIoU"], 1) for record in order]
    few = write_report([make_run("few", num_images=1)], num_images=4).read_text()
    assert few.count("<figcaption><b>") == 3
    assert "<figcaption><b>" not in write_report([folder], num_images=0).read_text()


def test_missing_parts_are_said_with_the_way_out(make_run) -> None:
    folder = make_run()
    (folder / "metrics.json").unlink()
    for target in load_run(folder).targets:
        (target.folder / "images.jsonl").unlink()
        (target.folder / "confusion.json").unlink()
    text = write_report([folder]).read_text()
    _check(text)
    assert "No metrics.json" in text and "TEST.MFUSER.SAVE_PER_IMAGE True" in text and "no confusion.json" in text


def test_a_lost_photograph_leaves_the_rest(make_run) -> None:
    folder = make_run()
    (folder / "data" / "streets_night_sem_seg_val" / "0.jpg").unlink()
    text = write_report([folder]).read_text()
    _check(text)
    assert text.count("Its files or its prediction are missing.") == 1


def test_runs_of_one_name_stay_apart(make_run, tmp_path) -> None:
    folder = make_run("same")
    text = write_report([folder, folder], tmp_path / "new" / "page.html").read_text()
    checker = _check(text)
    assert len(set(checker.ids)) == len(checker.ids) and "same (2)" in text


def test_no_runs_and_wrong_names_are_refused(make_run) -> None:
    with pytest.raises(ValueError, match="no run"):
        write_report([])
    with pytest.raises(ValueError, match="1 names for 2 runs"):
        write_report([make_run("a"), make_run("b")], names=["x"])
