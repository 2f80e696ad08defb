"""Pictures: label overlays and panels, confusion matrices, feature views. Needs neither Detectron2 nor `core`."""
