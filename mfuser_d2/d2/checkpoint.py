"""Detectron2's checkpointer over the files of `mfuser_d2.core.checkpoint`."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, load_trainable, trainable_state_dict
from mfuser_d2.core.checkpoint_file import read_checkpoint, write_checkpoint, write_text
from mfuser_d2.d2.official import convert_official as convert_official

logger = logging.getLogger(__name__)


class MFuserCheckpointer(DetectionCheckpointer):
    """Saves what is trained and the identity of the frozen encoders; refuses to load onto others.

    A file holds the trained parameters and their batch statistics (0.5 GB for the full-size EVA02 variant, 1.4 with the
    optimizer's state, where all weights alone would take 3.4), a sample of the frozen weights to recognise them by, and
    whatever else is given to checkpoint (optimizer, iteration). Encoders with random weights
    (MODEL.MFUSER.{VFM,VLM}.WEIGHTS "") are stored whole: they cannot be had from anywhere else. A file is written
    beside its place, synced and renamed, and `last_checkpoint` moves after that, so it always names a whole file.

    Loading takes these files, those of tools/plain_train.py, and converted checkpoints of the authors that hold the
    encoders as well. It is strict: keys that are missing, unknown or of another shape are errors, and the model is left
    as it was.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write OUTPUT_DIR/`name`.pth on the main process; `kwargs` go into the file as well."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {
            "format": FORMAT,
            "model": trainable_state_dict(self.model),
            "encoders": encoder_identity(self.model),
            **{key: item.state_dict() for key, item in self.checkpointables.items()},
            **kwargs,
        }
        path = os.path.join(self.save_dir, f"{name}.pth")
        write_checkpoint(path, data)
        logger.info("Saved checkpoint %s (%.1f MB)", path, os.path.getsize(path) / 1e6)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make `last_checkpoint` name this file; it never names a part of one."""
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file; with all `checkpointables` (None) where training resumes, with [] for the model alone.

        Returns:
            What else the file holds.
        Raises:
            FileNotFoundError, ValueError: see `read_checkpoint` and `load_trainable`; also a file to resume from that
                has no training state.
        """
        if not path:
            logger.info("MODEL.WEIGHTS is empty: the trained part starts from its initial values.")
            return {}
        try:
            if "://" not in path and not os.path.isfile(path):
                raise FileNotFoundError(f"Checkpoint {path} does not exist; check MODEL.WEIGHTS or OUTPUT_DIR.")
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # the base class leaves it behind when reading fails
            self._required = ()

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from `last_checkpoint` with all training state, or load only the weights of `path`."""
        if resume and self.has_checkpoint():
            self._required = tuple(self.checkpointables)
        return super().resume_or_load(path, resume=resume)

    _required: tuple[str, ...] = ()

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = read_checkpoint(filename)
        missing = [key for key in self._required if key not in data]
        if missing:
            raise ValueError(
                f"{filename} holds weights but no training state ({', '.join(missing)}), so training cannot go on from "
                "it. Leave --resume out and give it as MODEL.WEIGHTS to start a new training from its weights."
            )
        return data

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        load_trainable(self.model, checkpoint.pop("model"), checkpoint.pop("encoders", None))
