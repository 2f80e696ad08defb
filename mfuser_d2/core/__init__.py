"""The network in plain PyTorch: explicit keyword arguments, no cfg, no Detectron2."""
