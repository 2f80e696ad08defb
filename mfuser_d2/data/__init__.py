"""Data sets: labels, registration, augmentation, mappers, samplers.

Importing this package registers all data sets with Detectron2 where that is installed. `labels`, `layouts`, `streets`,
`reading`, `augmentation`, `plain` and `prepare` need only numpy, OpenCV and PyTorch, and work without it.
"""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:
    from mfuser_d2.data import registration as registration
