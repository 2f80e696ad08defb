"""Selective scan of Mamba: the readable reference, and faster backends with the same results."""

from mfuser_d2.core.ops.selective_scan.interface import available_backends, scan_backend, selective_scan

__all__ = ["available_backends", "scan_backend", "selective_scan"]
