"""The rules of the code base that no linter knows: what imports what, sizes, names, documentation."""

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import nanochat

ROOT = Path(nanochat.__file__).parent.parent
LIBRARY = sorted((ROOT / "nanochat").rglob("*.py"))
JOBS = sorted((ROOT / "ray_jobs").glob("*.py"))
WALK = ("data", "model", "training", "inference", "serving")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_CODE_LINES, MAX_WALK_LINES = 8_000, 5_000
FOR_OTHERS = ("nanochat/inference/vllm_model.py", "nanochat/exchange/modeling_nanochat.py")
"""Models that vLLM and transformers import: they import these themselves."""
BANNED = ("utils", "common", "helpers", "misc", "base", "manager", "handler")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "nanochat").parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def code_lines(source: str) -> int:
    """Count lines that hold code: blank lines, comments and docstrings (of fields, too) are not counted."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
        ):  # fmt: skip
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_lines_of_code_are_counted_as_the_rule_says():
    source = '"""Doc\n\nmore."""\n\nX = 1  # comment\n# comment\n"""Of X."""\n'
    assert code_lines(source) == 1
    source += 'def f(a,\n      b):\n    """Doc."""\n\n    return """a\nb"""\n'
    assert code_lines(source) == 5


@pytest.mark.parametrize("path", [path for path in LIBRARY if package_of(path) != "cluster"], ids=name)
def test_ray_is_imported_in_the_cluster_package_only(path):
    assert "ray" not in imported(path)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )


def modules(paths: list[Path]) -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_configs_load_neither_torch_nor_ray():
    configs = [path for path in LIBRARY if package_of(path) == "config"]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = set(run_python(code, *modules(configs)).stdout.split())
    assert "nanochat.config.pretrain" in loaded
    assert not loaded & {"torch", "ray", "numpy", "pyarrow"}


IMPORT_ALL = """
import importlib, logging, os, signal, sys, threading
def state():
    root = logging.getLogger()
    return dict(os.environ), signal.getsignal(signal.SIGINT), root.level, len(root.handlers), os.getcwd()
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert state() == before, name
assert threading.active_count() == 1, threading.enumerate()
assert "ray" not in sys.modules, "ray is loaded"
import torch
assert not torch.cuda.is_initialized()
"""


def test_importing_the_library_prints_probes_and_changes_nothing():
    pure = modules([path for path in LIBRARY if package_of(path) != "cluster" and name(path) not in FOR_OTHERS])
    done = run_python(IMPORT_ALL, *pure)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("path", LIBRARY + JOBS, ids=name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno - first + 1 <= MAX_FUNCTION_LINES, node.name


def lines_of_code() -> dict[Path, int]:
    return {path: code_lines(path.read_text(encoding="utf-8")) for path in LIBRARY + JOBS}


@pytest.mark.xfail(reason="about 16,700 lines: to be cut, or the design's bound is set anew")
def test_the_whole_is_short():
    assert 1_000 < sum(lines_of_code().values()) <= MAX_CODE_LINES


@pytest.mark.xfail(reason="about 7,800 lines: to be cut, or the design's bound is set anew")
def test_the_walk_is_short():
    walk = sum(count for path, count in lines_of_code().items() if path in LIBRARY and package_of(path) in WALK)
    assert 1_000 < walk <= MAX_WALK_LINES


def public_definitions(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    found: list[tuple[str, ast.AST]] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public_definitions(node.body, f"{node.name}.")
    return found


@pytest.mark.parametrize("path", LIBRARY + JOBS, ids=name)
def test_everything_public_is_documented_and_annotated(path):
    assert ast.get_docstring(tree(path)), "the module"
    for public, node in public_definitions(tree(path).body):
        assert ast.get_docstring(node), public
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "ctx" not in {a.arg for a in node.args.args}:
            assert node.returns is not None, public
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert all(a.annotation is not None for a in arguments if a.arg not in ("self", "cls")), public


@pytest.mark.parametrize("path", LIBRARY + JOBS, ids=name)
def test_no_file_or_class_bears_a_name_that_says_nothing(path):
    words = set(re.split(r"[/_.]", name(path).lower()))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            words |= {word.lower() for word in re.findall(r"[A-Z][a-z0-9]*", node.name)}
    assert not words & set(BANNED)


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_no_print_no_exit_no_pickle_no_blanket_except(path):
    assert not imported(path) & {"pickle", "dill", "cloudpickle", "shelve"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            kinds = [kind.id for kind in ast.walk(node.type) if isinstance(kind, ast.Name)]
            line = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1]
            if {"Exception", "BaseException"} & set(kinds):
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert raises or "#" in line, f"line {node.lineno} catches everything and does not say why"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "eval", "exec"), f"line {node.lineno}"


@pytest.mark.parametrize("path", LIBRARY + JOBS, ids=name)
def test_sources_are_ascii(path):
    assert path.read_text(encoding="utf-8").isascii()


def test_the_map_of_packages_is_the_folders_in_the_order_of_the_data():
    assert nanochat.__doc__ is not None
    drawn = re.findall(r"^(\w+) {2,}\S", nanochat.__doc__, re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "nanochat").glob("*/__init__.py")}
    assert sorted(drawn) == sorted(folders)
    assert [package for package in drawn if package in WALK] == [package for package in WALK if package in drawn]
    beside = {path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"}
    assert {stem for stem in beside if f"{stem}.py" not in nanochat.__doc__} == set()


def test_every_config_is_a_frozen_dataclass_with_keywords_only():
    import importlib

    for module in modules([path for path in LIBRARY if package_of(path) == "config"]):
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and value.__module__ == module and value.__name__.endswith("Config"):
                assert dataclasses.is_dataclass(value), value
                assert value.__dataclass_params__.frozen, value
                assert all(field.kw_only for field in dataclasses.fields(value)), value


def test_no_two_tests_have_one_name():
    """Those of all folders are collected at once."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
