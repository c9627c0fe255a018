"""What comes from others is data: it runs nothing, reads and writes nothing else, and tells nobody."""

import ast
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smol_post import (
    chat,
    config,
    data,
    launch_files,
    loading,
    manifest,
    model,
    plan,
    runner,
    scoring,
    sources,
)
from smol_post.refusal import Failure, Refusal, redacted
from smol_post.report import Cell, Table, commands, to_markdown
from smol_post.trust import check_checkpoint
from smol_post.vocabulary import Vocabulary, load_tokenizer

Build = Callable[..., Any]
Command = Callable[..., subprocess.CompletedProcess[str]]
PACKAGE = Path(model.__file__).parent
RECIPE = {"stage": "sft", "max_tokens": 64, "global_batch_size": 1, "num_steps": 1,
          "sources": [{"name": "s", "generator": "dual_mode_chats", "num_rows": 1}]}  # fmt: skip
TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zA"  # of the form of the Hub's, and nobody's
PLANTED = "import pathlib\npathlib.Path({marker!r}).touch()\nraise SystemExit(3)\n"


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def saved(build: Build, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "parent"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that planted code writes."""
    return tmp_path / "it ran".replace(" ", "_")


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def plant_code(folder: Path, file: str, marker: Path) -> None:
    (folder / "own.py").write_text(PLANTED.format(marker=str(marker)))
    found = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    edit(folder / file, auto_map={"AutoTokenizer": [None, "own.T"]} if "tokenizer" in file else found)


def pipeline_of(folder: Path | str, tmp_path: Path, **keys: Any) -> Path:
    """A recipe folder of one SFT run from `folder`."""
    where = tmp_path / "recipe"
    where.mkdir()
    (where / "sft.yaml").write_text(yaml.safe_dump(RECIPE | keys))
    runs = [{"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": [str(folder)]}]
    (where / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    return where


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(module, dotted name, call) of every call of the package."""
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.stem, ast.unparse(node.func), node


# Code


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_refused_in_one_line_that_names_the_key_to_set(
    command: Command, folder: Path, marker: Path, tmp_path: Path, file: str
) -> None:
    plant_code(folder, file, marker)
    recipe = pipeline_of(folder, tmp_path)
    done = command("smol-post", "sft", recipe, "--run-dir", tmp_path / "runs")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"refused: {folder / file}: auto_map names code of the checkpoint (own.")
    assert "trust_remote_code: true" in line
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words", [("export", "FOLDER", "OUT", "--context", "4096"), ("eval", "FOLDER", "--suite", "SUITE")]
)
def test_commands_without_a_recipe_run_no_code_of_a_checkpoint(
    command: Command, recipe_folder: Path, folder: Path, marker: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    plant_code(folder, "config.json", marker)
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out"), "SUITE": str(recipe_folder / "evals.yaml")}
    done = command("smol-post", *(places.get(word, word) for word in words))
    assert (done.returncode, marker.exists()) == (2, False)
    assert "auto_map names code of the checkpoint" in done.stderr


@pytest.mark.parametrize("load", [load_tokenizer, model.load_config])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_loader_runs_code_of_a_checkpoint(folder: Path, marker: Path, load: Any, file: str) -> None:
    plant_code(folder, file, marker)
    with pytest.raises(Refusal, match="auto_map"):
        load(folder)
    assert not marker.exists()


def test_every_loader_is_told_whether_code_may_run_so_that_none_asks_on_the_terminal() -> None:
    """transformers asks who has not said, and waits; None is as good as nothing said."""
    told = [
        [ast.unparse(one.value) for one in call.keywords if one.arg == "trust_remote_code"]
        for _, name, call in calls()
        if re.fullmatch(r"Auto\w+\.from_\w+|MergeOptions", name)
    ]
    assert sorted(told) == [["False"], ["False"], *[["trust_remote_code"]] * 3]


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@main:forward"},
        {"attn_implementation": {"text_config": "eager", "vision_config": "someone/kernel"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
    ],
)
def test_a_configuration_that_names_a_kernel_of_the_hub_is_refused(
    folder: Path, keys: dict[str, Any]
) -> None:
    """transformers downloads and imports it, whatever trust_remote_code says."""
    edit(folder / "config.json", **keys)
    for trusted in (False, True):
        with pytest.raises(Refusal, match="names a kernel of the Hub, which is code"):
            model.load_config(folder, trust_remote_code=trusted)
    edit(folder / "config.json", **dict.fromkeys(keys, None))
    model.load_config(folder)


def test_what_is_no_json_is_left_to_whoever_reads_it(folder: Path) -> None:
    for name, text in (("config.json", "{"), ("tokenizer_config.json", "[]")):
        (folder / name).write_text(text)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    edit(folder / "generation_config.json", auto_map="x")
    check_checkpoint(folder)
    with pytest.raises(Refusal, match=r"config\.json: not readable as JSON"):
        model.load_config(folder)


def test_trusted_code_may_not_come_from_another_repository(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "someone/else--own.C"})
    with pytest.raises(Refusal, match="code of another repository"):
        check_checkpoint(folder, trust_remote_code=True)
    edit(folder / "config.json", auto_map={})
    edit(folder / "tokenizer_config.json", auto_map=["someone/else--own.T", None])  # as of tokenizers of old
    with pytest.raises(Refusal, match="auto_map names code of the checkpoint"):
        check_checkpoint(folder)
    with pytest.raises(Refusal, match="code of another repository"):
        check_checkpoint(folder, trust_remote_code=True)


def test_code_is_part_of_what_a_checkpoint_is(folder: Path) -> None:
    digests = []
    for text in ("a = 1\n", "a = 2\n"):
        (folder / "own.py").write_text(text)
        digests.append(manifest.content_digest(manifest.content_files(folder)))
    assert digests[0] != digests[1]


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_from_the_hub_only_where_the_recipe_trusts_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, trusted: bool
) -> None:
    asked: list[str] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recipe = pipeline_of(Path("ours/tiny"), tmp_path, trust_remote_code=trusted)
    (job,) = plan.make_plan(recipe, run_root=tmp_path, arguments=[]).jobs
    runner.examine(job)
    assert ("*.py" in asked) == trusted
    assert "*.safetensors" in asked


def test_only_stages_that_start_from_a_checkpoint_have_the_key() -> None:
    having = {name for name, kind in config.RECIPES.items() if "trust_remote_code" in kind.model_fields}
    assert having == {"long_context", "mid", "sft", "apo"}
    assert {config.RECIPES[name].model_fields["trust_remote_code"].default for name in having} == {False}


def test_the_trainer_s_own_key_is_refused_as_the_recipe_s(tmp_path: Path) -> None:
    recipe = pipeline_of(tmp_path, tmp_path, trainer={"trust_remote_code": True}) / "sft.yaml"
    with pytest.raises(Refusal, match="the recipe owns this; set trust_remote_code instead"):
        loading.load_recipe(recipe)


# Pickles


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth", "model.pt"]
)
@pytest.mark.parametrize("decoy", [False, True])
def test_pickled_weights_are_refused_unread(folder: Path, marker: Path, name: str, decoy: bool) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    if not decoy:
        (folder / "other.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(Refusal, match=rf"{name}: found pickled weights.*convert them"):
        model.load_model(folder, attn_implementation="sdpa")
    assert not marker.exists()


def test_pickles_beside_the_weights_are_never_opened(folder: Path, marker: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "adapter_model.bin", "tokenizer.pkl", "vocab.npy"):  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    model.load_model(folder, attn_implementation="sdpa")
    load_tokenizer(folder)
    assert not marker.exists()


def test_the_trap_is_one(marker: Path) -> None:
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()


def test_an_adapter_that_names_another_model_is_refused(folder: Path) -> None:
    """transformers reads the model that adapter_config.json names, and leaves the weights here alone."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(Refusal, match="found an adapter"):
        model.load_model(folder, attn_implementation="sdpa")


def test_the_package_itself_unpickles_and_evaluates_nothing() -> None:
    forbidden = re.compile(
        r"eval|exec|compile|__import__|os\.system|os\.popen|(pickle|dill|marshal|joblib|shelve|torch|cloudpickle)"
        r"\.(loads?|Unpickler)|yaml\.(unsafe_|full_)?load(_all)?|jinja2\.(Template|Environment)"
    )
    found = [(where, name) for where, name, _ in calls() if forbidden.fullmatch(name)]
    # our own two pages and a card, and a safe loader
    assert found == [
        ("inspection", "jinja2.Environment"),
        ("loading", "yaml.load"),
        ("model_card", "jinja2.Environment"),
        ("report", "jinja2.Environment"),
    ]
    assert issubclass(loading._Loader, yaml.SafeLoader)
    every = [keyword.arg for _, _, call in calls() for keyword in call.keywords]
    assert not {"allow_pickle", "weights_only", "shell"} & set(every)


# YAML

YAML = [
    '!!python/object/apply:os.system ["touch {}"]',
    "!!python/object/new:os.system [touch {}]",
    "!!python/name:os.system",
]


@pytest.mark.parametrize("value", YAML)
@pytest.mark.parametrize("file", ["recipe", "pipeline", "evals", "launch", "override"])
def test_yaml_makes_no_python_objects(tmp_path: Path, marker: Path, file: str, value: str) -> None:
    value = value.format(marker)
    path = tmp_path / ("pipeline.yaml" if file == "pipeline" else "a.yaml")
    path.write_text(
        {"recipe": "stage: sft\nseed: ", "evals": "stage: evals\nseed: "}.get(file, "runs: ") + value
    )
    readers: dict[str, Callable[[], object]] = {
        "pipeline": lambda: loading.load_pipeline(tmp_path),
        "launch": lambda: launch_files.read_launch(path),
        "override": lambda: loading.parse_override(f"seed={value}"),
    }
    with pytest.raises(Refusal, match=r"not readable as YAML|not YAML"):
        readers.get(file, lambda: loading.load_recipe(path))()
    assert not marker.exists()


# Templates

TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{{ strftime_now.__func__.__globals__ }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}{{ ''.__class__.mro() }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_reaches_nothing_but_the_chat(tokenizer: Any, marker: Path, template: str) -> None:
    """Of a recipe (rendered with rows), and of a parent's tokenizer (rendered to be answered)."""
    template = template.replace("MARKER", str(marker))
    good = chat.load_template("chatml")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="the chat template refuses the row"):
        chat.encode_chats([row], tokenizer, template=template + good, date_string="today")
    theirs = copy.deepcopy(tokenizer)
    theirs.chat_template = template + good
    with pytest.raises(Refusal, match="its chat template refuses"):
        scoring.render(theirs, row["messages"][:1], tokenize=False)
    assert not marker.exists()


# Names


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", "..", ".hidden", "", "a\n", "a\\b/c", "evals", "cache", "-x/.."]
)
def test_a_run_s_name_is_one_folder_of_the_run_root(tmp_path: Path, name: str) -> None:
    runs = [{"name": name, "stage": "base", "recipe": "base.yaml"}]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    with pytest.raises(Refusal, match=r"pipeline\.yaml: runs"):
        loading.load_pipeline(tmp_path)


@pytest.mark.parametrize("parent", ["../../x", "../base/../../x", "../base/../../../etc", "../.."])
def test_a_parent_of_the_pipeline_lies_in_its_run_root(tmp_path: Path, parent: str) -> None:
    runs: list[dict[str, Any]] = [{"name": "base", "stage": "base", "recipe": "base.yaml"}]
    runs += [{"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": [parent]}]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    with pytest.raises(Refusal, match="leaves its run"):
        loading.load_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "a\n"])
def test_the_name_of_texts_is_no_path(name: str) -> None:
    tree = {"stage": "evals", "perplexity": [{"name": name, "path": "t.txt", "max_tokens": 8}]}
    with pytest.raises(Refusal, match=r"perplexity\.0\.name"):
        loading.validate(config.EvalsRecipe, tree, where="x")


def test_a_source_s_name_is_no_path(tokenizer: Any, tmp_path: Path) -> None:
    where = tmp_path / "a" / "b"
    where.mkdir(parents=True)
    source = config.Source(name="../../../escaped", generator="dual_mode_chats", num_rows=4)
    recipe = config.SftRecipe(stage="sft", max_tokens=512, global_batch_size=1, num_steps=1, sources=[source])
    words = Vocabulary(tokenizer, tokenizer.chat_template, "<|endoftext|>", [])
    data.prepare(recipe, words, folder=where, cache_dir=where / "cache")
    assert [path.name for path in tmp_path.rglob("*escaped*")] == []
    assert [path.name for path in where.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/../../secret.safetensors",
        "pytorch_model-1.bin",
    ],
)
@pytest.mark.parametrize("load", [load_tokenizer, model.load_config])
def test_an_index_names_files_of_its_own_folder(folder: Path, name: str, load: Any) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refusal, match=r"weight_map names .*wanted \.safetensors of this folder"):
        load(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "notes.txt", "chat_template.jinja"])
def test_a_link_out_of_a_parent_is_refused_and_not_copied_into_an_export(
    command: Command, folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "private").write_text('{"key": "of mine"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../private")
    done = command("smol-post", "export", folder, tmp_path / "out", "--context", "4096")
    assert done.returncode == 2
    assert f"{folder / name}: a link that leads out of its folder" in done.stderr
    assert not (tmp_path / "out").exists()


# The Hub


def hub_cache(root: Path, saved: Path, commit: str) -> None:
    """`ours/tiny` at `commit`, its branch main, as the Hub's client keeps it: links into blobs."""
    place = root / "models--ours--tiny"
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    for number, path in enumerate(saved.iterdir()):
        shutil.copyfile(path, place / "blobs" / str(number))
        (place / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{number}")


def test_a_parent_from_the_hub_is_recorded_by_its_commit_which_decides_the_run(
    monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    recipe, prints = pipeline_of(Path("ours/tiny"), tmp_path), []
    (job,) = plan.make_plan(recipe, run_root=tmp_path, arguments=[]).jobs
    for commit in ("a" * 40, "b" * 40):
        hub_cache(tmp_path / "hub", saved, commit)
        parents, print_id = runner.examine(job)
        assert [one.digest for one in parents] == [f"hub:ours/tiny@{commit}"]
        prints.append(print_id)
    assert prints[0] != prints[1]
    model.load_model(parents[0].folder, attn_implementation="sdpa")  # links into blobs/ are the cache's own


def test_a_data_set_from_the_hub_is_recorded_by_its_commit_which_decides_its_fingerprint(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path
) -> None:
    read: list[str | None] = []

    def load(path: str, name: Any, *, split: str, revision: str, streaming: bool) -> datasets.Dataset:
        read.append(revision)
        chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 4
        return datasets.Dataset.from_dict({"messages": chats})

    monkeypatch.setattr(datasets, "load_dataset", load)
    words = Vocabulary(tokenizer, tokenizer.chat_template, "<|endoftext|>", [])
    source = config.Source(name="s", path="org/set", revision="main", mode="no_think")
    recipe = config.SftRecipe(stage="sft", max_tokens=512, global_batch_size=1, num_steps=1, sources=[source])
    ledgers = []
    for commit in ("a" * 40, "b" * 40):
        info = SimpleNamespace(sha=commit)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, info=info, **__: info)
        made = data.prepare(recipe, words, folder=tmp_path, cache_dir=tmp_path / "cache")
        ledgers.append(made.ledger)
        assert read[-1] == commit
    assert [one["revisions"] for one in ledgers] == [{"s": "a" * 40}, {"s": "b" * 40}]
    assert ledgers[0]["fingerprint"] != ledgers[1]["fingerprint"]


@pytest.mark.parametrize("own_code", [False, True])
def test_a_folder_of_the_working_directory_does_not_stand_for_a_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, marker: Path, tmp_path: Path, own_code: bool
) -> None:
    """datasets would read it, with the commit of another recorded; a program in it is not run."""
    (tmp_path / "here" / "org" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    source = config.Source(name="s", path="org/set", revision="a" * 40)
    if own_code:
        Path("org/set/set.py").write_text(PLANTED.format(marker=str(marker)))
        with pytest.raises(Refusal, match="scripts are no longer supported"):
            next(sources.read_rows(source, folder=tmp_path))
    else:
        with pytest.raises(Refusal, match="org/set is in the working directory too"):
            sources.pin(source, tmp_path)
    assert not marker.exists()


# Secrets


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token", "x"),
        ("token", "x"),
        ("trainer", {"hub_token": "x"}),
        ("trainer", {"optim_args": TOKEN}),
        ("trainer", {"lr_scheduler_kwargs": {"wandb_api_key": "x"}}),
        ("password", "x"),
        ("date_string", TOKEN),
        ("sources", [{"name": "s", "path": "https://ann:hidden@host/rows.jsonl"}]),
        ("sources", [{"name": "s", "path": "s3://AKIAABCDEFGHIJKLMNOP:hidden@bucket/rows.jsonl"}]),
        ("sources", [{"name": "s", "path": f"hf://{TOKEN}@datasets/a/b"}]),
        ("sources", [{"name": "s", "path": "https://host/rows.jsonl?X-Amz-Signature=hidden"}]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_secret_in_a_recipe_is_refused_with_the_remedy_and_not_repeated(
    tmp_path: Path, key: str, value: Any
) -> None:
    path = pipeline_of(tmp_path, tmp_path, **{key: value}) / "sft.yaml"
    with pytest.raises(Refusal, match=r"holds no secrets.*HF_TOKEN.*hf auth login") as refused:
        loading.load_recipe(path)
    assert not re.search(f"hidden|{TOKEN[5:20]}", str(refused.value))


def test_a_secret_in_a_pipeline_or_an_argument_is_refused(tmp_path: Path) -> None:
    recipe = pipeline_of("https://ann:hidden@host/model", tmp_path)
    with pytest.raises(Refusal, match=r"parents\.0: a recipe holds no secrets") as refused:
        loading.load_pipeline(recipe)
    assert "hidden" not in str(refused.value)
    with pytest.raises(Refusal, match="holds no secrets"):
        loading.load_recipe(recipe / "sft.yaml", arguments=[f"date_string={TOKEN}"])


@pytest.mark.parametrize("kind", [Refusal, Failure])
def test_no_line_repeats_what_looks_like_a_secret(kind: type[Exception]) -> None:
    url = "https://ann:hidden@host/x?token=hidden2&page=3"
    said = str(kind(f"seed: found '{TOKEN}', of {url} sk-proj-{'a' * 24}"))
    assert said == "seed: found '***', of https://***@host/x?***&page=3 ***"
    plain = "/data/hf_models_smollm3_base/sk-learn-corpus-of-long-texts org/name@main 0123456789abcdef hf_hub"
    assert redacted(plain) == plain


@pytest.mark.parametrize(
    "words",
    [
        ["run", f"https://ann:{TOKEN}@host"],
        ["eval", TOKEN, "--suite", "x"],
        ["sft", "recipe/sft.yaml", f"seed={TOKEN}"],
        [TOKEN],
    ],
)
def test_no_command_repeats_a_secret_that_it_refuses(
    command: Command, recipe_folder: Path, words: list[str]
) -> None:
    done = command("smol-post", *words, cwd=recipe_folder.parent)
    assert done.returncode == 2
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "micro_batch_tokens",
        "add_tokens",
        "stated_tokens",
        "num_tokens",
        "needle_tokens",
        "max_new_tokens",
        "eos_token",
        "pad_token",
        "tokenizer",
        "text_end",
    ],
)
def test_tokens_of_text_are_no_secrets(name: str) -> None:
    loading._check_secrets({name: ["<|im_end|>"], "trainer": {name: "x"}}, where="a.yaml")


# Pages


def cells(row: str) -> list[str]:
    """The cells of a GitHub table row: a bar ends one unless a backslash that is not escaped is before it."""
    return re.findall(r"(?:\\.|[^|\\])+", row.strip().strip("|"))


@pytest.mark.parametrize("text", ["a | b", "a \\| b", "a \\\\| b", "a\n| b |", "`|`"])
def test_no_text_breaks_a_markdown_table(text: str) -> None:
    table = to_markdown(Table([text, "two"], [[Cell(text), Cell("2")]]))
    assert {len(cells(line)) for line in table.splitlines()} == {2}


def test_the_commands_of_a_report_can_be_typed_whatever_folders_are_called(tmp_path: Path) -> None:
    run = SimpleNamespace(manifest={"recipe_file": "re cipes/$(touch x);`id`\n```/base.yaml"})
    for line in commands(Path("runs; id"), [run]):  # pyright: ignore[reportArgumentType]
        shell = ["sh", "-c", f"printf '%s\\n' {line}"]
        words = subprocess.run(shell, capture_output=True, text=True, check=True)
        assert len(words.stdout.splitlines()) in (4, 5)
        assert "$(touch x);`id` ```" in words.stdout


# Dependencies


def required(name: str, extras: frozenset[str], seen: dict[tuple[str, str], str]) -> None:
    """What a distribution requires here, all the way down: (name, extra) -> installed version, in `seen`."""
    for text in metadata.requires(name) or []:
        one = Requirement(text)
        for extra in extras or {""}:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                key = canonicalize_name(one.name)
                for wanted in {"", *one.extras}:
                    if (key, wanted) not in seen:
                        try:
                            seen[key, wanted] = metadata.version(key)
                        except metadata.PackageNotFoundError:
                            continue
                        required(key, frozenset({wanted}), seen)


def test_every_requirement_that_make_setup_installs_is_pinned_to_what_is_tested(repo: Path) -> None:
    pins = dict(line.split("==") for line in (repo / "constraints.txt").read_text().split())
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = re.search(r"^EXTRAS := (.*)$", (repo / "Makefile").read_text(), re.MULTILINE)
    assert extras
    asked = frozenset(re.findall("dev|eval|deepspeed|scale", extras[1]))
    assert asked == {"dev", "eval", "deepspeed", "scale"}
    seen: dict[tuple[str, str], str] = {}
    required("smol-post", asked, seen)
    found = {name: version.partition("+")[0] for (name, _), version in seen.items()}
    assert len(found) > 100
    system = {"pip", "setuptools", "wheel", "smol-post"}
    odd = {name: version for name, version in found.items() if pins.get(name) != version}
    assert {name: version for name, version in odd.items() if name not in system} == {}


def audit(repo: Path, tmp_path: Path, *, output: str, errors: str, code: int) -> tuple[int, str]:
    """Exit code and words of the audit where `pip-audit` ends so."""
    stub = tmp_path / "pip-audit"
    (tmp_path / "out").write_text(output)
    (tmp_path / "err").write_text(errors)
    stub.write_text(f"#!/bin/sh\ncat {tmp_path}/out; cat {tmp_path}/err >&2; exit {code}\n")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = [sys.executable, repo / "tools" / "audit.py", "constraints.txt"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, cwd=repo)
    return done.returncode, done.stdout


FINE = {"name": "six", "version": "1", "vulns": []}
BAD = {"name": "ten", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"], "aliases": []}]}
UNKNOWN = {"name": "odd", "skip_reason": "not found"}
DOWN = "requests.exceptions.ProxyError: HTTPSConnectionPool: Max retries exceeded with url: /six"


@pytest.mark.parametrize(
    ("listed", "errors", "code", "wanted"),
    [
        ([FINE], "No known vulnerabilities found", 0, (0, "audit: 1 packages, no known vulnerability")),
        ([FINE, BAD], "Found 1 known vulnerability", 1, (1, "ten 2: CVE-1, fixed in: 3")),
        ([FINE, BAD], "", 0, (1, "audit: 1 known vulnerabilities in 2 packages")),
        ([FINE, BAD], DOWN, 1, (1, "CVE-1")),
        ([FINE, UNKNOWN], "", 0, (0, "audit: not known to the server: odd")),
        ([UNKNOWN], "No known vulnerabilities found", 0, (0, "audit: not run: the server knows none")),
        (None, DOWN, 1, (0, "audit: not run: the advisory server cannot be reached")),
        (None, "ERROR: Could not connect to the vulnerability feed", 1, (0, "audit: not run: ")),
        (None, "ERROR: invalid requirements input", 1, (1, "audit: failed: ERROR: invalid requirements")),
        (None, "", 0, (1, "audit: failed: pip-audit said nothing")),
        (None, "usage: pip-audit: error: unrecognized arguments", 2, (1, "audit: failed: ")),
    ],
)  # fmt: skip
def test_an_audit_fails_for_what_it_found_and_says_when_it_could_not_ask(
    repo: Path, tmp_path: Path, listed: Any, errors: str, code: int, wanted: tuple[int, str]
) -> None:
    output = "" if listed is None else json.dumps({"dependencies": listed, "fixes": []})
    found, said = audit(repo, tmp_path, output=output, errors=errors, code=code)
    assert found == wanted[0], said
    assert wanted[1] in said


def test_a_machine_without_pip_audit_is_told_so(repo: Path, tmp_path: Path) -> None:
    script = [sys.executable, repo / "tools" / "audit.py"]
    done = subprocess.run(script, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "audit: not run: pip-audit is not installed\n")
