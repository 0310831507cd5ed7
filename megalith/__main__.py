"""`python -m megalith VERB ...`, also under torchrun (`torchrun -m megalith pretrain gpt ...`)."""

import importlib.util
import pathlib
import sys

# Python looks for `megalith` in the working directory first. A folder of that name there, such as the clone that an
# editable installation was made from, is then taken for the package, although this file is found in the right one.
if getattr(sys.modules["megalith"], "__file__", None) is None:
    home = pathlib.Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        "megalith", home / "__init__.py", submodule_search_locations=[str(home)]
    )
    sys.modules["megalith"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["megalith"])

from megalith.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
