"""Train with CRaFT: ``python train.py --help``."""

import sys

from craft_opt.bridge.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
