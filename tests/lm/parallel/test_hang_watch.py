"""A rank that stops is named, and the run ended."""

import time

import pytest

from started_runs import LONG, finish, layout, plugin, start

HANGS = """
import time
from mixerlab.lm.training.module import LanguageModel
step = LanguageModel.training_step
def hang(self, micro_batches, i):
    if self.world.rank == 1 and self.trainer.global_step == 5:
        self.decoder.register_forward_pre_hook(lambda *_: time.sleep(600))
    return step(self, micro_batches, i)
LanguageModel.training_step = hang
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path, unequal):
    mishap = plugin(tmp_path, HANGS)
    began = time.monotonic()
    process = start(*unequal, *LONG, *layout(2, 2), "plugins=[mishap]", "strategy.timeout=5", **mishap)
    _, err = finish(process, code=1)
    assert "no progress for 5 s: the others wait for rank 1 (in step 6)" in err
    assert "mishap.py" in err, "the stack says where"
    assert time.monotonic() - began < 120
