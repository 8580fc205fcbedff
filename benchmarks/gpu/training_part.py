"""A whole training step. It alone needs everything that mixerlab depends on."""

from functools import partial

import torch

from gpu.timing import Bench, Contestant, Part, Row, Sizes


def training(bench: Bench, mixer: str, T: int) -> tuple[Contestant, int]:
    """A step of optimisation, and the number of parameters."""
    sizes = bench.sizes
    from mixerlab.lm.model.decoder import Decoder
    from mixerlab.lm.recipe.schema import OptimConfig
    from mixerlab.lm.training.optim import build_optimizer

    decoder = Decoder(sizes.vocab_size, d_model=sizes.d_model, n_layers=sizes.n_layers, mixer=mixer)
    decoder.initialize(0)
    decoder.to(bench.device)
    if bench.on_gpu:
        torch._dynamo.reset()
        for block in decoder.blocks:
            block.compile()
    optimizer = build_optimizer(decoder, OptimConfig())
    ids = torch.randint(sizes.vocab_size, (sizes.batch(T), T + 1), device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            nll, _ = decoder(ids[:, :-1], ids[:, 1:])
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step), sum(p.numel() for p in decoder.parameters())


def heading(bench: Bench) -> str:
    sizes = bench.sizes
    return (
        f"a training step, {sizes.n_layers} gated blocks, D = {sizes.d_model}, bf16 autocast, AdamW, "
        f"N = {sizes.tokens}, {'compiled' if bench.on_gpu else 'not compiled'}\n"
        f"{'T':>6} {'mixer':>10} {'parameters':>11} {'ms':>10} {'tokens/s':>10} {'peak, MiB':>10}"
    )


def measure(bench: Bench, mixer: str, T: int) -> str:
    counted: list[int] = []

    def make() -> Contestant:
        contestant, parameters = training(bench, mixer, T)
        counted.append(parameters)
        return contestant

    result = bench.measure(make)
    ms, N = result.milliseconds[0], bench.sizes.batch(T) * T
    peak = bench.mebibytes(result.held + result.peaks[0])
    return f"{counted[0]:>11,} {ms:>10.2f} {1e3 * N / ms:>10.3g} {peak:>10}"


def rows(sizes: Sizes) -> list[Row]:
    return [
        Row(f"{T:>6} {mixer:>10}", partial(measure, mixer=mixer, T=T))
        for T in sizes.training_lengths
        for mixer in ("sessa", "attention", "mamba2")
    ]


PART = Part(heading, rows, guess=75)
