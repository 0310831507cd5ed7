"""Every public name of Accelerate is here: the same, megalith's own, or an error that says what to use instead."""

import importlib
import pathlib
import re
import sys

import accelerate
import pytest

from megalith.accelerate import Accelerator, names, utils
from megalith.common.extras import MissingPackage

GUIDE = {  # names that a script of the guide imports, and where from
    "accelerate": ["Accelerator", "DistributedType", "init_empty_weights", "skip_first_batches"],
    "accelerate.logging": ["get_logger"],
    "accelerate.utils": [
        "AbstractTrainStep", "BertTrainStep", "DistributedType", "GPTTrainStep", "MegatronLMDummyDataLoader",
        "MegatronLMDummyScheduler", "MegatronLMPlugin", "ProjectConfiguration", "T5TrainStep",
        "add_model_config_to_megatron_parser", "avg_losses_across_data_parallel_group",
        "gather_across_data_parallel_groups", "gather_object", "set_seed",
    ],
}  # fmt: skip
DOCS = pathlib.Path(__file__).parents[3] / "docs/accelerate.md"


def documented() -> dict[str, tuple[str, str]]:
    """{name: (same, different, refused or added; how, or what to use instead)}, of both tables of the docs."""
    section = DOCS.read_text(encoding="utf-8").split("## Accelerate's API, name by name")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    listed = [(name, (state, how)) for names, state, how in rows for name in re.findall(r"`([\w.]+)`", names)]
    assert len(listed) == len(dict(listed)), "a name is in two rows"
    assert all(how or state == "same" for _, (state, how) in listed)
    return dict(listed)


def names_of(*states: str) -> set[str]:
    return {name for name, (state, _) in documented().items() if state in states}


def test_the_docs_say_what_became_of_each_member_of_the_accelerator() -> None:
    public = {name for name in dir(accelerate.Accelerator) if not name.startswith("_")}
    listed = {name for name in documented() if "." not in name}
    assert public == listed - names_of("added") and not public & names_of("added")
    own = {name for name in vars(Accelerator) if not name.startswith("_")}
    assert own == {name for name in names_of("different", "refused", "added") if "." not in name}


def test_the_docs_say_what_became_of_the_modules_names() -> None:
    own = {f"{module}.{name}" for module, found in names.OWN.items() for name in found}
    refused = {f"accelerate.utils.{name}": instead for name, instead in names.INSTEAD.items()}
    listed = {name for name in documented() if "." in name}
    assert listed & names_of("different") == own and listed & names_of("refused") == set(refused)
    assert listed == own | set(refused) and len(names_of("refused")) <= 15
    assert {name: documented()[name][1] for name in refused} == refused


@pytest.mark.parametrize("module", names.OWN)
def test_every_public_name_is_found(module: str) -> None:
    original, ours = importlib.import_module(module), importlib.import_module(f"megalith.{module}")
    for name in names.public(module):
        found = getattr(ours, name)
        if name not in names.OWN[module]:
            assert found is getattr(original, name)
    assert set(GUIDE[module]) <= set(names.public(module)) and set(dir(ours)) >= set(names.public(module))


def test_modules_of_megalith_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    home = sys.modules["megalith.accelerate"]
    monkeypatch.delattr(home, "utils")  # as before the first import
    assert home.utils is utils and utils.is_megatron_lm_available()


def test_unknown_names_are_answered() -> None:
    with pytest.raises(ImportError, match=r"accelerate.utils has no MegatronLMPlugn: did you mean MegatronLMPlugin\?"):
        from megalith.accelerate.utils import MegatronLMPlugn  # noqa: F401
    with pytest.raises(ImportError, match=r"has no MegatronLMPlugin: it lies in megalith.accelerate.utils"):
        from megalith.accelerate import MegatronLMPlugin  # noqa: F401
    with pytest.raises(ImportError, match=r"has no megatron_lm_initialize: Accelerator\(megatron_lm_plugin=\.\.\.\)"):
        from megalith.accelerate.utils import megatron_lm_initialize  # noqa: F401
    with pytest.raises(AttributeError, match=r"nor has accelerate\.utils of this version"):
        utils.qqqqqq  # noqa: B018
    assert not hasattr(utils, "megatron_lm_initialize") and not hasattr(utils, "__wrapped__")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megalith.accelerate", "megalith.accelerate.names"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackage, match=r"^megalith\.accelerate needs the package accelerate, which is not inst"):
        importlib.import_module("megalith.accelerate")
