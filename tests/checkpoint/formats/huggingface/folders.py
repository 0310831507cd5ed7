"""Changes of saved Hugging Face folders."""

import json
import pathlib


def change_config(folder: pathlib.Path, **changes: object) -> None:
    """Change fields of config.json; "absent" removes one."""
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))
