"""A trace of what torch does, on the CPU and on the device."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class TorchTrace:
    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> str:
        self._profile.stop()
        # mkdtemp gives the folder to this user alone (0700).
        path = Path(tempfile.mkdtemp(prefix="tidegate-profile-")) / "trace.json"
        self._profile.export_chrome_trace(str(path))
        return str(path)
