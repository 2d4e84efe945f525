"""The documentation inside every Python as text shards: real English about programming, without a download.

One document per module of the standard library (its docstring and those of its classes and functions, under their
signatures, found with `ast` in the source: nothing is imported or run), and one per topic of `pydoc_data.topics`, the
language reference that `help()` shows. About 3 MB. Sorted, so one installation of Python always gives the same text.

Not covered: modules written in C, whose docstrings exist only once they are imported.
"""

import ast
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import storage
from nanochat.errors import DataError

NUM_FILES = 4  # so that a few workers can tokenise at once
ROW_GROUP_ROWS = 64
FORMAT = 1  # of the documents' text; another one makes written shards stale
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def write_pydocs(folder: str) -> list[str]:
    """Write the documentation of the running Python as parquet files into a folder; return their paths.

    Files that an earlier call wrote for the same Python stay as they are. Raises: DataError if this Python comes
    without the source of its standard library.
    """
    paths = [storage.join(folder, f"pydocs_{number:05d}.parquet") for number in range(NUM_FILES)]
    record_path = storage.join(folder, "pydocs.json")
    made_with = {"python": sys.version, "format": FORMAT}
    if storage.exists(record_path) and storage.read_json(record_path) == made_with | {"bytes": _sizes(paths)}:
        return paths
    documents = [*module_documents(Path(sysconfig.get_path("stdlib"))), *topic_documents()]
    for number, path in enumerate(paths):
        table = pa.table({"text": pa.array(documents[number::NUM_FILES], pa.string())})
        with storage.atomic_write(path) as file:
            pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="zstd")
    storage.write_json(record_path, made_with | {"bytes": _sizes(paths)})
    return paths


def module_documents(root: Path) -> list[str]:
    """Return one document per module below a folder that has any docstring, sorted by module name.

    Files that are not valid Python are passed over: distributions keep templates among their modules. Raises: DataError
    if there is no module.
    """
    documents = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            name = ".".join(parts).removesuffix(".__init__")
            documents[name] = module_document(name, path.read_bytes())
    if not documents:
        raise DataError(
            f"corpus=pydocs: no module source in {root}. Install Python's standard library, or name another corpus."
        )
    return [text for _, text in sorted(documents.items()) if text]


def module_document(name: str, source: bytes) -> str:
    """Return a module's name and docstrings as one text; empty if it has no docstring or is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like, in files that are not ours
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    sections = list(_sections(tree, ""))
    module_doc = _docstring(tree)
    if not sections and not module_doc:
        return ""
    return "\n\n".join([f"module {name}", *([module_doc] if module_doc else []), *sections]) + "\n"


def topic_documents() -> list[str]:
    """Return the topics of the language reference, sorted by name; none where Python comes without them."""
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [text.strip() + "\n" for _, text in sorted(topics.items()) if text.strip()]


def _sections(parent: ast.AST, prefix: str) -> Iterator[str]:
    """Yield heading and docstring of every class and function in a tree, in the order of the source."""
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, Definition):
            yield from _sections(node, prefix)
            continue
        if text := _docstring(node):
            yield f"{_heading(node, prefix)}\n{text}"
        yield from _sections(node, f"{prefix}{node.name}.")


def _heading(node: Definition, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    return f"{prefix}{node.name}({ast.unparse(node.args)})"


def _docstring(node: ast.Module | Definition) -> str:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    return text.encode("utf-8", "replace").decode()  # an escape can make half a surrogate pair


def _sizes(paths: list[str]) -> list[int]:
    return [storage.size_bytes(path) if storage.exists(path) else -1 for path in paths]
