"""Small decoders in float64 whose parameters are far from special values."""

import torch

from mixerlab.lm.model.decoder import Decoder

VOCAB, WIDTH = 11, 8


def decoder_of(mixer, spread=0.2, **options):
    """In evaluation mode, at initial values plus normal noise with the standard deviation `spread`."""
    decoder = Decoder(VOCAB, **{"d_model": WIDTH, "n_layers": 2, "mixer": mixer, **options}).double().eval()
    decoder.initialize(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder
