"""What a result was measured on."""

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, cores, accelerator and versions, for the head of a results file."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "datasets")},
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
