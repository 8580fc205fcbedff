"""Where a run was made: what is needed to tell why two runs differ."""

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("mixerlab", "torch", "lightning", "triton", "torchmetrics", "tokenizers", "datasets", "numpy")


def environment() -> dict[str, str | None]:
    """Versions, device, commit and time."""
    on_gpu = torch.cuda.is_available()
    return {
        "started": datetime.now().isoformat(),
        "python": sys.version.split()[0],
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "threads": str(torch.get_num_threads()),
        "git_commit": _commit(),
        "command": " ".join(sys.argv),
    }


def _commit() -> str | None:
    """Of the repository that this file is in; None for an installed copy, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
