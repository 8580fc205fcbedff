"""Test processes run side by side, one on each core: more threads would wait for each other, spinning."""

import os

# Read when torch is first imported, and inherited by what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
