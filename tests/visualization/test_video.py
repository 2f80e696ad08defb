"""Videos are written with the size and rate asked for, read back, and refused where they are none."""

import logging

import numpy as np
import pytest

from mfuser_d2.visualization.video import VIDEO_SUFFIXES, VideoReader, VideoWriter


def write(path, count=6, size=(48, 64), rate=12.5):
    with VideoWriter(path, frame_rate=rate) as writer:
        for index in range(count):
            frame = np.zeros((*size, 3), np.uint8)
            frame[..., 0] = 40 * index % 256  # red
            writer.write(frame)
    return path


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_round_trip(tmp_path, suffix):
    reader = VideoReader(write(tmp_path / f"a{suffix}"))
    frames = list(reader)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 6
    assert reader.frame_rate == pytest.approx(12.5, rel=0.01) and not reader.ended_early
    red = [frame[..., 0].mean() for frame in frames]
    assert np.abs(np.array(red) - 40 * np.arange(6)).max() < 25 and frames[5][..., 2].mean() < 40


def test_odd_edges_are_cut(tmp_path):
    assert next(iter(VideoReader(write(tmp_path / "a.mp4", size=(49, 65))))).shape == (48, 64, 3)


def test_a_video_that_ends_early_is_noticed(tmp_path):
    path = write(tmp_path / "a.avi", count=30, size=(240, 320))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    reader = VideoReader(path)
    frames = len(list(reader))
    assert 0 < frames < 28 and (reader.ended_early or reader.announced <= frames + 2)
    reader.announced = 30
    assert reader.ended_early


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match="a.mp4 cannot be opened"):
        VideoReader(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        VideoReader(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="camera 97"):
        VideoReader(97)


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4"):
        VideoWriter(tmp_path / "a.gif", frame_rate=5)
    with pytest.raises(ValueError, match="at least 2x2"), VideoWriter(tmp_path / "a.mp4", frame_rate=5) as writer:
        writer.write(np.zeros((1, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="in a video of"), VideoWriter(tmp_path / "b.mp4", frame_rate=5) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8))
        writer.write(np.zeros((8, 10, 3), np.uint8))
    with pytest.raises(OSError, match="cannot be written"), VideoWriter(tmp_path / "no" / "a.mp4", frame_rate=5) as w:
        w.write(np.zeros((8, 8, 3), np.uint8))


def test_an_unknown_rate_is_said(tmp_path, monkeypatch, caplog):
    import cv2

    class Silent:
        def __init__(self, source): ...
        def isOpened(self):
            return True

        def get(self, key):
            return float("nan") if key == cv2.CAP_PROP_FPS else -1.0

    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    with caplog.at_level(logging.WARNING):
        reader = VideoReader(0)
    assert reader.frame_rate == 25 and reader.announced == 0 and "frame rate" in caplog.text
