"""Detectron2's checkpointer over the files of `mfuser_d2.core.checkpoint`."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from mfuser_d2.core.checkpoint import FORMAT, encoder_identity, load_trainable, trainable_state_dict
from mfuser_d2.core.checkpoint_file import (
    DamagedFileError,
    check_kinds,
    read_checkpoint,
    write_checkpoint,
    write_text,
)
from mfuser_d2.d2.official import convert_official as convert_official  # a stable name of this module

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d+)\.pth")


class MFuserCheckpointer(DetectionCheckpointer):
    """Saves what is trained and the identity of the frozen encoders; refuses to load onto others.

    A file holds the trained parameters and their batch statistics (0.5 GB for the full-size EVA02 variant, 1.4 with the
    optimizer's state, where all weights alone would take 3.4), a sample of the frozen weights to recognise them by, and
    whatever else is given to checkpoint (optimizer, iteration). Encoders with random weights
    (MODEL.MFUSER.{VFM,VLM}.WEIGHTS "") are stored whole: they cannot be had from anywhere else. A file is written
    beside its place, synced and renamed, and `last_checkpoint` moves after that, so it always names a whole file.

    Loading takes these files, those of tools/plain_train.py, and converted checkpoints of the authors that hold the
    encoders as well. It is strict: keys that are missing, unknown or of another shape are errors, and the model is left
    as it was. Where the newest file to resume from is damaged, that is reported and the one before it is used.
    """

    resumed_from = ""
    """The file that training goes on from, "" for a new training."""
    damaged: tuple[str, ...] = ()
    """The newer files that could not be read."""

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

    def get_checkpoint_file(self) -> str:
        """The file that `last_checkpoint` names, always one in this folder; "" where there is none."""
        try:
            name = Path(self.save_dir, "last_checkpoint").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        name = Path(name.replace("\0", "")).name
        return os.path.join(self.save_dir, name) if name.endswith(".pth") else ""

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from."""
        return bool(self.candidates())

    def candidates(self) -> list[str]:
        """Files to resume from, best first: the one `last_checkpoint` names, then those of earlier iterations.

        Numbered files of later iterations are left over from another run in the folder. Where `last_checkpoint` is
        missing or spoiled, all numbered files count.
        """
        last = self.get_checkpoint_file()
        numbered = numbered_checkpoints(self.save_dir)
        match = _NUMBERED.fullmatch(os.path.basename(last))
        newest = int(match[1]) if match else None
        earlier = [path for number, path in sorted(numbered.items(), reverse=True) if newest is None or number < newest]
        return [last, *earlier] if last else earlier

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a file; with all `checkpointables` (None) where training resumes, with [] for the model alone.

        Returns:
            What else the file holds.
        Raises:
            FileNotFoundError, ValueError: see `read_checkpoint` and `load_trainable`; also a file to resume from that
                has no training state, or that of another model or optimizer. The model is left as it was.
        """
        if not path:
            logger.info("MODEL.WEIGHTS is empty: the trained part starts from its initial values.")
            return {}
        try:
            if "://" not in path and not os.path.isfile(path):
                raise FileNotFoundError(f"Checkpoint {path} does not exist; check MODEL.WEIGHTS or OUTPUT_DIR.")
            rest = super().load(path, [])
        finally:
            self._parsed_url_during_load = None  # the base class leaves it behind when reading fails
            self._required = ()
        self._load_others(path, rest, list(self.checkpointables) if checkpointables is None else checkpointables)
        return rest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the newest whole checkpoint with all training state, or load only the weights of `path`.

        Raises:
            DamagedFileError: there are checkpoints to resume from, but none of them can be read.
        """
        self.resumed_from, self.damaged = "", ()
        found = self.candidates() if resume else []
        problems = []
        for candidate in found:
            self._required = tuple(self.checkpointables)
            try:
                rest = self.load(candidate)
            except (DamagedFileError, FileNotFoundError) as error:
                logger.error("%s", error)
                problems.append(str(error))
                self.damaged = (*self.damaged, candidate)
                continue
            if problems:
                logger.warning("Going on from %s, the newest checkpoint that is whole.", candidate)
            self.resumed_from = candidate
            return rest
        if found:
            raise DamagedFileError(
                f"None of the {len(found)} checkpoints in {self.save_dir} can be read ({problems[0]}). Bring a copy, "
                "or start a new training: leave --resume out or change OUTPUT_DIR."
            )
        return self.load(path, [])

    _required: tuple[str, ...] = ()
    _before: dict[str, Any] = {}

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
        if self._required:
            self._before = {key: value.clone() for key, value in trainable_state_dict(self.model).items()}
        load_trainable(self.model, checkpoint.pop("model"), checkpoint.pop("encoders", None))

    def _load_others(self, path: str, rest: dict[str, Any], names: list[str]) -> None:
        """Hand the training state to its owners; where one of them cannot use it, the model gets its weights back."""
        try:
            for name in names:
                if name in rest:
                    check_kinds(self.checkpointables[name].state_dict(), rest[name], name)
                    self.checkpointables[name].load_state_dict(rest.pop(name))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            if self._before:
                self.model.load_state_dict(self._before, strict=False)
            raise ValueError(
                f"The training state {name!r} in {path} does not fit this run ({type(error).__name__}: {error}), so "
                "training cannot go on from it. Use the config it was trained with, or give the file as MODEL.WEIGHTS "
                "without --resume to start anew from its weights."
            ) from error
        finally:
            self._before = {}


def numbered_checkpoints(folder: str | Path) -> dict[int, str]:
    """The files model_<iteration>.pth of a folder by their iteration."""
    matches = ((path, _NUMBERED.fullmatch(path.name)) for path in Path(folder).glob("model_*.pth"))
    return {int(match[1]): str(path) for path, match in matches if match}
