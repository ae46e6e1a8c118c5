"""Imports run one way: config, errors, report <- kernels <- costs <- passes <- pipeline <- backend, explain, export, cli."""

import ast
import shutil
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tsa_compile

ROOT = Path(__file__).parents[1]
PACKAGES = {"kernels": ROOT / "kernels", "passes": ROOT / "passes", "tsa_compile": ROOT / "tsa_compile"}
ALONE = ("budgets", "config", "errors", "reasons", "report", "text")
LEVELS = {**dict.fromkeys(ALONE, 0), "kernels": 1, "costs": 2, "passes": 3, "pipeline": 4}
TOP = 5  # backend, explain, export, calibrate, cli, testing
HEAVY = {"transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "torch_tensorrt", "matplotlib", "typer"}
FILES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def module_name(path):
    """The name that a file is installed under."""
    top, *parts = path.relative_to(ROOT).with_suffix("").parts
    head = ["tsa_compile"] if top == "tsa_compile" else ["tsa_compile", top]
    return ".".join(head + [part for part in parts if part != "__init__"])


def level(module):
    parts = module.split(".")
    return LEVELS.get(parts[1], TOP) if len(parts) > 1 else TOP + 1


def imports(tree, package):
    """(node, absolute name) of everything imported; `from a import b` counts as a.b, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def faults(source, module, *, is_package=False):
    """What is wrong with a file's imports and calls, as sentences."""
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    allowed = {"typer"} if module.startswith(("tsa_compile.cli", "tsa_compile.commands")) else set()
    for node, name in imports(tree, package):
        top, *rest = name.split(".")
        if top in ("passes", "kernels"):
            yield f"line {node.lineno}: bare name {name}; import tsa_compile.{top}"
        if top in HEAVY - allowed and node in runs_on_import(tree):
            yield f"line {node.lineno}: {top} is optional; import it where it is used"
        if top != "tsa_compile" or module == "tsa_compile":
            continue
        # `from tsa_compile import x` is a public name unless x is one of its modules.
        if not rest or not exists(f"tsa_compile.{rest[0]}"):
            yield f"line {node.lineno}: {name} is a public name; import it from its module"
        elif level(name) > level(module):
            yield f"line {node.lineno}: {name} points back up the arrow"
        elif level(module) == 0 and rest[0] not in ("budgets", "errors", "reasons", "text"):
            yield f"line {node.lineno}: {name}; {', '.join(ALONE)} stand alone"
    if module != "tsa_compile.cli":
        yield from (
            f"line {node.lineno}: print"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        )


def circle(sources, packages=()):
    """A circle of imports among modules, given the source of each by name; None if there is none.

    Imports inside functions and for type checkers count: what needs each other in any way belongs together, or apart.
    """
    graph = {}
    for module, source in sources.items():
        package = module if module in packages else module.rpartition(".")[0]
        names = [name for _, name in imports(ast.parse(source), package)]
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & set(sources) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def runs_on_import(tree):
    """The statements that an import of the module runs: all but function bodies and TYPE_CHECKING blocks."""
    found, queue = set(), list(ast.iter_child_nodes(tree))
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        found.add(node)
        queue.extend(ast.iter_child_nodes(node))
    return found


def exists(module):
    _, name = module.split(".")
    base = PACKAGES.get(name, PACKAGES["tsa_compile"] / name)
    return base.is_dir() or base.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_run_one_way(path):
    source = path.read_text(encoding="utf-8")
    assert list(faults(source, module_name(path), is_package=path.name == "__init__.py")) == []


def test_private_names_stay_in_their_files():
    for path in FILES:
        module = module_name(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tsa_compile"):
                private = [name.name for name in node.names if name.name.startswith("_")]
                modules = [name for name in private if any(module_name(other) == f"{node.module}.{name}" for other in FILES)]
                assert private == modules, f"{module}: line {node.lineno}"


def test_passes_know_of_kernels_only_what_they_are_asked_and_told():
    allowed = {"forms", "interface", "kept", "launch", "options", "registry"}  # of launch, whether there is Triton
    for path in (ROOT / "passes").glob("*.py"):
        for node, name in imports(ast.parse(path.read_text(encoding="utf-8")), "tsa_compile.passes"):
            if name.startswith("tsa_compile.kernels."):
                assert name.split(".")[2] in allowed, f"{path.name}: line {node.lineno}"
                assert name.split(".")[2] != "launch" or name.endswith(".HAS_TRITON"), f"{path.name}: line {node.lineno}"


def test_no_module_has_a_public_name():
    """Python binds an imported module in its package, in the place of a function that is called the same."""
    assert [name for name in tsa_compile.__all__ if exists(f"tsa_compile.{name}")] == []


def test_no_imports_run_in_a_circle():
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    assert circle({module_name(path): path.read_text(encoding="utf-8") for path in FILES}, packages) is None


@pytest.mark.parametrize(
    "back",
    [
        "from tsa_compile.passes.a import A",
        "from tsa_compile.passes import a",
        "import tsa_compile.passes.a",
        "from . import a",
        "from .a import A",
        "def f():\n    from tsa_compile.passes.a import A",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tsa_compile.passes.a import A",
    ],
)
def test_a_circle_is_seen(back):
    sources = {"tsa_compile.passes.a": "from tsa_compile.passes import b", "tsa_compile.passes.b": "import ast"}
    assert circle(sources) is None
    assert set(circle(sources | {"tsa_compile.passes.b": back})) == set(sources)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tsa_compile.kernels.score", "from tsa_compile.passes import masks"),
        ("tsa_compile.kernels.score", "from tsa_compile.passes.masks.infer import infer"),
        ("tsa_compile.kernels.score", "def f():\n    import tsa_compile.pipeline"),
        ("tsa_compile.kernels.score", "from ..passes import masks"),
        ("tsa_compile.kernels.score", "from tsa_compile.costs import devices"),
        ("tsa_compile.costs.predict", "from tsa_compile.passes.plan import sparse_obstacle"),
        ("tsa_compile.passes.plan", "from tsa_compile.backend import tsa_backend"),
        ("tsa_compile.passes.plan", "import kernels.score"),
        ("tsa_compile.passes.plan", "from kernels import score"),
        ("tsa_compile.passes.plan", "import tsa_compile"),
        ("tsa_compile.passes.plan", "from tsa_compile import TSAConfig"),
        ("tsa_compile.report", "from tsa_compile.config import TSAConfig"),
        ("tsa_compile.passes.plan", "import transformers"),
        ("tsa_compile.passes.plan", "try:\n    from onnx import helper\nexcept ImportError:\n    pass"),
        ("tsa_compile.passes.plan", "print(1)"),
        ("tsa_compile.explanation", "import typer"),
        ("tsa_compile.commands.explain", "import transformers"),
        ("tsa_compile.commands.explain", "print(1)"),
    ],
)
def test_a_fault_is_seen(module, source):
    assert list(faults(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tsa_compile.passes.plan", "from tsa_compile.kernels import attend"),
        ("tsa_compile.passes.plan", "from tsa_compile.config import TSAConfig"),
        ("tsa_compile.passes.plan", "from tsa_compile.costs.breakeven import minimum"),
        ("tsa_compile.passes.plan", "from tsa_compile.passes.call import AttentionCall"),
        ("tsa_compile.config", "from tsa_compile.errors import ConfigError"),
        ("tsa_compile.passes.plan", "def f():\n    import transformers"),
        ("tsa_compile.passes.plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
        ("tsa_compile.cli", "print(1)"),
        ("tsa_compile.cli", "import typer"),
        ("tsa_compile.commands.explain", "import typer"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert list(faults(source, module)) == []


def test_a_checkout_imports_from_its_own_root(tmp_path):
    """Whatever is installed: an installation of the package may lie on the path as well."""
    for name in ("tsa_compile", "passes", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = "import tsa_compile.passes, tsa_compile.kernels as k; print(tsa_compile.passes.__file__, k.__file__)"
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(tmp_path / name / "__init__.py") for name in ("passes", "kernels")], done.stderr


def test_the_version_stands_in_three_places():
    version = tsa_compile.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_test_modules_share_helpers_not_tests():
    """What two of them need lies in a `support.py` or another module without tests."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = (node.module or "").split(".") + [alias.name for alias in node.names if not node.module]
                assert not any(name.startswith("test_") for name in names), f"{path.relative_to(ROOT)}: line {node.lineno}"


def test_files_can_be_read_in_one_go():
    """A file is one idea: 400 lines are a reason to look for its second one."""
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 440} == {}
