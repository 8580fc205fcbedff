"""mixerlab convert: a published checkpoint of attention, Mamba or Mamba-2 as a run folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Turn a published checkpoint of Llama, Mistral, Qwen2, Qwen3, Mamba, Mamba-2 or Bamba into a run folder.

FOLDER holds config.json, the weights as model.safetensors (or model.safetensors.index.json and its parts) and, for
text, tokenizer.json: what `hf download OWNER/NAME --local-dir FOLDER` leaves, or transformers' save_pretrained."""

EXAMPLES = """
examples:
  hf download state-spaces/mamba-130m-hf --local-dir mamba-130m
  mixerlab convert mamba-130m --to runs/mamba-130m/published
  mixerlab generate runs/mamba-130m/published --prompt "The capital of France is"
  mixerlab train runs/mamba-130m/published/recipe.yaml resume=runs/mamba-130m/published

The last one trains the weights further, in that run folder, by what its recipe.yaml says; put your data there first.
With other layers (model.mixer=...) a new run starts from what fits of them, and says what does not:
  mixerlab train mine.yaml init_from=runs/mamba-130m/published
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the published checkpoint")
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="RUN",
        help="the run folder to write, new or empty, such as runs/mamba-130m/published",
    )
    args = parser.parse_args(arguments)

    from mixerlab.lm.exchange.convert import convert

    print(convert(args.folder, args.to))
    return 0
