"""Devices for eager models, by --device."""

from __future__ import annotations

import torch


def chosen_device(name: str) -> torch.device:
    """Return the device of that name. Raises: ValueError where there is none on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:<number>") from err
    n_devices = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_devices):
        raise ValueError(f"--device {name}: expected cpu, or one of the {n_devices} CUDA devices that PyTorch finds")
    return device
