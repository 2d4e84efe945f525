import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.data import pydocs
from nanochat.data.documents import is_held_out
from nanochat.errors import DataError

SOURCE = '''
"""Line one.

    Indented as a docstring is.
    """
def outer(a, *, b=1) -> int:
    """Outer doc."""
    class Inner(Exception):
        """Inner doc."""
if True:
    async def later(): "Later doc."
def silent(): return 1
class Empty:
    def method(self):
        r"""Method \\d doc."""
        def deep(): "Deep doc."
'''


def test_a_module_reads_like_its_documentation():
    expected = """module pkg.mod

Line one.

Indented as a docstring is.

outer(a, *, b=1)
Outer doc.

class outer.Inner(Exception)
Inner doc.

later()
Later doc.

Empty.method(self)
Method \\\\d doc.

Empty.method.deep()
Deep doc.
"""
    assert pydocs.module_document("pkg.mod", SOURCE.encode()) == expected.replace("\\\\", "\\")


@pytest.mark.parametrize("source", [b"x = 1", b"def broken(:", b"\0", b"# coding: nonsense\n'doc'", b"'\\d'  # odd"])
def test_modules_without_docs_and_files_that_are_no_python(source, recwarn):
    assert pydocs.module_document("m", source) in ("", "module m\n\n\\d\n")
    assert not recwarn.list


def test_half_a_surrogate_pair_becomes_valid_text():
    assert pydocs.module_document("m", b'"""\\ud800 doc"""') == "module m\n\n? doc\n"


def test_modules_are_found_by_name_without_tests_and_without_running(tmp_path):
    files = ["b.py", "a/__init__.py", "a/z.py", "test/t.py", "a/tests/t.py", "idlelib/idle_test/t.py"]
    for name in [*files, "site-packages/s.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""Doc of {name}."""\nraise SystemExit\n')
    heads = [text.splitlines()[0] for text in pydocs.module_documents(tmp_path)]
    assert heads == ["module a", "module a.z", "module b"]
    with pytest.raises(DataError, match="standard library"):
        pydocs.module_documents(tmp_path / "test" / "nothing")


def small_library(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "lib"
    root.mkdir()
    for number in range(6):
        (root / f"m{number}.py").write_text(f'"""Doc {number}."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_written_once_and_again_only_if_something_is_missing_or_stale(tmp_path, monkeypatch):
    root = small_library(tmp_path, monkeypatch)
    paths = [Path(path) for path in pydocs.write_pydocs(str(tmp_path / "text"))]
    assert len(paths) == pydocs.NUM_FILES >= 2
    texts = [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]
    topics = pydocs.topic_documents()
    assert sorted(texts) == sorted([f"module m{number}\n\nDoc {number}.\n" for number in range(6)] + topics)
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    monkeypatch.setattr(pydocs, "module_documents", None)  # would be called
    assert [str(path) for path in paths] == pydocs.write_pydocs(str(tmp_path / "text"))
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    for damage in (paths[2].unlink, lambda: paths[0].write_bytes(b"PAR1"), (tmp_path / "text/pydocs.json").unlink):
        damage()
        pydocs.write_pydocs(str(tmp_path / "text"))
        assert [hashlib.sha256(path.read_bytes()).digest() for path in paths] == hashes
    monkeypatch.setattr(sys, "version", "another")
    (root / "m0.py").write_text('"""New."""')
    pydocs.write_pydocs(str(tmp_path / "text"))
    assert [hashlib.sha256(path.read_bytes()).digest() for path in paths] != hashes


def test_to_an_object_store(tmp_path, monkeypatch):
    small_library(tmp_path, monkeypatch)
    paths = pydocs.write_pydocs("memory://run/text")
    assert paths[0] == "memory://run/text/pydocs_00000.parquet"


CHILD = """
import sys, sysconfig, hashlib
from pathlib import Path
from nanochat.data.pydocs import module_documents
root = Path(sysconfig.get_path("stdlib"))
print(hashlib.sha256("".join(module_documents(root / "json")).encode()).hexdigest(), "antigravity" in sys.modules)
"""


def test_deterministic_whatever_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outputs) == 1
    assert "False" in outputs.pop()


def test_topics_are_the_language_reference():
    topics = pydocs.topic_documents()
    assert len(topics) > 50
    assert any(text.startswith('The "assert" statement') for text in topics)


@pytest.mark.slow
def test_the_whole_library_is_megabytes_of_text_with_a_tenth_held_out():
    documents = pydocs.module_documents(Path(sysconfig.get_path("stdlib"))) + pydocs.topic_documents()
    size = sum(len(text.encode()) for text in documents)
    held_out = sum(len(text.encode()) for text in documents if is_held_out(text.encode(), 0.1))
    assert size > 1.5e6
    assert len(documents) > 400
    assert 0.05 < held_out / size < 0.2
