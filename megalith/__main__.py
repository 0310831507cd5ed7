"""`python -m megalith VERB ...`, also under torchrun (`torchrun -m megalith pretrain gpt ...`)."""

import sys

from megalith.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
