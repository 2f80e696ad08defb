"""Registers every data set of `layouts` in Detectron2's catalogs. Importing it registers; twice is harmless."""

from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from mfuser_d2.data.labels import CLASSES, COLORS, IGNORE_LABEL
from mfuser_d2.data.layouts import LAYOUTS, Layout, list_pairs

_BUILTIN = "detectron2.data.datasets.builtin"


def load_dicts(name: str) -> list[dict[str, str]]:
    """Detectron2's dataset dicts of a registered name: `file_name`, `sem_seg_file_name`, `image_id`.

    Raises:
        FileNotFoundError: see `layouts.list_pairs`.
    """
    return [
        {"file_name": str(image), "sem_seg_file_name": str(labels), "image_id": image.stem}
        for image, labels in list_pairs(name)
    ]


def _register(layout: Layout) -> None:
    name = layout.name
    if name in DatasetCatalog and getattr(DatasetCatalog[name], "__module__", "") == _BUILTIN:
        # Detectron2's own Cityscapes: same files, but its root is fixed at import and its errors do not help. Its
        # metadata stays and is only added to; Metadata refuses to change what is set.
        DatasetCatalog.remove(name)
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, partial(load_dicts, name))
    metadata = MetadataCatalog.get(name)
    ours = {
        "stuff_classes": list(CLASSES),
        "stuff_colors": [list(color) for color in COLORS],
        "ignore_label": IGNORE_LABEL,
        "evaluator_type": "sem_seg",
        **layout.extra,
    }
    for key, value in ours.items():
        if metadata.get(key) is None:
            metadata.set(**{key: value})


def register_all() -> None:
    """Register all data sets; names that someone registered before keep their loader."""
    for layout in LAYOUTS.values():
        _register(layout)


register_all()
