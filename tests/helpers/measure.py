"""What an operator takes."""

import itertools
import json

import torch


def peak_bytes(run, folder) -> int:
    """Most bytes allocated at once while `run()` runs, beyond those before it, inside operators too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(sizes), default=0)
