"""The dataclasses that are the schema of a recipe: every key, its type, default, limits and meaning."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mixerlab.options import Choice, option


@dataclass
class ModelConfig:
    d_model: int = option(256, "width of the residual stream", min=1)
    match_params: int | float | str | None = option(
        None,
        "parameters to have, such as 10M: solves for d_model, and mlp_dim if that is null",
        above=0,
        below=1e13,
    )
    match: str | None = option(None, "a recipe to have as many parameters as; solves for the width too")
    n_layers: int = option(4, "number of blocks", min=1)
    mixer: Choice | list[Choice] = option(
        "sessa", "a mixer's name, a mapping with `name` and options, or a list of those, repeated over depth"
    )
    block: Literal["gated", "transformer"] = option(
        "gated", "what surrounds the mixer: the Sessa paper's gated block, or mixer then MLP"
    )
    mlp: Literal["swiglu", "gelu", "none"] = option(
        "swiglu", "MLP of the transformer block (the gated block has none)"
    )
    mlp_dim: int | None = option(None, "hidden width of the MLP; null: 4 d_model, or 8/3 for swiglu", min=1)
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation")
    norm_eps: float = option(1e-5, "epsilon of the blocks' norms and of the last one", above=0)
    tie_embeddings: bool = option(False, "use the embedding matrix as the head")
    dropout: float = option(0.0, "dropout on the embedding and every residual addition", min=0, below=1)
    init_std: float = option(0.02, "standard deviation of the initial weights", above=0, below=10**6)

    def problems(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.match_params, str) and not _BUDGET.fullmatch(self.match_params):
            yield "match_params", "expected a number of parameters, such as 10M, 1.5B or 350000"
        elif isinstance(self.match_params, str) and not 1 <= (self.budget() or 0) < 1e13:
            yield "match_params", "expected at least 1 and below 10000B parameters"
        if self.match_params is not None and self.match is not None:
            yield "match", "expected at most one of model.match and model.match_params"

    def budget(self) -> float | None:
        """`match_params` as a number."""
        if not isinstance(self.match_params, str):
            return self.match_params
        found = _BUDGET.fullmatch(self.match_params)
        assert found is not None
        return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()]

    @property
    def is_sized(self) -> bool:
        """Whether the width is known, and not to be solved for."""
        return self.match is None and self.match_params is None


_BUDGET = re.compile(r"(?=.*[1-9])\s*(\d*\.?\d+)\s*([kmb]?)\s*", re.IGNORECASE)


@dataclass
class OptimConfig:
    lr: float = option(1e-3, "peak learning rate of AdamW", above=0, below=10**6)
    betas: tuple[float, float] = option((0.9, 0.95), "decay of AdamW's two averages")
    eps: float = option(1e-8, "AdamW's epsilon", above=0, below=10**6)
    weight_decay: float = option(
        0.1, "decoupled weight decay; norms, biases and gains are spared", min=0, max=10**6
    )
    schedule: Literal["cosine", "wsd", "constant"] = option(
        "cosine", "learning rate after warm-up: cosine, warm-up-stable-decay, or constant"
    )
    warmup_steps: int = option(100, "steps of linear warm-up", min=0)
    decay_fraction: float = option(
        0.2, "wsd: share of the steps in which the rate falls linearly", min=0, max=1
    )
    final_lr_ratio: float = option(0.1, "learning rate at the end, as a share of the peak", min=0, max=1)
    grad_clip: float | None = option(1.0, "largest norm of the gradient; null: no clipping", above=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", "expected two numbers of at least 0 and below 1"


HORIZONS = ("steps", "epochs", "tokens")


@dataclass
class TrainerConfig:
    steps: int | None = option(
        None, "optimiser steps to train; give exactly one of steps, epochs, tokens", min=1
    )
    epochs: float | None = option(None, "passes over the training split", above=0, below=1e9)
    tokens: float | None = option(
        None, "input positions to train on, over all devices (1e9 is allowed)", above=0, below=1e18
    )
    batch_size: int = option(16, "rows per device and micro-batch", min=1)
    accumulate: int = option(
        1,
        "micro-batches per optimiser step; leave it at 1 with trainer.rows_per_step, from which it follows",
        min=1,
    )
    rows_per_step: int | None = option(
        None,
        "rows of an optimiser step over all devices, from which trainer.accumulate follows, so that a run goes on on "
        "another number of devices; null: batch_size x accumulate x devices",
        min=1,
    )
    precision: Literal["32", "bf16-mixed", "bf16-true"] = option(
        "32", "float32; bf16 arithmetic on float32 weights; or bf16 weights (norms and gains float32)"
    )
    val_every: int = option(500, "steps between validations (one more at the end)", min=1)
    val_batches: int | None = option(None, "validation batches per loader; null: the whole split", min=1)
    checkpoint_every: int = option(500, "steps between checkpoints (one more at the end)", min=1)
    keep_checkpoints: int = option(2, "newest checkpoints to keep, besides the best one", min=1)
    async_checkpoint: bool = option(
        True,
        "write checkpoints while training goes on, from a copy in the CPU's memory; each rank copies its part of the "
        "weights and the optimiser state",
    )
    max_time: str | None = option(
        None,
        "wall-clock limit such as 11h30m or 90s: then a checkpoint is written and the run ends, to be continued with "
        "resume=auto",
    )
    on_non_finite: Literal["stop", "skip"] = option(
        "stop", "at a loss or gradient that is not finite: stop the run, or leave that step out"
    )
    num_workers: int = option(0, "data loading processes per device", min=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        given = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(given) != 1:
            wrong = given[-1] if given else "steps"
            yield wrong, "expected exactly one of trainer.steps, trainer.epochs, trainer.tokens"
        if self.max_time is not None and not self.max_seconds():
            yield "max_time", "expected hours, minutes and seconds, such as 11h30m, 45m or 90s"
        if self.rows_per_step is not None and self.rows_per_step % self.batch_size:
            yield "rows_per_step", f"expected a multiple of trainer.batch_size, which is {self.batch_size}"

    def max_seconds(self) -> float:
        """`max_time` in seconds; infinite without one, 0 where it cannot be read."""
        if self.max_time is None:
            return math.inf
        found = _DURATION.fullmatch(self.max_time)
        if found is None:
            return 0.0
        return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))

    def step_rows(self, devices: int) -> int:
        """Rows of an optimiser step, over all devices and micro-batches, once `accumulate` is known (`for_devices`)."""
        return self.batch_size * self.accumulate * devices


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@dataclass
class StrategyConfig:
    name: Literal["auto", "ddp", "fsdp"] = option(
        "auto",
        "ddp: a copy of the model on every device; fsdp: weights, gradients and optimiser state cut in shards over the "
        "devices (FSDP2); auto: ddp where there are several devices",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "kind of device")
    devices: Literal["auto"] | int = option(
        "auto", "devices, a process each, per machine; auto: every GPU, or one CPU process", min=1
    )
    num_nodes: int = option(1, "machines; torchrun or SLURM starts the processes on several", min=1)
    replicate: int = option(
        1, "fsdp: groups of devices that hold a whole model in shards each (HSDP); 1: one group", min=1
    )
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "fsdp: dtype in which weights are gathered, norms and gains included; bfloat16 halves the traffic",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "fsdp: dtype in which gradients are summed over devices"
    )
    reduce_every: Literal["step", "micro_batch"] = option(
        "step",
        "fsdp: how often gradients are summed over devices; step: least traffic, but with trainer.accumulate > 1 each "
        "device holds whole gradients meanwhile; micro_batch: shards of them alone",
    )
    cpu_offload: bool = option(
        False, "fsdp: keep the shards and the optimiser in the CPU's memory; slow, for huge models"
    )
    compile: bool = option(False, "torch.compile each block, in place")
    activation_checkpointing: Literal["none", "selective", "full"] = option(
        "none",
        "to save memory, recompute each block in the backward pass; selective: but for the operators that mix over "
        "time, whose outputs are kept",
    )
    timeout: float = option(
        1800.0,
        "seconds without progress after which a run of several processes is ended",
        above=0,
        below=10**9,
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.name != "fsdp":
            for key in ("replicate", "param_dtype", "reduce_dtype", "reduce_every", "cpu_offload"):
                if getattr(self, key) != getattr(StrategyConfig, key):
                    yield key, f"only used with strategy.name = fsdp, but it is {self.name}"
        if self.cpu_offload and self.accelerator == "cpu":
            yield "cpu_offload", "expected false: strategy.accelerator = cpu leaves nothing to offload"


@dataclass
class LoggingConfig:
    dir: str = option("runs", "folder under which run folders are made")
    loggers: list[Choice] = option(
        ["tensorboard"],
        "where curves, sample text and pictures go beside metrics.csv: names, or mappings with `name` and options",
    )
    every: int = option(10, "steps between logged training metrics", min=1)
    sample_prompt: str = option("", "prompt of the sample text written at each validation")
    sample_tokens: int = option(128, "tokens of the sample text; 0: no sample", min=0)
    memory_every: int = option(
        0,
        "validations between plots of influence against lag, for the loggers (one more at the end); 0: none",
        min=0,
    )


@dataclass
class Recipe:
    name: str | None = option(None, "folder for the runs of this recipe; null: the recipe file's name")
    label: str | None = option(
        None, "end of the run's own name; null: what the command line changes, such as mixer=attention-seed=1"
    )
    seed: int = option(0, "seed of the weights, the data's order and dropout", min=0, max=2**31 - 1)
    resume: str | None = option(
        None, "auto: continue the newest unfinished run of this name and recipe; or a run folder"
    )
    init_from: str | None = option(
        None,
        "a run folder, or a checkpoint in one: a new run starts from its weights, as far as their names and shapes are "
        "the model's, with a new optimiser and schedule",
    )
    plugins: list[str] = option([], "modules to import first; they may register mixers and data modules")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Choice = option("text", "a data module's name, or a mapping with `name` and options")
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
