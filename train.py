"""Train a model from a recipe: python train.py recipes/quickstart.yaml model.mixer=attention

The same as `mixerlab train`.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python put this folder there. Its own folders, such as data and kernels, are no packages: mixerlab is.
        sys.path.pop(0)

    from mixerlab.__main__ import run
    from mixerlab.lm.commands.train import main

    sys.exit(run(main, sys.argv[1:], [__file__]))
