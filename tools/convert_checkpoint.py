#!/usr/bin/env python
"""Turn a checkpoint of MFuser's authors into one of this package, or back.

python tools/convert_checkpoint.py --config-file configs/gta5/mfuser_eva02.yaml authors.pth converted.pth
python tools/train_net.py --config-file configs/gta5/mfuser_eva02.yaml --eval-only MODEL.WEIGHTS converted.pth

The result holds the frozen encoders too, so no publisher's file is needed beside it. `--reverse` takes a checkpoint of
this package; if that holds the trained part alone, MODEL.MFUSER.VFM.WEIGHTS and VLM.WEIGHTS have to name the encoders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mfuser_d2  # noqa: E402

try:
    mfuser_d2.require_detectron2()
except RuntimeError as error:
    sys.exit(str(error))

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from torch import Tensor  # noqa: E402

from mfuser_d2.core.checkpoint import FORMAT, load_trainable  # noqa: E402
from mfuser_d2.core.checkpoint_file import read_checkpoint, write_checkpoint  # noqa: E402
from mfuser_d2.core.official import recognize_variant, split_empty, unwrap_official  # noqa: E402
from mfuser_d2.d2 import load_config, one_line_errors  # noqa: E402
from mfuser_d2.d2.head import class_names  # noqa: E402
from mfuser_d2.d2.official import convert_official, empty_model_state, revert_official  # noqa: E402


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config of the model the checkpoint is for")
    parser.add_argument("--reverse", action="store_true", help="from this package's format to the authors'")
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help=".pth file to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    return parser.parse_args(arguments)


def to_ours(source: Path, target: Path, cfg: CfgNode) -> None:
    """Convert, write, and say which keys carried nothing."""
    official = unwrap_official(read_checkpoint(source)["model"])
    converted = convert_official(official, cfg)
    variant = recognize_variant(official)
    _, dropped = split_empty(official, variant)
    write_checkpoint(target, {"format": FORMAT, "model": converted})
    print(f"{source}: the release's {variant} variant, {len(official)} keys, {len(dropped)} of which carry nothing:")
    for reason in dict.fromkeys(dropped.values()):
        keys = [key for key, why in dropped.items() if why == reason]
        print(f"  {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {reason}")
    print(f"Wrote {target}. Use it with MODEL.WEIGHTS {target}.")


def to_theirs(source: Path, target: Path, cfg: CfgNode) -> None:
    """Revert and write with mmcv's wrapper."""
    data = read_checkpoint(source)
    official = revert_official(_whole_state(data, cfg), cfg)
    write_checkpoint(target, {"state_dict": official, "meta": {"CLASSES": tuple(class_names(cfg))}})
    print(f"Wrote {target}: {len(official)} keys under the release's names.")


def _whole_state(data: dict, cfg: CfgNode) -> dict[str, Tensor]:
    """The state dict of a file of ours, completed by the encoders that the config names."""
    state = {key.removeprefix("module."): value for key, value in data["model"].items()}
    if all(key in state for key in empty_model_state(cfg)):
        return state
    node = cfg.MODEL.MFUSER
    if not (node.VFM.WEIGHTS and node.VLM.WEIGHTS):
        raise ValueError(
            "the checkpoint lacks the frozen encoders, and the config does not say where they are; set "
            "MODEL.MFUSER.VFM.WEIGHTS and MODEL.MFUSER.VLM.WEIGHTS to the files it was trained with"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    load_trainable(model, state, data.get("encoders"))
    return model.state_dict()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with one_line_errors():
        if args.target.suffix not in (".pth", ".pt"):
            raise ValueError(f"DST {args.target} has to end in .pth: it is written as a PyTorch file")
        if args.target.resolve() == args.source.resolve():
            raise ValueError(f"SRC and DST are both {args.source}; write to another file")
        if not args.target.resolve().parent.is_dir():
            raise FileNotFoundError(f"the folder of DST {args.target} does not exist; make it first")
        cfg = load_config(args.config_file, args.opts)
        (to_theirs if args.reverse else to_ours)(args.source, args.target, cfg)


if __name__ == "__main__":
    main()
