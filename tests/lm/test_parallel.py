"""What is done to the process and the decoder for speed and memory."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from lm.parallel import keep_freed_memory
{call}
def work():
    a = torch.ones(2**24)  # 64 MiB
    return float((a + 2 * a)[0])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_large_tensors_get_the_memory_of_earlier_ones():
    def faults(call):
        done = subprocess.run(
            [sys.executable, "-c", COUNT.format(call=call)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep_freed_memory()") < 0.3 * faults("")
