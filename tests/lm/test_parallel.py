"""What is done to the process and the decoder for speed and memory."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from lm.parallel import keep_freed_memory
{call}
def tensor():
    return torch.ones(2**24)  # 64 MiB
tensor()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensor()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_a_large_tensor_gets_the_memory_of_the_last_one():
    def faults(call):
        done = subprocess.run(
            [sys.executable, "-c", COUNT.format(call=call)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep_freed_memory()") < 0.1 * faults("")
