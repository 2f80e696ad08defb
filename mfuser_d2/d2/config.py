"""Every config key of MFuser, declared once with its meaning and unit; and the way a config is read by the tools."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from mfuser_d2.data.config import add_data_config
from mfuser_d2.evaluation.config import add_evaluation_config

logger = logging.getLogger(__name__)

# Mean and standard deviation of OpenAI's CLIP, RGB, for pixels of 0..255: the input of all variants of the release.
CLIP_PIXEL_MEAN = [255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073]
CLIP_PIXEL_STD = [255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711]


def add_mfuser_config(cfg: CfgNode) -> None:
    """Declare the keys of MFuser on a Detectron2 config and set the defaults of the release (EVA02-CLIP variant)."""
    cfg.MODEL.META_ARCHITECTURE = "MFuser"
    cfg.MODEL.BACKBONE.NAME = "MFuserBackbone"
    cfg.MODEL.PIXEL_MEAN = list(CLIP_PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_STD)
    cfg.MODEL.MFUSER = CfgNode()
    _add_encoder_config(cfg.MODEL.MFUSER)
    _add_fusion_config(cfg.MODEL.MFUSER)
    _add_inference_config(cfg.MODEL.MFUSER)
    _add_head_config(cfg.MODEL.SEM_SEG_HEAD)
    _add_solver_config(cfg.SOLVER)
    add_data_config(cfg)
    add_evaluation_config(cfg)


def _add_encoder_config(node: CfgNode) -> None:
    # Which encoders see the image: "both", or "vfm" or "vlm" alone. With "vfm" the VLM gives its text tower only, and
    # a learned linear map takes the VFM's features into its space.
    node.ENCODERS = "both"
    # Vision foundation model: "dinov2_vit{s,b,l,g}14" (also with "_reg"), "dinov3_vit{s,sp,b,l,hp,7b}16",
    # "pe_spatial_{t,s,b,l,g}", any timm ViT by its timm name, the vision half of a vision-language model as
    # "clip:<open_clip name>", or "tiny_vfm".
    node.VFM = CfgNode()
    node.VFM.NAME = "dinov2_vitl14"
    # A local file in its publisher's own format, a hub id ("hf-hub:..."), or "" for random weights, which are then
    # stored in the checkpoints because they exist nowhere else.
    node.VFM.WEIGHTS = ""
    # Further keyword arguments of the encoder's builder, as the builder spells them.
    node.VFM.KWARGS = CfgNode(new_allowed=True)

    # Vision-language model: an open_clip name ("EVA02-L-14-336", "ViT-L-14-336-quickgelu", "ViT-L-16-SigLIP-384",
    # "ViT-L-16-SigLIP2-384", "PE-Core-L-14-336", ...) or "tiny_clip", "tiny_eva02", "tiny_siglip". Its text tower
    # encodes the class names. "vfm:<VFM name>" puts a second VFM in its place; queries then have to be learned.
    node.VLM = CfgNode()
    node.VLM.NAME = "EVA02-L-14-336"
    # As VFM.WEIGHTS.
    node.VLM.WEIGHTS = ""
    # As VFM.KWARGS; nested changes to open_clip's config.
    node.VLM.KWARGS = CfgNode(new_allowed=True)
    # SigLIP's sentencepiece file, needed for class names other than the 19 of Cityscapes and for prompt templates;
    # SigLIP2 always needs its own (Gemma's). "" = the committed table.
    node.VLM.TOKENIZER = ""

    # Edge of a patch in pixels, for both encoders; 0 = each encoder's own. Patch kernels are resampled to it. The
    # release uses 16 with CLIP and SigLIP and the encoders' own 14 with EVA02-CLIP.
    node.PATCH_SIZE = 0
    # (height, width) in pixels that the encoders' position grids are resampled to when their weights are loaded. Other
    # sizes work; the grids are then resampled again in every forward.
    node.IMAGE_SIZE = [512, 512]
    # How pretrained position grids and patch kernels are resized: "bicubic", "bilinear", or "auto" = the choice of the
    # release for each encoder (bicubic for DINOv2 and EVA02, bilinear for CLIP and SigLIP).
    node.RESAMPLE = "auto"
    # Indices of the encoder blocks, counted from 0, whose fused tokens feed the pyramid. Four, ascending.
    node.TAP_LAYERS = [7, 11, 15, 23]
    # Learned prompt tokens between the start token and a class name (5 in the release's CLIP and SigLIP variants).
    node.PROMPT_LENGTH = 8
    # Fixed sentences with {} in the class name's place, e.g. ["a photo of a {}."]; wants PROMPT_LENGTH 0. Several are
    # averaged. [] = learned prompts.
    node.PROMPT_TEMPLATES = []
    # What the class queries start from: "texts", or "learned" for one learned vector per class and no text tower.
    node.QUERIES = "texts"


def _add_fusion_config(node: CfgNode) -> None:
    # What corrects the two encoders after each block: "mvfuser"; "none" (frozen features joined); "vfm_only",
    # "vlm_only", "separate_mvfuser" (MVFuser blocks that see one encoder each); "conv"; "cross_attention" (to learned
    # tokens); "self_attention_concat"; "self_attention_separate"; "deformable". One encoder alone takes "none" or its
    # own "_only".
    node.ADAPTER = CfgNode()
    node.ADAPTER.NAME = "mvfuser"
    # States per channel of the selective scan (N in Eq. 1).
    node.ADAPTER.STATE_DIM = 16
    # Probability with which an adapter's output values are dropped in training.
    node.ADAPTER.DROPOUT = 0.1
    # Project VFM tokens into the VLM's width before and back after each adapter (the release's CLIP variant). Happens
    # in any case where the widths differ.
    node.ADAPTER.PROJECT_VFM = False
    # Heads of the attention adapters; divides the VLM's width.
    node.ADAPTER.NUM_HEADS = 8
    # Learned tokens of "cross_attention"; the first one stands for no correction.
    node.ADAPTER.NUM_TOKENS = 100
    # Places that "deformable" looks at, per head and encoder.
    node.ADAPTER.NUM_POINTS = 4

    # The text refinement (Eq. 7-10).
    node.MT_ENHANCER = CfgNode()
    # "full": attention over classes, then Mamba over [text; image; text]; "one_text_copy": over [image; text];
    # "cross_attention" to the image in the Mamba block's place; "attention" or "mamba" alone; "none" leaves the texts.
    node.MT_ENHANCER.KIND = "full"
    # Channels inside.
    node.MT_ENHANCER.WIDTH = 256
    # Heads of its self-attention over classes; divides WIDTH.
    node.MT_ENHANCER.NUM_HEADS = 4
    # MTEnhancer layers.
    node.MT_ENHANCER.NUM_LAYERS = 1
    # Probability of dropout in its attention and MLP outputs.
    node.MT_ENHANCER.DROPOUT = 0.1

    # The pixel-text alignment loss.
    node.ALIGN_LOSS = CfgNode()
    # "softmax" over classes (the release, all variants) or "sigmoid" per class (the paper, for SigLIP).
    node.ALIGN_LOSS.KIND = "softmax"
    # Factor of this loss in the total.
    node.ALIGN_LOSS.WEIGHT = 1.0
    # The cosine similarities are divided by it. 0 = the model's own logit scale and bias (SigLIP).
    node.ALIGN_LOSS.TEMPERATURE = 0.07
    # Image features that are compared with the texts, and that MTEnhancer reads: "both" encoders summed (the release)
    # or the "vlm"'s own, after the adapters.
    node.ALIGN_LOSS.FEATURES = "both"


def _add_inference_config(node: CfgNode) -> None:
    node.INFERENCE = CfgNode()
    # "slide": overlapping windows whose scores are averaged; "whole": the image in one piece.
    node.INFERENCE.MODE = "slide"
    # (height, width) of a window in pixels. Training images and labels are padded to it as well.
    node.INFERENCE.CROP_SIZE = [512, 512]
    # (down, right) steps between windows in pixels; at most CROP_SIZE. The last windows are moved inside the image.
    node.INFERENCE.STRIDE = [341, 341]
    # Windows that go through the network at a time. Changes memory and speed, not the result.
    node.INFERENCE.BATCH = 4
    # Test-time augmentation: every image is seen at these factors of its size, and the scores averaged. [1.0] = off.
    node.INFERENCE.SCALES = [1.0]
    # Test-time augmentation: see every image mirrored as well.
    node.INFERENCE.FLIP = False
    # Softmax over the classes of the result, as the release ends with; probabilities change, the argmax does not.
    node.INFERENCE.FINAL_SOFTMAX = False

    # Number format of matrix products in training and inference: "float32", "float16" (with loss scaling in training)
    # or "bfloat16". Scan states, norms and losses stay in float32. SOLVER.AMP.ENABLED, Detectron2's switch, trains in
    # float16 where this says "float32".
    node.PRECISION = "float32"
    # Recompute encoder blocks in the backward pass instead of storing their activations: less memory, more time.
    node.CHECKPOINT = False
    # Run the network through torch.compile. Faster steps after minutes of compiling, once for each size of batch; for
    # training and inference on many images of one size. Needs Triton on a GPU, a C++ compiler on a CPU.
    node.COMPILE = False


def _add_head_config(node: CfgNode) -> None:
    node.NAME = "MFuserHead"
    # Classes, one query each. Has to be the number of classes of the data sets.
    node.NUM_CLASSES = 19
    # Label value that no loss and no metric counts.
    node.IGNORE_VALUE = 255
    # Channels of the pixel decoder's maps and of the queries.
    node.HIDDEN_DIM = 256
    # Channels of the map that is multiplied with the queries to give masks.
    node.MASK_DIM = 256
    # Attention heads in both decoders; divides HIDDEN_DIM.
    node.NUM_HEADS = 8
    # Layers of the pixel decoder (deformable self-attention and cross-attention to the class texts).
    node.ENC_LAYERS = 6
    # Layers of the transformer decoder; there is one more prediction than layers.
    node.DEC_LAYERS = 9
    # Hidden channels of the pixel decoder's feed-forward parts.
    node.ENC_FFN_DIM = 2048
    # The same in the transformer decoder.
    node.DEC_FFN_DIM = 2048
    # Factor of the classification loss of every prediction (Eq. 12).
    node.CLASS_WEIGHT = 2.0
    # Factor of every mask's binary cross-entropy (Eq. 11).
    node.MASK_WEIGHT = 5.0
    # Factor of every mask's dice loss (Eq. 11).
    node.DICE_WEIGHT = 5.0
    # Weight of the class "no object" in the classification loss.
    node.NO_OBJECT_WEIGHT = 0.1
    # Points per mask at which bce and dice are computed.
    node.TRAIN_NUM_POINTS = 12544
    # Candidates drawn per point that is chosen by its uncertainty.
    node.OVERSAMPLE_RATIO = 3.0
    # Part of the points that is chosen by uncertainty; the rest is drawn at random.
    node.IMPORTANCE_SAMPLE_RATIO = 0.75


def _add_solver_config(node: CfgNode) -> None:
    # "WarmupPolyLR": poly decay to BASE_LR_END, multiplied by the warm-up while that lasts (the release).
    # "WarmupLinearLR": warm-up to BASE_LR, then straight down to BASE_LR_END (the paper).
    node.LR_SCHEDULER_NAME = "WarmupPolyLR"
    node.BASE_LR = 1e-4
    # Learning rate that the decay tends to at MAX_ITER.
    node.BASE_LR_END = 1e-6
    # Exponent of WarmupPolyLR.
    node.POLY_POWER = 0.9
    # The first iteration has this part of the learning rate; it grows linearly over WARMUP_ITERS iterations.
    node.WARMUP_FACTOR = 1e-6
    node.WARMUP_ITERS = 1500
    node.MAX_ITER = 20000
    # Images per step over all processes.
    node.IMS_PER_BATCH = 2
    # AdamW: decay rates of the two moments.
    node.BETAS = [0.9, 0.999]
    # AdamW: decoupled decay of the weights, per step and unit of learning rate.
    node.WEIGHT_DECAY = 1e-5
    # What is not decayed: "norms" (the release's CLIP variant), "norms_embeddings" (its EVA02 and SigLIP variants) or
    # "nothing"; see solver.NO_DECAY_RULES for what counts as a norm there.
    node.NO_DECAY = "norms_embeddings"
    # CLIP_GRADIENTS is off by default. CLIP_TYPE "value" bounds every gradient's entries by CLIP_VALUE, "norm" the norm
    # of every tensor's gradient, "full_model" the norm over all of them.

    # Moving average of the trained weights: average = DECAY * average + (1 - DECAY) * weights after each step, with a
    # smaller factor in the first steps. Evaluation uses it, and model_final_ema.pth keeps it. 0 = off; 0.999 is usual.
    node.EMA_DECAY = 0.0

    # Iterations between checkpoints.
    node.CHECKPOINT_PERIOD = 2000
    # Periodic checkpoints kept, the newest ones.
    node.CHECKPOINTS_KEPT = 2
    # Iterations between progress lines and rows of metrics.json.
    node.LOG_PERIOD = 20
    # Steps of the whole run whose loss or gradient may be NaN or infinite: they are recorded and left out. 0 = the
    # first one ends the run.
    node.MAX_BAD_STEPS = 0
    # Repeat bit for bit: kernels whose sums have no fixed order are replaced, or named in a warning where there is no
    # other (on a GPU the gradient of bilinear sampling). Costs speed on a GPU; on a CPU runs repeat anyway.
    node.DETERMINISTIC = False


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Read a config as every tool does: defaults, then the file with its bases, then `KEY VALUE` pairs.

    Without a GPU, MODEL.DEVICE becomes "cpu" (logged). The result is frozen and not validated yet.

    Args:
        config_file: YAML; read with the safe loader only, so a stranger's file cannot run code. "" = defaults.
        opts: alternating keys and values from the command line.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the YAML cannot be read, or a value has another type than its key wants.
        KeyError: a key is unknown; the message names similar ones.
    """
    cfg = get_cfg()
    add_mfuser_config(cfg)
    opts = list(opts)
    if config_file and not Path(config_file).is_file():
        raise FileNotFoundError(f"--config-file {config_file} does not exist; the configs are under configs/.")
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise ValueError(f"{' '.join(flags)} came after the KEY VALUE pairs; flags go in front of them")
    if len(opts) % 2:
        raise ValueError(f"Trailing options are pairs KEY VALUE; got {len(opts)} words: {' '.join(opts)}")
    defaults = cfg.clone()
    try:
        if config_file:
            _refuse_giants(CfgNode.load_yaml_with_base(config_file, allow_unsafe=False))
            cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_other_cfg(_nest(opts))
    except KeyError as error:
        raise KeyError(_unknown_key_message(cfg, config_file, str(error.args[0]))) from error
    except Exception as error:  # yaml errors, yacs assertions and type errors
        raise ValueError(f"{config_file or 'The options'} cannot be used as a config: {error}") from error
    odd = _odd_values(cfg, defaults)
    if odd:
        raise ValueError(f"{config_file or 'The options'}: {'; '.join(odd)}")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No GPU is available: MODEL.DEVICE=%s becomes cpu.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """Dotted names of every key of a config, e.g. "MODEL.MFUSER.VFM.NAME"."""
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys.extend(all_keys(value, f"{prefix}{name}."))
    return keys


def _odd_values(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> list[str]:
    """What is wrong with values that yacs lets through: None for any key, and anything inside a list of numbers."""
    odd = []
    for name, default in defaults.items():
        key, value = prefix + name, cfg[name]
        if isinstance(default, CfgNode):
            odd.extend(_odd_values(value, default, f"{key}."))
        elif value is None and default is not None:
            odd.append(f"no value for {key}; give one or leave it out")
        elif isinstance(default, (list, tuple)) and default and all(type(item) in (int, float) for item in default):
            if not all(type(item) in (int, float) for item in value):
                odd.append(f"{key}={list(value)} has to be numbers, such as {list(default)}")
    return odd


def _refuse_giants(tree: object) -> None:
    """Refuse YAML whose aliases (*name) multiply to a tree that takes hours to merge; the largest config has 500 keys.

    Raises:
        ValueError: it has more than 100,000 entries.
    """
    left, count = [tree], 0
    while left:
        value = left.pop()
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left.extend(items)
        count += len(items)
        if count > 100_000:
            raise ValueError("its aliases (*name) stand for more than 100,000 entries; write them out")


def _nest(opts: Sequence[str]) -> CfgNode:
    """KEY VALUE pairs as a tree, which is merged like a file: unlike yacs's own list, it may add free keys (KWARGS)."""
    tree = CfgNode()
    for key, value in zip(opts[::2], opts[1::2]):
        node = tree
        *parents, last = key.split(".")
        for name in parents:
            node = node.setdefault(name, CfgNode())
        node[last] = value
    return tree


def _unknown_key_message(cfg: CfgNode, config_file: str, message: str) -> str:
    key = message.rsplit(" ", 1)[-1]
    known = all_keys(cfg)
    by_last = {known_key: known_key.rsplit(".", 1)[-1] for known_key in known}
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.7) or [
        known_key for known_key, name in by_last.items() if difflib.SequenceMatcher(None, last, name).ratio() > 0.8
    ]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else "; the keys are listed in mfuser_d2/d2/config.py"
    return f"{config_file or 'The options'}: unknown config key {key}{hint}"
