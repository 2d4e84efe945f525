"""Nothing that is read may run, and nobody joins a Ray without its token: by the sources of library, jobs and image."""

import ast
import re
from pathlib import Path

import pytest

import nanochat
from nanochat.cluster.environment import RAY_ENVIRONMENT

ROOT = Path(nanochat.__file__).parent.parent
JOBS = sorted((ROOT / "ray_jobs").glob("*.py"))
LIBRARY = sorted((ROOT / "nanochat").rglob("*.py"))
SANDBOX = ROOT / "nanochat" / "inference" / "sandbox_child.py"
"""What runs the code of a model, after it has given up its rights."""
RUNS_WHAT_IT_READS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
RUNS = {"eval", "exec", "__import__"}
LOADS = {"torch": {"load", "hub", "jit", "package"}, "yaml": {"load", "load_all", "unsafe_load", "full_load"},
         "pandas": {"read_pickle"}}  # fmt: skip


def what_may_run(source: str) -> list[str]:
    """Return the lines that could run what they read; torch.load(weights_only=True) makes tensors and nothing else."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        options: dict[str | None, str] = {}
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for parts in (name.split(".") for name in names):
            of_library = LOADS.get(parts[0], set()) & set(parts[1:2])
            if RUNS_WHAT_IT_READS & set(parts) or (len(parts) == 1 and parts[0] in RUNS):
                found.append(ast.unparse(node))
            if of_library and options.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if parts[-1] == "from_pretrained" and (
                options.get("trust_remote_code") != "False"
                or ("Model" in ".".join(parts[:-1]) and options.get("use_safetensors") != "True")
            ):
                found.append(ast.unparse(node))
        if options.get("allow_pickle", "False") != "False" or options.get("trust_remote_code", "False") != "False":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY + JOBS if path != SANDBOX], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_that_is_read_may_run(path):
    assert what_may_run(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from ray import cloudpickle", "import joblib as j", "from shelve import open",
        "torch.serialization.pickle.loads(b)", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)", "from torch import load", "torch.jit.load(f)", "torch.hub.load(a, b)",
        "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)", "yaml.unsafe_load(t)", "from yaml import load",
        "pandas.read_pickle(f)", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)",
        "eval(text)", "exec(text)", "__import__(name)",
        "load_dataset(name, trust_remote_code=True)", "AutoTokenizer.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, use_safetensors=True)",
    ],
)  # fmt: skip
def test_what_may_run_is_found(source):
    assert what_may_run(source)


@pytest.mark.parametrize(
    "source",
    ["torch.load(f, weights_only=True)", "safetensors.torch.load(b)", "yaml.safe_load(t)", "np.load(f)", "model.eval()",
     "AutoModelForCausalLM.from_pretrained(p, trust_remote_code=False, use_safetensors=True)", "ast.literal_eval(t)"],
)  # fmt: skip
def test_what_cannot_run_is_let_pass(source):
    assert what_may_run(source) == []


STARTS_PROCESSES = {
    "inference/sandbox.py", "provenance.py", "cluster/benchmarks.py", "cluster/backend_benchmark.py",
    "cluster/ingress.py", "inference/paged_attention.py",
}  # fmt: skip
"""The sandbox; git for the commit; benchmarks of this package; HAProxy; the compiler."""


def test_code_of_a_model_has_one_way_to_a_processor():
    starts = r"\bsubprocess\b|\bos\.(system|popen|exec|spawn|posix_spawn|fork)|\bmultiprocessing\b|\bpty\b"
    found = {path for path in LIBRARY if re.search(starts, path.read_text(encoding="utf-8"))}
    assert {str(path.relative_to(ROOT / "nanochat")) for path in found} == STARTS_PROCESSES


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_that_starts_ray_asks_for_a_token_first(path):
    assert RAY_ENVIRONMENT["RAY_AUTH_MODE"] == "token"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    starts_ray = any(re.match(r"nanochat\.cluster\.(?!environment|terminal)", module) for module in modules)
    assert starts_ray == (path.name not in ("chat.py", "export.py", "import_checkpoint.py"))
    (called,) = re.findall(r"sys\.exit\((?:(\w+)\()?tyro\.(?:cli|extras\.\w+)\((\w+)", ast.unparse(tree))
    (command,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == (called[0] or called[1])
    )
    before_imports = ast.unparse(command).partition("from nanochat.cluster")[0]
    assert "set_ray_environment()" in before_imports or not starts_ray


def test_the_image_asks_for_a_token():
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.search(r"^ENV .* RAY_AUTH_MODE=token( |$)", dockerfile, re.MULTILINE)
