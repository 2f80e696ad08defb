"""Videos and cameras, frame by frame, through OpenCV."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
"""Kinds of files that can be written, and their codecs: those that every build of OpenCV with FFmpeg brings."""
READ_SUFFIXES = frozenset((*VIDEO_SUFFIXES, ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts", ".3gp", ".ogv"))
_USUAL_RATE = 25.0


class VideoReader:
    """Frames of a video file or a camera.

    Args:
        source: a file, or a camera's number.
    Attributes:
        frame_rate: frames per second; 25 where the source does not say.
        announced: frames that the file's header announces; 0 where it does not say. Often an estimate.
        count: frames read so far.
    Raises:
        FileNotFoundError: no such file.
        ValueError: OpenCV cannot read it, or there is no such camera.
    """

    def __init__(self, source: str | Path | int) -> None:
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        if not isinstance(source, int) and not Path(source).is_file():
            raise FileNotFoundError(f"video {source} does not exist")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            hint = "is it connected, and free?" if isinstance(source, int) else "it is no video that OpenCV can read"
            raise ValueError(f"{self.name} cannot be opened; {hint}")
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        if not 0 < rate < 1000:  # 0 or NaN where unknown; some files give their clock's rate
            logger.warning("%s does not state a frame rate; %g per second is taken", self.name, _USUAL_RATE)
            rate = _USUAL_RATE
        self.frame_rate = rate
        self.announced = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.count = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, one after the other, turned upright."""
        while True:
            has_frame, frame = self._capture.read()
            if not has_frame:
                return
            self.count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    @property
    def ended_early(self) -> bool:
        """Whether, after the last frame, clearly fewer frames came than the header announces."""
        return self.count < 0.98 * self.announced - 2

    def close(self) -> None:
        self._capture.release()


class VideoWriter:
    """Writes frames to a video; the first one sets the size. A context manager: the file is whole after it.

    Args:
        path: the suffix chooses the format, see VIDEO_SUFFIXES.
        frame_rate: frames per second.
    Raises:
        ValueError: an unknown suffix.
    """

    def __init__(self, path: str | Path, *, frame_rate: float) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise ValueError(f"{path}: videos can be written as {', '.join(sorted(VIDEO_SUFFIXES))}")
        self.frame_rate = frame_rate
        self.size: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Append (H, W, 3) uint8 RGB.

        Codecs need even sizes: a last odd row or column is not written.

        Raises:
            ValueError: a frame of another size than the first.
            OSError: the file cannot be written.
        """
        if self._writer is None:
            self._open(frame.shape[:2])
        if frame.shape[:2] != self.size:
            raise ValueError(f"{self.path}: a frame is {frame.shape[:2]} in a video of {self.size} (height, width)")
        even = frame[: self.size[0] // 2 * 2, : self.size[1] // 2 * 2]
        self._writer.write(cv2.cvtColor(np.ascontiguousarray(even), cv2.COLOR_RGB2BGR))

    def _open(self, size: tuple[int, int]) -> None:
        height, width = (edge // 2 * 2 for edge in size)
        if min(height, width) < 2:
            raise ValueError(f"{self.path}: a video needs at least 2x2 pixels, got {size[0]}x{size[1]}")
        code = cv2.VideoWriter_fourcc(*VIDEO_SUFFIXES[self.path.suffix.lower()])
        self._writer = cv2.VideoWriter(str(self.path), code, self.frame_rate, (width, height))
        if not self._writer.isOpened():
            raise OSError(
                f"{self.path} cannot be written: no permission, or this OpenCV lacks the codec; try another suffix of "
                f"{', '.join(sorted(VIDEO_SUFFIXES))}"
            )
        self.size = size

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
            if kind is None and not (self.path.is_file() and self.path.stat().st_size):
                raise OSError(f"{self.path} was not written; is the disk full?")
