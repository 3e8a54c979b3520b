"""The machine a figure was computed on, as it stands in the record of a run."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maquette.training.distributed import ALONE, Team

if TYPE_CHECKING:
    import torch


def machine_facts(device: torch.device, team: Team = ALONE) -> dict[str, Any]:
    """What a reader needs to know about where a figure comes from."""
    import torch

    import maquette

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    facts = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maquette": maquette.__version__,
    }
    return facts if team.alone else {**facts, "processes": team.size}
