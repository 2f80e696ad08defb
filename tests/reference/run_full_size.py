"""Convert a full-size checkpoint in the authors' format, evaluate one crop with it, and print time and memory as JSON.

python tests/reference/run_full_size.py configs/gta5/mfuser_eva02.yaml keys_eva02.json FOLDER

FOLDER takes two files of 3 to 5 GB, which are removed again.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from detectron2.modeling import build_model  # noqa: E402

from mfuser_d2.d2 import MFuserCheckpointer, load_config  # noqa: E402


def random_checkpoint(keys: dict) -> dict:
    """mmcv's wrapper around small random tensors of the recorded names, shapes and types."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape, dtype, _ in keys["keys"]:
        if not getattr(torch, dtype).is_floating_point:
            state[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
            continue
        state[key] = torch.empty(shape).normal_(std=0.02, generator=generator)
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_1.weight", "ln_2.weight", "running_var")):
            state[key] += 1
    return {"meta": {"CLASSES": tuple(keys["class_names"])}, "state_dict": state}


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main(config: str, keys_file: str, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    official, converted = Path(folder) / "official.pth", Path(folder) / "converted.pth"
    report: dict[str, float] = {}
    try:
        torch.save(random_checkpoint(json.loads(Path(keys_file).read_text())), official)
        start = time.perf_counter()
        tool.main(["--config-file", config, str(official), str(converted)])
        report |= {"convert_s": time.perf_counter() - start, "convert_peak_gib": peak_gib()}
        official.unlink()
        start = time.perf_counter()
        model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"])).eval()
        report["build_s"] = time.perf_counter() - start
        start = time.perf_counter()
        MFuserCheckpointer(model).load(str(converted), [])
        report["load_s"] = time.perf_counter() - start
    finally:
        official.unlink(missing_ok=True)
        converted.unlink(missing_ok=True)
    image = torch.randint(0, 256, (3, 512, 512), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    start = time.perf_counter()
    scores = model([{"image": image, "height": 512, "width": 512}])[0]["sem_seg"]
    report |= {"crop_s": time.perf_counter() - start, "peak_gib": peak_gib()}
    if scores.shape != (19, 512, 512) or not bool(scores.isfinite().all()) or float(scores.std()) == 0:
        sys.exit(f"the scores are no scores: shape {tuple(scores.shape)}, spread {float(scores.std())}")
    print(json.dumps({key: round(value, 2) for key, value in report.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
