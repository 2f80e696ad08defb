"""The config keys of the data room, declared once with meaning and unit."""

from typing import TYPE_CHECKING

from mfuser_d2.data.layouts import LAYOUTS

if TYPE_CHECKING:
    from detectron2.config import CfgNode

NATIVE_SIZE = (0, 0)
"""As a test size: the image's own."""


def add_data_config(cfg: "CfgNode") -> None:
    """Add the data room's keys and set Detectron2's where the release differs from its defaults."""
    # Order of the channels that the network gets.
    cfg.INPUT.FORMAT = "RGB"
    # (height, width) in pixels of the training crop. Images that are smaller natively are refused; what scaling makes
    # smaller is padded by the network.
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [512, 512]
    # No class may cover this part or more of a crop's labelled pixels, if ten draws find such a crop; 1.0 = no limit.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    # "horizontal": mirror every second crop; "none": never.
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    # Shorter side in pixels that Detectron2's DefaultPredictor scales images to; 0 keeps their own size. Nothing else
    # looks at it: evaluation goes by INPUT.MFUSER.TEST_SIZE.
    cfg.INPUT.MIN_SIZE_TEST = 0

    node = type(cfg)
    cfg.INPUT.MFUSER = node()
    # Training images are scaled by a factor drawn evenly from this range of their native size.
    cfg.INPUT.MFUSER.SCALE_RANGE = (0.5, 2.0)
    # Photometric distortion: brightness +-32, contrast and saturation x0.5 to x1.5, hue +-18 of 180.
    cfg.INPUT.MFUSER.COLOR_AUG = True
    # Test images are scaled to fit into (height, width) pixels with their aspect kept, longer side against longer side.
    # One key for each data set; () = as `default`; (0, 0) = the image's own size. Names of your own go into a YAML.
    cfg.INPUT.MFUSER.TEST_SIZE = node(new_allowed=True)
    cfg.INPUT.MFUSER.TEST_SIZE.default = (1024, 2048)
    for name, layout in LAYOUTS.items():
        size = {"bdd100k": (720, 1280), "streets": NATIVE_SIZE}.get(layout.folder, ())
        cfg.INPUT.MFUSER.TEST_SIZE[name] = size

    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.MFUSER = node()
    # Rare-class sampling: draw a class first (rare ones a little more often), then an image that has enough of it, then
    # crops until one shows it. Needs one pass over all label files, kept in a cache beside them.
    cfg.DATALOADER.MFUSER.RARE_CLASS_SAMPLING = True
    # Temperature of the softmax over (1 - class frequency): 100 is practically even over classes, 0.01 prefers rare.
    cfg.DATALOADER.MFUSER.RCS_TEMPERATURE = 100.0
    # An image "has" a class from this many pixels on, at its native size.
    cfg.DATALOADER.MFUSER.RCS_MIN_PIXELS = 3000
    # A crop shows the class from this part of RCS_MIN_PIXELS on; 0 = take the first crop.
    cfg.DATALOADER.MFUSER.RCS_MIN_CROP_RATIO = 0.5
    # How often each of DATASETS.TRAIN is drawn, in its order; any positive numbers. () = by number of images.
    cfg.DATALOADER.MFUSER.SOURCE_WEIGHTS = ()
