"""The map is the law: this file fails when the code stops matching docs/architecture.md."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
ROOT = REPOSITORY / "megalith"
MAX_LINES, MAX_FILES = 400, 20  # of a file, of a folder
BASE = {"config", "common"}
ALLOWED: dict[str, set[str]] = {  # folder -> folders it may import; the table of docs/architecture.md, section 1
    "common": set(),
    "config": {"common"},
    "kernels": {"common"},
    "layers": {"kernels"} | BASE,
    "models": {"layers"} | BASE,
    "parallel": {"kernels", "planner"} | BASE,
    "optim": BASE,
    "data": BASE,
    "curation": {"data", "reports"} | BASE,
    "checkpoint": BASE,
    "runtime": {"models", "layers", "parallel", "optim", "checkpoint", "planner"} | BASE,
    "training": {"runtime", "optim", "data", "checkpoint", "planner"} | BASE,
    "generation": {"runtime", "data", "layers"} | BASE,
    "serving": {"generation", "runtime", "data"} | BASE,
    "reports": {"common"},
    "evaluation": {"training", "generation", "runtime", "data", "checkpoint", "layers", "reports"} | BASE,
    "retrieval": {"training", "runtime", "data", "checkpoint"} | BASE,
    "planner": BASE,
    "launcher": BASE,
    "recipes": {"config"},
    "integrations": {"training", "generation", "runtime", "models", "parallel", "optim", "data", "checkpoint"} | BASE,
    "accelerate": {"integrations"} | BASE,
    "testing": {"training", "runtime", "parallel", "models"} | BASE,
}
ALLOWED["workflows"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED) - {"testing"}
TORCH_FREE = {"common", "config", "curation", "planner", "launcher", "recipes", "reports"}
NO_DISTRIBUTED = {"kernels", "layers", "models"}
FILES = sorted(ROOT.rglob("*.py"))
RETIRED = {  # words of this project's past that no reader knows -> what to write instead
    r"\bchances\b": "probs or log_probs",
    r"\bclass (Enter|Leave|Whole|Fetch|Ours)\b": "what it does, in Megatron's or PyTorch's term",
    r"\b(goes|going|gone) on from\b": "resumes, resumed from",
    r"\bis_main\b": "is_main_process",
    r"\bknobs?\b": "option or field",
    r"\blaunched\b": "environment",
    r"\bmesh\.place\(": "mesh.rank(axis)",
    r"\bPartRows\b": "sharded",
    r"\bplace\(": "build_runtime, or Mesh.rank",
    r"\bmatmul\.use\(": "set_matmul",
    r"\bput off\b": "deferred",
    r"\bsettled?\b": "what is done: decided, resolved, checked",
    r"\.share\(": "all_reduce",
    r"\bspeaks\b": "is_main_process",
    r"\bstrangers?\b": "what it is: another process, another program's file",
    r"\bStretch\b": "RopeScaling",
    r"\bunittest\b": "a stand-in class: test doubles belong into tests/",
}


def folder(path: pathlib.Path) -> str:
    """The folder of megalith/ that a file lies in, or the name of a file directly in megalith/."""
    return path.relative_to(ROOT).parts[0]


def imports(path: pathlib.Path) -> Iterator[str]:
    """Yield every module name imported anywhere in the file, also inside functions."""
    package = ("megalith", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join(base + ((node.module,) if node.module else ()))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def documented_table() -> dict[str, str]:
    """Folder -> the "may import" cell of the table in docs/architecture.md."""
    rows = [
        line.split("|")[1:-1]
        for line in (REPOSITORY / "docs/architecture.md").read_text().splitlines()
        if line.startswith("|")
    ]
    return {cells[0].strip(): cells[2].strip() for cells in rows if len(cells) == 3 and cells[0].strip() in ALLOWED}


def test_the_document_has_the_same_table() -> None:
    documented = documented_table()
    assert set(documented) == set(ALLOWED)
    for name, cell in documented.items():
        if name in ("workflows", "cli"):
            expected = {"workflows": "anything but cli", "cli": "anything but testing"}[name]
            assert cell == expected
        else:
            assert {word.strip() for word in cell.split(",")} - {"nothing"} == ALLOWED[name], name


def test_where_would_i_add_names_files_that_exist() -> None:
    section = (REPOSITORY / "docs/architecture.md").read_text().split("## 10.")[1]
    rows = {line.split("|")[1].split("(9)")[0].strip(): line for line in section.splitlines() if line.startswith("| ")}
    asked = (
        "model",
        "head",
        "loss",
        "optimizer",
        "file format",
        "learning-rate schedule",
        "server field",
        "evaluation task",
    )
    assert not [kind for kind in asked if not any(name.startswith(kind) for name in rows)]
    named = re.findall(r"(?<![\w/])[a-z_0-9/]+/[a-z_0-9]+\.py\b", "".join(rows.values()))
    assert len(named) > 20 and not [path for path in named if not (ROOT / path).is_file()]
    for path, table in re.findall(r"(?<![\w/])([a-z_0-9/]+\.py): `(\w+)`", "".join(rows.values())):
        assert re.search(rf"\b{table}\b", (ROOT / path).read_text()), (path, table)


def test_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if name not in done and needs <= done}
        assert ready, f"cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_every_folder_is_in_the_table() -> None:
    assert {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_rules(path: pathlib.Path) -> None:
    source, home, name = path.read_text(), folder(path), path.relative_to(ROOT)
    assert source.count("\n") <= MAX_LINES, f"{name}: split it, over {MAX_LINES} lines"
    tree = ast.parse(source)
    assert ast.get_docstring(tree), f"{name}: first line must say what the file is for"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), f"{name}: no global state"
    if home.endswith(".py"):  # megalith/__init__.py and __main__.py stand above the table
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "torch":
            assert home not in TORCH_FREE, f"{name}: {home}/ must import without torch"
            assert not (home in NO_DISTRIBUTED and parts[1:2] == ["distributed"]), (
                f"{name}: {home}/ knows nothing of parallelism"
            )
        if parts[0] == "megalith" and len(parts) > 1 and parts[1] in ALLOWED and parts[1] != home:
            assert parts[1] in ALLOWED[home], f"{name}: {home}/ may not import {parts[1]}/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_address_in_a_registry_exists(path: pathlib.Path) -> None:
    """Registries import what they name only when asked, so a name that leads nowhere would wait for a user."""
    texts = (
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    for address in filter(re.compile(r"megalith(\.\w+)+:\w+").fullmatch, texts):
        module, _, attribute = address.partition(":")
        base = REPOSITORY.joinpath(*module.split("."))
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        assert file.exists(), f"{path.relative_to(ROOT)}: {address} names a module that is not there"
        tree = ast.parse(file.read_text())
        names = {getattr(node, "name", None) for node in tree.body}
        names |= {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        names |= {
            node.target.id
            for node in tree.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        assert attribute in names, f"{path.relative_to(ROOT)}: {address} names nothing that {module} defines"


@pytest.mark.parametrize(
    "path", [p for p in FILES if folder(p) != "kernels"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_devices_go_through_torch_accelerator(path: pathlib.Path) -> None:
    uses = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert not uses, (
        f"{path.relative_to(ROOT)}: torch.cuda at lines {uses}; use torch.accelerator, so that other devices work too"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_one_place(path: pathlib.Path) -> None:
    """Only common/environment.py reads environment variables. Others may set one, or pass all to a subprocess."""
    if path == ROOT / "common" / "environment.py" or folder(path) == "testing":
        return
    tree = ast.parse(path.read_text())
    uses, allowed = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            uses.add(node)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):  # os.environ["NAME"] = value
            allowed.add(node.value)
        if isinstance(node, ast.Attribute) and node.attr == "setdefault":
            allowed.add(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):  # os.environ | {...}, for a subprocess
            allowed.add(node.left)
    lines = sorted(node.lineno for node in uses - allowed)
    assert not lines, f"{path.relative_to(ROOT)}: lines {lines}; add a function to common/environment.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_objects_travel_between_ranks_in_one_place(path: pathlib.Path) -> None:
    """A simulated world can stand in there. (A table holds such a name of Accelerate's.)"""
    if path in (ROOT / "integrations/accelerate/collectives.py", ROOT / "accelerate/names.py"):
        return
    uses = re.findall(r"\b(?:broadcast|all_gather|gather|scatter|send|recv)_object(?:_list)?\b", path.read_text())
    assert not uses or path == ROOT / "checkpoint" / "ranks.py", f"{path.relative_to(ROOT)}: {uses}; use Ranks"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_retired_words_do_not_come_back(path: pathlib.Path) -> None:
    source = path.read_text()
    found = {word: instead for word, instead in RETIRED.items() if re.search(word, source)}
    assert not found, f"{path.relative_to(ROOT)}: retired words -> what to write instead: {found}"


@pytest.mark.parametrize("top", ["megalith", "tests"])
def test_folders_are_small(top: str) -> None:
    folders = [path for path in (REPOSITORY / top).rglob("*") if path.is_dir()]
    counts = {
        path: len([file for file in path.glob("*.py") if file.is_file()]) for path in [REPOSITORY / top, *folders]
    }
    large = {str(path.relative_to(REPOSITORY)): count for path, count in counts.items() if count > MAX_FILES}
    assert not large, f"split these folders, over {MAX_FILES} files: {large}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_test_files_are_short_too(path: pathlib.Path) -> None:
    assert path.read_text().count("\n") <= MAX_LINES, (
        f"{path.relative_to(REPOSITORY)}: split it, over {MAX_LINES} lines"
    )
