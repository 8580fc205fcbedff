"""Test processes run side by side, one on each core: more threads would wait for each other, spinning."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # read when torch is first imported; inherited by what tests start
