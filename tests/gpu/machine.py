"""The device that a part runs on: a GPU, or with ``TIDEGATE_DRY_RUN=1`` a fake one and tiny sizes.

A dry run, under ``TRITON_INTERPRET=1``, shows that a part has no mistake of its own. Its figures mean
nothing.
"""

import os

import torch
from fake_cuda import FakeCuda

from tidegate.engine.device.cuda import CudaDevice
from tidegate.engine.device.streams import Device

DRY = os.environ.get("TIDEGATE_DRY_RUN") == "1"


def open_device() -> Device:
    return FakeCuda() if DRY else CudaDevice()


def device_name() -> str:
    return "a dry run" if DRY else torch.cuda.get_device_name()


def scaled(num_bytes: int) -> int:
    return num_bytes >> 10 if DRY else num_bytes
