"""A model of others in a run directory: every stage that begins from one goes on, and nothing is written over."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nanochat_files import SIZES, TODAY, config_of, randomised, state_dict, write_checkpoint, write_tokenizer

import nanochat
from nanochat import storage
from nanochat.cluster.endpoint_session import pinned
from nanochat.cluster.jobs import chat_models, named_model, pretrain_base, summary, trained_character
from nanochat.cluster.rl_job import prepare_practice
from nanochat.cluster.terminal import Terminal
from nanochat.config import generation
from nanochat.config.cluster import ClusterConfig
from nanochat.config.corpus import CorpusConfig
from nanochat.config.evaluation import EvaluationConfig
from nanochat.config.exchange import ImportConfig
from nanochat.config.pretrain import PretrainConfig
from nanochat.config.rl import RLConfig
from nanochat.config.serving import ServingConfig
from nanochat.config.sft import SftConfig
from nanochat.config.shards import ShardsConfig
from nanochat.data.corpora import prepare_corpus
from nanochat.data.document_shards import write_token_shards
from nanochat.data.row_order import RowReader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import SPLIT_PATTERNS, Tokenizer
from nanochat.errors import CheckpointError, ConfigError, DataError, NanochatError, TokenizerMismatchError
from nanochat.evaluation.evaluate import Evaluator, evaluate
from nanochat.exchange.hf_folder import write_folder
from nanochat.exchange.import_run import ForeignModel, dial, read_source, write_run
from nanochat.inference.completions import complete
from nanochat.inference.engine import Engine
from nanochat.inference.load import load_model
from nanochat.inference.requests import Request
from nanochat.model import scaling
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import MuonAdamW
from nanochat.pages.report import write_report
from nanochat.pages.walk import write_walk
from nanochat.run_context import RunContext
from nanochat.storage import RunFolder, StageFolder, read_jsonl
from nanochat.tasks.mixture import MixtureSource, load_mixture
from nanochat.tasks.mixture_shards import write_mixture_shards
from nanochat.training.checkpoint import Checkpoint, CheckpointWriter, named_checkpoint, problem_with, tokenizer_of
from nanochat.training.loop import TrainingInputs, local_stream
from nanochat.training.pretrain import pretrain
from nanochat.training.sft import SftInputs, finetune, resolve_sft

ROOT = Path(nanochat.__file__).parent.parent
SHORT = TODAY | {"sequence_len": 64, "n_layer": 2}


def cache(folder: Path, checkpoints: str = "base_checkpoints", sizes: dict = TODAY, steps: tuple = (650,)) -> Path:
    """Write nanochat's own tree and return the folder of a model in it."""
    write_tokenizer(folder / "tokenizer")
    for step in steps:
        write_checkpoint(folder / checkpoints / "d20", state_dict(randomised(config_of(sizes), step)), sizes, step)
    return folder / checkpoints / "d20"


def flags_for(source: Path, run_dir: object = "not written to", **flags) -> ImportConfig:
    return ImportConfig(source=str(source), run_dir=str(run_dir), **flags)


def imported(source: Path, run_dir: Path, **flags) -> Checkpoint:
    config = flags_for(source, run_dir, **flags)
    return write_run(read_source(config), config, lambda line: None)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@torch.no_grad()
def logits_of(model: GPT) -> torch.Tensor:
    tokens = torch.randint(300, (1, 300), generator=torch.Generator().manual_seed(1))
    return model.logits(model(tokens))


def loaded(run_dir: Path, name: str) -> GPT:
    checkpoint = named_checkpoint(str(run_dir), name, pytest.fail)
    tokenizer = Tokenizer.load(tokenizer_of(str(run_dir), checkpoint.folder))
    return load_model(checkpoint, tokenizer, RunContext(use_gpu=False), "float32")


@pytest.mark.parametrize("sizes", [SIZES, TODAY], ids=["2025-10", "today"])
@pytest.mark.parametrize(
    ("checkpoints", "stage"),
    [
        ("base_checkpoints", "pretrain"), ("mid_checkpoints", "pretrain"), ("chatsft_checkpoints", "sft"),
        ("chatrl_checkpoints", "sft"),
    ],
)  # fmt: skip
def test_nanochats_own_tree_becomes_a_stage(tmp_path, sizes, checkpoints, stage):
    source = cache(tmp_path / "cache", checkpoints, sizes)
    checkpoint = imported(source, tmp_path / "run")
    assert checkpoint.folder == str(tmp_path / "run" / stage / "checkpoints" / "step_000650")
    assert problem_with(checkpoint.folder) is None
    assert checkpoint.is_chat is (stage == "sft")
    assert checkpoint.generation == (generation.CHAT if stage == "sft" else generation.BASE)
    assert named_checkpoint(str(tmp_path / "run"), stage, pytest.fail) == checkpoint
    theirs = write_tokenizer(tmp_path / "again")
    ours = Tokenizer.load(tokenizer_of(str(tmp_path / "run"), checkpoint.folder))
    assert ours.encode_ordinary("Fish, 1234 fish") == theirs.encode_ordinary("Fish, 1234 fish")
    expected = logits_of(randomised(config_of(sizes), 650))
    assert expected.std() > 1.5
    torch.testing.assert_close(logits_of(loaded(tmp_path / "run", stage)), expected, rtol=0, atol=1e-4)


def test_the_newest_step_is_read_or_the_one_that_is_named(tmp_path):
    source = cache(tmp_path / "cache", steps=(9, 1000000, 650))
    for name in ("model_2000000_backup.pt", "model_2000000.pt.part", "old_model_2000000.pt"):
        (source / name).write_bytes(b"no model of nanochat")
    config = flags_for(source)
    for step, flags in ((1000000, {}), (9, {"step": 9})):
        model = read_source(replace(config, **flags))
        assert model.step == step
        assert model.origin == f"karpathy/nanochat of today, step {step}"
        expected = randomised(config_of(TODAY), step).state_dict()["lm_head.weight"]
        assert torch.equal(model.tensors["lm_head.weight"][:300], expected[:300])
    with pytest.raises(ConfigError, match=r"^step=10: .*d20 has 9, 650, 1000000\. Name one of them"):
        read_source(replace(config, step=10))
    with pytest.raises(ConfigError, match="step=-1: must be at least 0"):
        replace(config, step=-1)


def test_a_source_may_be_named_from_here(tmp_path, monkeypatch):
    source = cache(tmp_path / "cache")
    monkeypatch.chdir(source.parent)
    imported(Path("d20"), tmp_path / "run")
    flags = json.loads((tmp_path / "run" / "pretrain" / "config.json").read_text())["config"]["import"]
    assert flags == {
        "source": str(source),
        "run_dir": str(tmp_path / "run"),
        "step": None,
        "tokenizer": None,
        "stage": None,
    }


def test_a_model_of_step_0_is_not_one_that_has_not_begun(tmp_path):
    checkpoint = imported(cache(tmp_path / "cache", steps=(0,)), tmp_path / "run")
    assert checkpoint.folder.endswith("step_000001")


def test_the_tokenizer_beside_the_model_comes_before_that_of_the_tree(tmp_path):
    source = cache(tmp_path / "cache")
    (tmp_path / "cache" / "tokenizer" / "tokenizer.pkl").write_bytes(b"not looked at")
    write_tokenizer(source)
    tokenizer = read_source(flags_for(source)).tokenizer
    for named in (source, source / "tokenizer.pkl"):
        assert read_source(flags_for(source, tokenizer=str(named))).tokenizer.hash == tokenizer.hash
    with pytest.raises(DataError, match=r"cache/tokenizer/tokenizer\.pkl: "):
        read_source(flags_for(source, tokenizer=str(tmp_path / "cache" / "tokenizer")))
    with pytest.raises(DataError, match=r"tokenizer=.*/nowhere: there is no such file"):
        read_source(flags_for(source, tokenizer=str(tmp_path / "nowhere")))


def test_without_a_tokenizer_it_is_said_where_it_was_looked_for(tmp_path):
    source = cache(tmp_path / "cache")
    (tmp_path / "cache" / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(ConfigError) as raised:
        read_source(flags_for(source))
    places = f"{source}/tokenizer.pkl nor {tmp_path}/cache/tokenizer/tokenizer.pkl"
    assert str(raised.value) == f"tokenizer=None: neither {places} is there. Name tokenizer.pkl with --tokenizer."


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    source = cache(tmp_path / "cache")
    write_tokenizer(source, 299)
    with pytest.raises(TokenizerMismatchError, match="has 299 tokens, the model 300"):
        read_source(flags_for(source))


def test_a_source_that_is_none_is_refused(tmp_path):
    source = cache(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"nowhere: is empty or not there\. Name the folder of a model"):
        read_source(flags_for(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"has neither model_\*\.pt nor config\.json"):
        read_source(flags_for(tmp_path / "cache" / "base_checkpoints"))
    with pytest.raises(ConfigError, match=r"model_000650\.pt: is a file\. Name its folder"):
        read_source(flags_for(source / "model_000650.pt"))


def test_a_checkpoint_of_this_project_is_gone_on_from_otherwise(run_dir):
    with pytest.raises(ConfigError, match=r"step_000650: is a checkpoint of nanochat on Ray\. Go on from it: sft"):
        read_source(flags_for(run_dir / "pretrain/checkpoints/step_000650"))


def test_a_stage_that_is_named_is_the_models_stage(tmp_path):
    checkpoint = imported(cache(tmp_path / "cache"), tmp_path / "run", stage="sft")
    assert checkpoint.is_chat
    assert "/sft/" in checkpoint.folder
    assert checkpoint.generation == generation.CHAT
    other = imported(cache(tmp_path / "other", "chatsft_checkpoints"), tmp_path / "run", stage="pretrain")
    assert not other.is_chat
    assert "/pretrain/" in other.folder


def hf_folder(folder: Path, run_dir: Path, stage: str, is_chat: bool) -> Path:
    checkpoint = named_checkpoint(str(run_dir), stage, pytest.fail)
    tokenizer = Tokenizer.load(RunFolder(str(run_dir)).tokenizer)
    config = replace(config_of(TODAY), smear=False)
    sampling = {"temperature": 0.25, "top_k": 7} if is_chat else {}
    write_folder(
        str(folder), config, checkpoint.model_tensors(), tokenizer, is_chat=is_chat, generation=sampling, card="x"
    )
    return folder


@pytest.fixture
def without_smear(tmp_path) -> Path:
    """A run with a model that Hugging Face's tools can have."""
    source = randomised(config_of(TODAY))
    with torch.no_grad():
        source.smear_lambda.zero_()
    write_checkpoint(tmp_path / "source", state_dict(source), TODAY)
    write_tokenizer(tmp_path / "source")
    imported(tmp_path / "source", tmp_path / "first")
    return tmp_path / "first"


@pytest.mark.parametrize(("is_chat", "stage"), [(False, "pretrain"), (True, "sft")])
def test_a_hugging_face_folder_becomes_a_stage(tmp_path, without_smear, is_chat, stage):
    folder = hf_folder(tmp_path / "hf", without_smear, "pretrain", is_chat)
    checkpoint = imported(folder, tmp_path / "run")
    assert checkpoint.folder.endswith(f"/{stage}/checkpoints/step_000001")
    assert checkpoint.is_chat is is_chat
    if is_chat:
        assert checkpoint.generation == {"temperature": 0.25, "top_k": 7}
    before = named_checkpoint(str(without_smear), "pretrain", pytest.fail)
    assert checkpoint.weights_sha256 == before.weights_sha256, "bit for bit"
    assert checkpoint.state["model"] == before.state["model"]
    assert checkpoint.state["tokenizer_hash"] == before.state["tokenizer_hash"]
    origin = json.loads((tmp_path / "run" / stage / "config.json").read_text())["config"][stage]["origin"]
    assert origin == "the Hugging Face folder hf"


def test_a_hugging_face_folder_is_imported_once(tmp_path, without_smear):
    folder = hf_folder(tmp_path / "hf", without_smear, "pretrain", False)
    imported(folder, tmp_path / "run")
    before = files_of(tmp_path / "run")
    imported(folder, tmp_path / "run")
    assert files_of(tmp_path / "run") == before
    weights = named_checkpoint(str(without_smear), "pretrain", pytest.fail).model_tensors()
    tokenizer = Tokenizer.load(RunFolder(str(without_smear)).tokenizer)
    weights["lm_head.weight"][5, 5] += 1
    config = replace(config_of(TODAY), smear=False)
    write_folder(str(tmp_path / "other" / "hf"), config, weights, tokenizer, is_chat=False, generation={}, card="x")
    with pytest.raises(CheckpointError, match="already"):
        imported(tmp_path / "other" / "hf", tmp_path / "run")
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("flags", [{"step": 3}, {"tokenizer": "x"}])
def test_flags_of_nanochats_checkpoints_are_refused_for_a_hugging_face_folder(tmp_path, without_smear, flags):
    folder = hf_folder(tmp_path / "hf", without_smear, "pretrain", False)
    with pytest.raises(ConfigError, match=rf"^{next(iter(flags))}=.: a Hugging Face folder has one model"):
        imported(folder, tmp_path / "run", **flags)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A base model in nanochat's tree, which no test changes."""
    return cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run_dir(tmp_path, cached) -> Path:
    """A run directory with that model."""
    imported(cached, tmp_path / "run")
    return tmp_path / "run"


def test_the_same_import_again_writes_nothing_and_says_so(run_dir, cached, tmp_path):
    before, said = files_of(run_dir), []
    config = flags_for(cached, run_dir)
    checkpoint = write_run(read_source(config), config, said.append)
    assert files_of(run_dir) == before
    assert said[-1] == f"there      {checkpoint.folder} is this model already: nothing was written"
    (tmp_path / "moved").symlink_to(cached)
    config = flags_for(tmp_path / "moved", run_dir, tokenizer=str(cached.parent.parent / "tokenizer"))
    assert write_run(read_source(config), config, said.append) == checkpoint
    assert files_of(run_dir) == before


def test_another_import_into_the_stage_is_refused_and_nothing_is_written(run_dir, cached, tmp_path):
    before = files_of(run_dir)
    write_checkpoint(tmp_path / "other", state_dict(randomised(config_of(TODAY), 1)), TODAY, 650)
    write_checkpoint(tmp_path / "other", state_dict(randomised(config_of(TODAY), 1)), TODAY, 651)
    write_tokenizer(tmp_path / "other")
    for step in (650, 651):
        with pytest.raises(CheckpointError, match=r"run/pretrain: has .*/step_000650 already\. Import into another"):
            imported(tmp_path / "other", run_dir, step=step)
    assert files_of(run_dir) == before


def test_a_run_with_another_tokenizer_is_refused_and_nothing_is_written(tmp_path, cached):
    Tokenizer([b"th"], SPLIT_PATTERNS["nanochat"]).save(str(tmp_path / "run" / "tokenizer"))
    before = files_of(tmp_path / "run")
    with pytest.raises(TokenizerMismatchError, match=r"run: has another tokenizer\. Import into another --run-dir"):
        imported(cached, tmp_path / "run")
    assert files_of(tmp_path / "run") == before


def test_a_run_with_the_same_tokenizer_keeps_it(tmp_path, cached):
    read_source(flags_for(cached)).tokenizer.save(str(tmp_path / "run" / "tokenizer"))
    before = files_of(tmp_path / "run")
    imported(cached, tmp_path / "run")
    assert before.items() <= files_of(tmp_path / "run").items()


def test_a_stage_that_was_trained_here_is_refused(tmp_path, cached):
    """By its checkpoints, and where it has none yet by its config."""
    stage = RunFolder(str(tmp_path / "run")).pretrain
    writer = CheckpointWriter(stage.checkpoints, rank=0, world_size=1, keep=1, attempt="a")
    writer.save(3, {"a": torch.ones(1)}, {}, {"stage": {}})
    writer.wait()
    with pytest.raises(CheckpointError, match=r"has .*step_000003 already"):
        imported(cached, tmp_path / "run")
    storage.remove(stage.checkpoints)
    storage.write_json(stage.config, {"identity": {"pretrain.depth": 12}})
    before = files_of(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"pretrain\.depth=None \(was 12\)"):
        imported(cached, tmp_path / "run")
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("kept", range(4))
def test_an_import_that_was_killed_is_done_again(cached, run_dir, kept):
    """After it had written its config and so many files of the checkpoint."""
    folder = run_dir / "pretrain" / "checkpoints" / "step_000650"
    written = ["optimizer_00_of_01.safetensors", "model.safetensors", "state.json", "checksums_00_of_01.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    weights, state = (folder / "model.safetensors").read_bytes(), json.loads((folder / "state.json").read_text())
    for name in written[kept:]:
        (folder / name).unlink()
    checkpoint = imported(cached, run_dir)
    assert problem_with(checkpoint.folder) is None
    assert (folder / "model.safetensors").read_bytes() == weights
    assert checkpoint.state | {"attempt": None} == state | {"attempt": None}


def test_an_import_whose_checkpoint_was_damaged_is_done_again(cached, run_dir):
    path = run_dir / "pretrain" / "checkpoints" / "step_000650" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    imported(cached, run_dir)
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "c.jsonl"
    with open(path, "w") as file:
        for number in range(80):
            talk = [{"role": "user", "content": f"{number} or {number}?"}, {"role": "assistant", "content": "old fish"}]
            file.write(json.dumps({"messages": talk}) + "\n")
    return path


def fine_tuned(base: Checkpoint, run_dir: Path, conversations: Path, **flags) -> tuple[Checkpoint | None, list[float]]:
    """Fine-tune two steps of two rows in this process, and return the losses too."""
    config = SftConfig(
        mixture=(f"messages={conversations}",), num_steps=2, dtype="float32", compile="off", evaluate_every=0,
        sample_every=0, sample_tokens=1, micro_batch_rows=2, chat_problems=0, log_every=1,
        global_batch_tokens=2 * SHORT["sequence_len"], **flags,
    )  # fmt: skip
    folder = RunFolder(str(run_dir))
    source, tokenizer = MixtureSource(config, folder.tasks), Tokenizer.load(folder.tokenizer)
    shards = write_mixture_shards(source, RunContext(), tokenizer, SHORT["sequence_len"], folder.sft_shards)
    rows = resolve_sft(config, base, shards.rows("train")).plan.rows_per_step
    stream = local_stream(RowReader(shards, "train", config.seed), rows, 0)
    stage = StageFolder(str(run_dir / f"sft_{len(list(run_dir.iterdir()))}"))
    inputs = SftInputs(tokenizer, shards, stream, stage, base, load_mixture(source).held_out)
    done = finetune(config, RunContext(use_gpu=False), inputs)
    return done, [record["loss"] for record in read_jsonl(stage.metrics) if "loss" in record]


def test_fine_tuning_goes_on_from_it_and_its_warm_start_is_a_cold_one(tmp_path, conversations):
    run_dir = tmp_path / "run"
    imported(cache(tmp_path / "cache", sizes=SHORT), run_dir)
    base = named_checkpoint(str(run_dir), "pretrain", pytest.fail)
    done, losses = fine_tuned(base, run_dir, conversations)
    cold, same = fine_tuned(base, run_dir, conversations, warm_start=False)
    assert done is not None
    assert cold is not None
    assert losses == same
    assert len(losses) == 2
    assert done.weights_sha256 == cold.weights_sha256 != base.weights_sha256
    assert done.is_chat
    assert done.state["stage"] == {"base_sha256": base.weights_sha256}
    assert done.state["updates"] == 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_optimisers_state_is_one_that_has_not_begun(run_dir, world_size):
    base = named_checkpoint(str(run_dir), "pretrain", pytest.fail)
    model = GPT(config_of(TODAY))
    sft = resolve_sft(SftConfig(), base, 5)
    parameters = dict(model.named_parameters())
    groups = scaling.parameter_groups(sft.plan.model, list(parameters), sft.rates, sft.plan.lr_factor)
    for rank in range(world_size):
        optimizer = MuonAdamW(parameters, groups, muon_dtype=torch.float32, rank=rank, world_size=world_size)
        wanted = optimizer.state_tensors()
        assert len(wanted) > 10
        for tensor in wanted.values():
            tensor.fill_(7)
        base.optimizer_tensors(wanted)
        assert not any(tensor.any() for tensor in wanted.values())


@pytest.mark.parametrize("sizes", [SIZES, TODAY], ids=["2025-10", "today"])
def test_batch_and_rates_are_the_dials(sizes):
    model = ForeignModel(
        origin="", step=650, weights_sha256="", config=config_of(sizes), tensors={}, is_chat=False, generation={},
        tokenizer=Tokenizer([], SPLIT_PATTERNS["nanochat"]),
    )  # fmt: skip
    plan, rates = dial(model)
    assert plan.model == model.config
    assert plan.num_steps == 650
    batch = plan.rows_per_step * 640
    assert rates == scaling.LearningRates(matrix=0.02, embedding=0.3, unembedding=0.008, scalar=0.5)
    parameters = scaling.scaling_parameters(model.config)
    reference = 12 * (12 * 12 * 768**2 + 320 * 768 + (6 * 12 * 6 if sizes is TODAY else 0))
    assert abs(batch - 2 ** round(torch.tensor(2**19 * (12 * parameters / reference) ** 0.383).log2().item())) < 640
    assert plan.lr_factor == (batch / 2**19) ** 0.5
    assert plan.weight_decay == pytest.approx(0.28 * plan.lr_factor * reference / (12 * parameters), rel=1e-5)
    assert plan.flops_per_token == scaling.flops_per_token(model.config, 640)


def test_a_batch_is_at_least_one_row():
    config = replace(config_of(SIZES), sequence_len=1 << 20)
    tokenizer = Tokenizer([], SPLIT_PATTERNS["nanochat"])
    assert dial(ForeignModel("", 1, "", config, {}, tokenizer, False, {}))[0].rows_per_step == 1


def test_reinforcement_learning_and_serving_find_a_chat_model(tmp_path):
    imported(cache(tmp_path / "cache", "chatsft_checkpoints"), tmp_path / "run")
    run_dir = str(tmp_path / "run")
    config = RLConfig(task="arithmetic", max_new_tokens=64)
    practice = prepare_practice(run_dir, config, Terminal())
    assert practice.base.folder.endswith("/sft/checkpoints/step_000650")
    assert practice.plan.model == config_of(TODAY)
    serving = pinned(ServingConfig(run_dir=run_dir), pytest.fail)
    assert serving.models == (f"sft={practice.base.folder}",)


def test_the_engine_generates_what_the_model_says(run_dir):
    model = loaded(run_dir, "pretrain")
    prompt = (291, 40, 41, 42)
    engine = Engine(loaded(run_dir, "pretrain"), max_running=1, longest=64)
    (answer,) = complete(engine, [Request(prompt=prompt, max_new_tokens=12, temperature=0.0)])
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    assert list(answer.tokens) == ids[4:]


def test_evaluation_scores_it(tmp_path):
    imported(cache(tmp_path / "cache", "chatsft_checkpoints"), tmp_path / "run")
    run_dir = str(tmp_path / "run")
    assert chat_models(run_dir) == ("sft",)
    assert trained_character(run_dir) is None
    model = named_model(run_dir, "sft", pytest.fail)
    config = EvaluationConfig(models=("sft",), tasks=("spelling",), max_per_task=2, max_new_tokens=4, dtype="float32")
    run = RunContext(use_gpu=False)
    scores = evaluate(Evaluator(config, run, run_dir, [model]), run)
    assert scores["sft"]["chat"]["spelling"]["n"] == 2
    assert summary(run_dir)["spelling_sft"]["n"] == 2


def with_shards(run_dir: Path) -> TokenShards:
    """Pack a little text with the run's tokenizer, as ray_jobs/prepare_data.py would."""
    folder = RunFolder(str(run_dir))
    for number in range(2):
        (run_dir / f"{number}.jsonl").write_text('{"text": "The old man and the fish. The sea is old."}\n' * 300)
    run = RunContext()
    corpus = prepare_corpus(CorpusConfig(corpus=str(run_dir / "*.jsonl")), run, folder.text, None)
    shards = ShardsConfig(sequence_len=640)
    return write_token_shards(shards, run, corpus, Tokenizer.load(folder.tokenizer), folder.shards)


def test_its_bits_per_byte_are_measured_on_text_that_is_packed_here(run_dir):
    with_shards(run_dir)
    model = named_model(str(run_dir), "pretrain", pytest.fail)
    config = EvaluationConfig(models=("pretrain",), tasks=(), bits_per_byte=True, dtype="float32")
    run = RunContext(use_gpu=False)
    assert evaluate(Evaluator(config, run, str(run_dir), [model]), run)["pretrain"]["bits_per_byte"] > 5


def test_pretraining_there_is_refused_and_nothing_is_written(run_dir):
    with_shards(run_dir)
    before = files_of(run_dir)
    with pytest.raises(ConfigError, match=r"^run_dir=\S+/pretrain: its model was imported, so it cannot be trained on"):
        pretrain_base(str(run_dir), PretrainConfig(global_batch_tokens=6400), ClusterConfig(num_workers=1), Terminal())
    assert files_of(run_dir) == before


def test_pretraining_does_not_go_on_from_it_without_its_config_either(run_dir):
    shards, folder = with_shards(run_dir), RunFolder(str(run_dir))
    (run_dir / "pretrain" / "config.json").unlink()
    config = PretrainConfig(
        depth=5, head_dim=12, n_embd=48, n_kv_head=2, smear=True, num_steps=700, global_batch_tokens=640,
        dtype="float32", compile="off",
    )  # fmt: skip
    stream = local_stream(RowReader(shards, "train", 0), 1, 650)
    inputs = TrainingInputs(Tokenizer.load(folder.tokenizer), shards, stream, folder.pretrain)
    before = files_of(run_dir / "pretrain" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step_000650: began from \{'imported': .*\}, not from \{\}"):
        pretrain(config, RunContext(use_gpu=False), inputs)
    assert files_of(run_dir / "pretrain" / "checkpoints") == before


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_pages_are_made_of_it(cached, tmp_path, stage):
    """Before and after token shards are there, which the walk's first sections need."""
    imported(cached, tmp_path / "run", stage=stage)
    for _ in range(2):
        assert "karpathy/nanochat of today, step 650" in Path(write_report(str(tmp_path / "run"))).read_text()
        assert "has other fields" in Path(write_walk(str(tmp_path / "run"))).read_text() or stage == "pretrain"
        with_shards(tmp_path / "run")


def test_no_tokens_or_compute_are_claimed_for_what_others_trained(run_dir):
    resolved = json.loads((run_dir / "pretrain" / "config.json").read_text())["resolved"]
    assert resolved["rows_per_step"] is None
    assert resolved["flops_per_token"] is None
    assert resolved["parameters"]["total"] == sum(p.numel() for p in randomised(config_of(TODAY)).parameters())


@pytest.fixture(scope="module")
def job():
    """The entry point ray_jobs/import_checkpoint.py as a module."""
    spec = importlib.util.spec_from_file_location("import_job", ROOT / "ray_jobs" / "import_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_by(job, monkeypatch, config: ImportConfig) -> tuple[int, list[str]]:
    lines: list[str] = []
    monkeypatch.setattr(Terminal, "line", lambda self, line: lines.append(line))
    return job.import_checkpoint(config), lines


def test_the_job_says_what_was_read_and_what_to_run_next(job, tmp_path, cached, monkeypatch):
    code, lines = said_by(job, monkeypatch, flags_for(cached, tmp_path / "run"))
    assert code == 0
    count = sum(p.numel() for p in randomised(config_of(TODAY)).parameters())
    assert lines == [
        f"read       karpathy/nanochat of today, step 650: {count:,} parameters, 5 layers of width 48, 300 tokens",
        "           as a base model; --stage sft says of a model that it was fine-tuned on conversations",
        f"wrote      {tmp_path}/run/pretrain/checkpoints/step_000650",
        f"next       python ray_jobs/sft.py --run-dir {tmp_path}/run",
    ]
    _, lines = said_by(job, monkeypatch, flags_for(cached, tmp_path / "chat", stage="sft"))
    assert lines[1:] == [
        "           as a fine-tuned model, whatever came after its fine-tuning: sft.py, rl.py and serve.py take it",
        f"wrote      {tmp_path}/chat/sft/checkpoints/step_000650",
        f"next       python ray_jobs/chat.py --run-dir {tmp_path}/chat",
    ]


def test_the_job_ends_with_one_line_and_makes_no_run_of_a_source_that_is_none(job, tmp_path, monkeypatch, capsys):
    code, lines = said_by(job, monkeypatch, flags_for(tmp_path / "none", tmp_path / "run"))
    assert (code, lines) == (2, [])
    assert capsys.readouterr().err.startswith(f"\nConfigError: source={tmp_path}/none: is empty or not there. Name")
    assert not (tmp_path / "run").exists()


def test_a_uri_is_a_run_directory_too(cached):
    config = flags_for(cached, "memory://import_test")
    said: list[str] = []
    for _ in range(2):
        checkpoint = write_run(read_source(config), config, said.append)
    assert problem_with(checkpoint.folder) is None
    assert said[-1].endswith("nothing was written")
    assert isinstance(TokenizerMismatchError("x"), NanochatError)
