"""A catalogue of bad input: each is refused in one line that says what to do, and nothing on disk changes."""

import gzip
import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import __main__, loading, manifest, runner

Make = Callable[[Path], Any]
RECIPE = Path(__file__).parents[1] / "integration" / "recipe"
OWN = {
    "pipeline.yaml": {
        "evals": "evals.yaml",
        "runs": [{"name": one, "stage": one, "recipe": f"{one}.yaml"} for one in ("sft", "apo")],
    },
    "sft.yaml": {
        **{"stage": "sft", "max_tokens": 256, "global_batch_size": 1, "num_steps": 1},
        "sources": [{"name": "chats", "path": "rows.jsonl"}],
    },
    "apo.yaml": {
        **{"stage": "apo", "max_tokens": 256, "global_batch_size": 1, "num_steps": 1},
        "sources": [{"name": "pairs", "path": "pairs.jsonl"}],
    },
    "evals.yaml": {
        **{"stage": "evals", "needle_tokens": [16], "num_needle_questions": 1, "max_new_tokens": 2},
        **{"num_arithmetic_questions": 0, "num_preference_pairs": 0, "num_samples": 0},
    },
}
CHAT = {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}
ROW = CHAT | {"enable_thinking": False}
PAIR = {"prompt": "2+3?", "chosen": "5", "rejected": "6", "enable_thinking": False}
MODEL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, build: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(**MODEL).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes, `own` with rows on disk; a checkpoint, `parent`; and a run root with whole runs, measured."""
    shutil.copytree(RECIPE, tmp_path / "recipe")
    shutil.copytree(checkpoint, tmp_path / "parent")
    (tmp_path / "own").mkdir()
    for name, tree in OWN.items():
        (tmp_path / "own" / name).write_text(yaml.safe_dump(tree))
    edit("own/pipeline.yaml", runs__0__parents=[f"{tmp_path}/parent"])(tmp_path)
    edit("own/pipeline.yaml", runs__1__parents=[f"{tmp_path}/parent"])(tmp_path)
    (tmp_path / "own" / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 2)
    (tmp_path / "own" / "pairs.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 2)
    (tmp_path / "runs" / "recipe" / "evals").mkdir(parents=True)
    for name in ("base", "mid"):
        run = tmp_path / "runs" / "recipe" / name
        shutil.copytree(checkpoint, run)
        files = manifest.content_files(run)
        digest = manifest.content_digest(files)
        whole = {
            "schema": 1,
            "run": name,
            "stage": name,
            "fingerprint": "print",
            "recipe": {},
            "parents": [],
            "data": None,
        }
        whole |= {"metrics": {}, "versions": {}, "seconds": 1.0}
        manifest.write_json(run / "manifest.json", whole | {"files": files, "digest": digest})
        (run / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        metrics = {"think_greedy": {"value": 0.5, "stderr": 0.1, "num": 4}}
        about = {"run": name, "stage": name, "checkpoint_digest": digest, "metrics": metrics, "samples": []}
        manifest.write_json(run.parent / "evals" / f"{name}.json", about)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def snapshot(folder: Path) -> dict[str, Any]:
    """Every name under a folder, its kind, size and content; a pipe is not opened."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        regular = stat.S_ISREG(about.st_mode)
        content = path.read_bytes() if regular else os.readlink(path) if path.is_symlink() else None
        found[str(path)] = (stat.S_IFMT(about.st_mode), about.st_size if regular else 0, content)
    return found


def call(line: str) -> int:
    """What a command exits with, in this process; `launch STAGE` is the door of accelerate."""
    command, *rest = shlex.split(line)
    try:
        if command == "launch":
            return runner.stage_command(rest[0], rest[1:], program="stage", separate=False)
        return __main__.dispatch(command, rest)
    except SystemExit as end:
        return int(end.code or 0)


# How bad input is made; all count from the folder that holds recipe, own, parent and runs.


def write(name: str, content: str | bytes) -> Make:
    return lambda at: (at / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, **changes: Any) -> Make:
    """Keys of a YAML or JSON file set: `sources__0__mode=...`."""

    def made(at: Path) -> None:
        text = (at / name).read_text()
        tree = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        for key, value in changes.items():
            loading.apply_override(tree, key.split("__"), value)
        (at / name).write_text(json.dumps(tree) if name.endswith(".json") else yaml.safe_dump(tree))

    return made


def swap(name: str, old: str, new: str) -> Make:
    def made(at: Path) -> None:
        text = (at / name).read_text()
        assert old in text
        (at / name).write_text(text.replace(old, new, 1))

    return made


def drop(name: str, *keys: str) -> Make:
    """Keys of a JSON file taken away, or the file."""

    def made(at: Path) -> None:
        if not keys:
            return (at / name).unlink()
        tree = json.loads((at / name).read_text())
        manifest.write_json(at / name, {key: tree[key] for key in tree if key not in keys})

    return made


def cut(name: str, size: int) -> Make:
    return lambda at: os.truncate(at / name, size)


def pipe(name: str) -> Make:
    return lambda at: ((at / name).unlink(missing_ok=True), os.mkfifo(at / name))


def circle(name: str) -> Make:
    return lambda at: ((at / name).unlink(missing_ok=True), (at / name).symlink_to(at / name))


def folder(name: str) -> Make:
    return lambda at: ((at / name).unlink(missing_ok=True), (at / name).mkdir())


def both(*makes: Make) -> Make:
    return lambda at: [make(at) for make in makes]


def nothing(at: Path) -> None:
    pass


def row(content: Any) -> Make:
    """A third row of own/rows.jsonl: a line, or what becomes one."""
    line = content if isinstance(content, str | bytes) else json.dumps(content)
    return lambda at: (at / "own" / "rows.jsonl").write_bytes(
        f"{json.dumps(ROW)}\n".encode() * 2 + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )


def pair(**changes: Any) -> Make:
    return write("own/pairs.jsonl", f"{json.dumps(PAIR)}\n{json.dumps(PAIR | changes)}\n")


def source(name: str, make: Make, **keys: Any) -> Make:
    """The rows of own/sft.yaml from another file."""
    return both(edit("own/sft.yaml", sources=[{"name": "chats", "path": name, **keys}]), make)


def answer(**changes: Any) -> dict[str, Any]:
    return ROW | {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "5"} | changes]}


def parquet(name: str, table: dict[str, Any]) -> Make:
    def made(at: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(table), at / name)

    return made


def saved(name: str, table: dict[str, Any]) -> Make:
    def made(at: Path) -> None:
        import datasets

        datasets.Dataset.from_dict(table).save_to_disk(at / name)

    return made


def weights(change: Callable[[dict[str, Any]], Any]) -> Make:
    """The tensors of parent/ changed in place."""

    def made(at: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(at / "parent" / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "parent" / "model.safetensors", metadata={"format": "pt"})

    return made


def template(text: str | bytes) -> Make:
    return both(edit("own/sft.yaml", chat_template="mine.jinja"), write("own/mine.jinja", text))


def unfinished(**state: Any) -> Make:
    """A run directory of own's sft under way, its state.json as given."""

    def made(at: Path) -> None:
        (at / "runs/own/sft/checkpoints/checkpoint-1").mkdir(parents=True)
        whole = {"fingerprint": "other", "recipe": {}, "parents": []} | state
        text = json.dumps({key: value for key, value in whole.items() if value != "gone"})
        (at / "runs/own/sft/state.json").write_text(text)

    return made


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
SFT, CHECK, MODE = "recipe/sft.yaml", "check recipe/sft.yaml", "check recipe"
INSPECT, PAIRS = "inspect own/sft.yaml --rows 1", "inspect own/apo.yaml --rows 1"
SUITE = "recipe/evals.yaml"
TALK = "chat parent --tools t.json"
EVAL = "eval parent --suite own/evals.yaml"
SECRET = "!!python/object/apply:os.system [touch hacked]"
BASE, RUNS = "runs/recipe/base", "runs/recipe"


def generated(**keys: Any) -> Make:
    """own/traces.yaml, with other keys; one that is None is left out."""
    teacher = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    tree = {
        "stage": "traces",
        "sources": [{"name": "chats", "path": "rows.jsonl"}],
        "teacher": teacher,
    } | keys
    kept = {key: one for key, one in tree.items() if one is not None}
    return write("own/traces.yaml", yaml.safe_dump(kept))


SERVED = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
TRACES, MAKE = "check own/traces.yaml", "generate traces own/traces.yaml"
GENERATORS: dict[str, tuple[Make, str, str]] = {
    "no teacher": (generated(teacher=None), TRACES, "teacher: this key is missing; add it"),
    "a teacher that is nobody": (generated(teacher={}), TRACES, "give exactly one of 'base_url'"),
    "a teacher that is two": (generated(teacher=SERVED | {"checkpoint": "../a"}), TRACES, "give exactly"),
    "a server without a model": (
        generated(teacher={"base_url": "http://a/v1"}), TRACES, "give both 'base_url' and 'model'"
    ),
    "a server at no address": (
        generated(teacher=SERVED | {"base_url": "localhost:8000"}), TRACES, "wanted an address such as http://"
    ),
    "a server of nobody": (generated(teacher=SERVED | {"concurrency": 0}), TRACES, "concurrency: found 0"),
    "a key in the recipe": (
        generated(teacher=SERVED | {"api_key": "abc"}), TRACES, "a recipe holds no secrets"
    ),
    "a key for its variable": (
        generated(teacher=SERVED | {"api_key_env": "sk-" + "a" * 30}), TRACES, "a recipe holds no secrets"
    ),
    "a variable that is not set": (
        generated(teacher=SERVED | {"api_key_env": "NOBODYS_KEY"}), MAKE, "the environment has no NOBODYS_KEY"
    ),
    "a body that sets the model": (
        generated(teacher=SERVED | {"extra_body": {"model": "n"}}), TRACES, "'model' is set by the recipe"
    ),
    "a batch for a server": (
        generated(teacher=SERVED | {"batch_size": 4}), TRACES, "'batch_size' goes with 'checkpoint' only"
    ),
    "samples that are alike": (
        generated(teacher=SERVED | {"temperature": 0.0}, num_samples=2), TRACES, "all samples would be alike"
    ),
    "a mode twice": (generated(modes=["think", "think"]), TRACES, "modes: 'think' is given twice"),
    "a check of no source": (
        generated(checks={"chat": {"kind": "numeric", "column": "answer"}}), TRACES, "did you mean 'chats'?"
    ),
    "a check of no column": (
        generated(checks={"chats": {"kind": "numeric", "column": "answer"}}), MAKE, "wanted 'answer'"
    ),
    "a source to train on": (
        generated(sources=[{"name": "chats", "path": "rows.jsonl", "repeat": 2}]), TRACES, "is for training"
    ),
    "a checkpoint that is not there": (
        generated(teacher={"checkpoint": "../sft"}), MAKE, "parent ../sft is not whole"
    ),
    "a recipe of another kind": (generated(), "generate pairs own/traces.yaml", "found traces, wanted pairs"),
    "a kind that is none": (generated(), "generate trace own/traces.yaml", "did you mean 'traces'?"),
    "a generation of rows that ask nothing": (
        both(generated(), row({"messages": [{"role": "system", "content": "Hi"}]})), MAKE, "row 3: no prompt"
    ),
}  # fmt: skip

RECIPES: dict[str, tuple[Make, str, str]] = {
    "no file": (nothing, "check recipe/none.yaml", "recipe/none.yaml: no such file; give a recipe file"),
    "an empty file": (write(SFT, ""), CHECK, "found NoneType, wanted a mapping"),
    "comments only": (write(SFT, "# nothing\n"), CHECK, "found NoneType, wanted a mapping"),
    "a list": (write(SFT, "- stage: sft\n"), CHECK, "found list, wanted a mapping"),
    "a folder": (folder(SFT), "check recipe", "recipe/sft.yaml: is no file that can be read whole"),
    "a pipe": (pipe(SFT), CHECK, "is no file that can be read whole (a folder, pipe or device)"),
    "a device": (nothing, "check /dev/zero", "/dev/zero: is no file that can be read whole"),
    "a circle of links": (circle(SFT), CHECK, "recipe/sft.yaml: no such file"),
    "a name too long": (nothing, f"check {'a' * 300}.yaml", "found a name of over 255 bytes"),
    "an unknown key": (edit(SFT, max_token=5), CHECK, "max_token: unknown key; did you mean 'max_tokens'?"),
    "an unknown stage": (edit(SFT, stage="sftt"), CHECK, 'found "sftt" (str), wanted the stage'),
    "no stage": (edit(SFT, stage=None), CHECK, "stage: found null"),
    "a missing key": (swap(SFT, "max_tokens: 512\n", ""), CHECK, "max_tokens: this key is missing; add it"),
    "text for a number": (edit(SFT, max_tokens="many"), CHECK, 'max_tokens: found "many" (str), wanted a'),
    "true for a number": (edit(SFT, num_steps=True), CHECK, "num_steps: found true (bool), wanted"),
    "a number as text": (
        swap("recipe/long_context_1.yaml", "1500000.0", "1e-6"),
        "check recipe",
        "write 1.0e-06",
    ),
    "a negative number": (edit(SFT, num_steps=-1), CHECK, "num_steps: found -1 (int), wanted greater than 0"),
    "a zero": (edit(SFT, max_tokens=0), CHECK, "max_tokens: found 0 (int), wanted greater than 1"),
    "NaN": (
        edit(SFT, num_epochs=float("nan"), num_steps=None),
        CHECK,
        "the number .nan is not finite",
    ),
    "infinity": (
        edit("recipe/long_context_1.yaml", rope_theta=float("inf")),
        "check recipe",
        "the number .inf is not finite",
    ),
    "NaN for the trainer": (
        edit(SFT, trainer__learning_rate=float("nan")),
        CHECK,
        "the number .nan is not finite",
    ),
    "infinity for the trainer": (
        edit(SFT, trainer__lr_scheduler_kwargs={"min_lr": float("inf")}),
        CHECK,
        "the number .inf is not finite",
    ),
    "a NaN gate": (edit(SFT, gates={"x": {"min": float("nan")}}), CHECK, "the number .nan is not finite"),
    "a negative learning rate": (
        edit(SFT, trainer__learning_rate=-1.0),
        CHECK,
        "trainer.learning_rate: found -1.0 (float), wanted no negative number",
    ),
    "a huge seed": (edit(SFT, seed=2**40), CHECK, "seed: found 1099511627776 (int), wanted less than"),
    "a negative seed": (edit(SFT, seed=-1), CHECK, "seed: found -1 (int), wanted greater than or equal to 0"),
    "a million threads": (edit(SFT, num_threads=10**6), CHECK, "num_threads: found 1000000 (int)"),
    "a number of 100 bits": (edit(SFT, num_steps=2**100), CHECK, "has more than 63 bits"),
    "a number of 5,000 digits": (write(SFT, "seed: " + "9" * 5000), CHECK, "not readable as YAML"),
    "steps and epochs": (edit(SFT, num_epochs=1.0), CHECK, "give exactly one of 'num_steps' and 'num_epochs"),
    "an indivisible batch": (edit(SFT, micro_batch_size=3), CHECK, "does not divide by micro_batch_size 3"),
    "a trainer key unknown": (
        edit(SFT, trainer__learning_rat=1.0), CHECK, "TRL has no such field; did you mean 'learning_rate'?"
    ),
    "a trainer key owned": (edit(SFT, trainer__max_length=5), CHECK, "the recipe owns this; set max_tokens"),
    "a trainer key ignored": (edit(SFT, trainer__hub_token="x"), CHECK, "hub_token: a recipe holds no"),
    "a key twice": (swap(SFT, "stage: sft", "stage: sft\nstage: sft"), CHECK, "the key 'stage' is given twi"),
    "a nested key twice": (
        swap(SFT, "logging_steps: 2", "logging_steps: 2, logging_steps: 3"), CHECK, "'logging_steps' is given"
    ),
    "a tab": (swap(SFT, "max_tokens: 512", "max_tokens:\n\t512"), CHECK, "line 3: found character"),
    "an alias bomb": (write(SFT, BOMB), CHECK, "its aliases unfold to over 150,000 characters"),
    "a bomb of merge keys": (
        write(SFT, "a0: &a0 {x: 1}\n" + "".join(
            f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
        )), CHECK, "its aliases unfold to over 150,000 characters"
    ),
    "an alias within itself": (write(SFT, "stage: sft\nsources: &a [*a]\n"), CHECK, "its aliases unfold"),
    "a chain of aliases": (
        write(SFT, "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))),
        CHECK, "its aliases unfold to very deep nesting",
    ),
    "an alias of nothing": (write(SFT, "stage: *a\n"), CHECK, "line 1: found undefined alias"),
    "very deep nesting": (write(SFT, "a: " + "[" * 50_000), CHECK, "nested too deeply"),
    "deep nesting that is none": (
        write(SFT, "stage: sft\nmax_tokens: " + "[" * 40 + "]" * 40), CHECK, "max_tokens: found [[[[["
    ),
    "a megabyte": (write(SFT, "stage: sft\n" + "# x\n" * 300_000), CHECK, "wanted at most 150,000"),
    "a Python object": (write(SFT, f"stage: {SECRET}\n"), CHECK, "could not determine a constructor"),
    "a tag that lies": (write(SFT, "stage: !!bool sft\n"), CHECK, "a value that is none"),
    "a date of no calendar": (write(SFT, "stage: 2025-13-45\n"), CHECK, "month must be in 1..12"),
    "two documents": (swap(SFT, "stage: sft", "stage: sft\n---\nseed: 1"), CHECK, "but found another docume"),
    "bytes": (write(SFT, bytes(range(256))), CHECK, "not readable as YAML"),
    "NUL": (write(SFT, "stage: s\0ft\n"), CHECK, "not readable as YAML"),
    "NUL by escape": (write(SFT, 'stage: "s\\0ft"\n'), CHECK, "holds NUL or half a character"),
    "half a character": (write(SFT, 'stage: "\\ud83d"\n'), CHECK, "holds NUL or half a character"),
    "invalid UTF-8": (write(SFT, b"stage: sf\xff\n"), CHECK, "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": (write(SFT, "stage: sft\n".encode("utf-16")), CHECK, "'utf-8' codec can't decode byte"),
    "a whole number as key": (edit(SFT, trainer={1: 2}), CHECK, "the key 1 is no text; quote it"),
    "a bare on as key": (swap(SFT, "stage: sft", "stage: sft\non: 1"), CHECK, "the key True is no text"),
    "a date for text": (
        swap(SFT, "stage: sft", "stage: sft\ndate_string: 2025-07-01"), CHECK, "as something else, quote it"
    ),
    "a bare no for a mode": (
        edit(SFT, sources__0__mode=False), CHECK, "sources.0.mode: found false (bool), wanted 'think' or 'no_"
    ),
    "a bare yes for a choice": (edit(SFT, on_bad_rows=True), CHECK, "on_bad_rows: found true (bool), wanted"),
    "an empty path": (edit("own/sft.yaml", sources__0__path=""), "check own/sft.yaml", "wanted a path"),
    "a path too long": (edit("own/sft.yaml", sources__0__path="a" * 300), "check own", "over 255 bytes"),
    "a line end in a key": (write(SFT, '"a\\nb": 1\nstage: sft\n'), CHECK, "a\\nb: unknown key"),
    "an override without a value": (nothing, "sft recipe/sft.yaml num_steps", "wanted key=value"),
    "an override without a key": (nothing, "sft recipe/sft.yaml =5", "wanted key=value"),
    "an override that is no YAML": (nothing, "sft recipe/sft.yaml num_steps=[1", "the value is not YAML"),
    "an override of 2,000 brackets": (nothing, f"sft {SFT} num_steps={'[' * 2000}", "nested too deeply"),
    "an override twice within": (nothing, f"sft {SFT} 'trainer={{a: 1, a: 2}}'", "'a' is given twice"),
    "an override into a number": (nothing, f"sft {SFT} max_tokens.a=5", "'max_tokens' has no keys of its ow"),
    "an override past a list": (nothing, f"sft {SFT} sources.{'9' * 5000}.seed=1", "wanted a number under 1"),
    "an override by a superscript": (nothing, f"sft {SFT} sources.\u00b2.seed=1", "wanted a number under 1"),
    "a long override of nothing": (nothing, f"sft {SFT} stag={'x' * 5000}", "stag: unknown key"),
    "a template that is not there": (
        edit(SFT, chat_template="none.jinja"), CHECK, "sft.yaml: chat_template: no chat template 'none.jinja'"
    ),
    "a template that is a folder": (
        both(folder("recipe/mine.jinja"), edit(SFT, chat_template="mine.jinja")), CHECK, "no chat template"
    ),
    "a template in a circle": (
        both(circle("recipe/mine.jinja"), edit(SFT, chat_template="mine.jinja")), CHECK, "no chat template"
    ),
    "a template of bytes": (
        both(write("recipe/m.jinja", b"\xff\xfe"), edit(SFT, chat_template="m.jinja")), CHECK, "no UTF-8"
    ),
    "a home of nobody": (edit(SFT, chat_template="~nobody-here/m.jinja"), CHECK, "no chat template"),
    "an option that is none": (edit(SFT, sources__0__options={"think_share": 2}), CHECK, "a share, from 0 t"),
    "evals without their file": (
        edit("recipe/evals.yaml", turn_prompts="none.jsonl", num_turn_questions=1), MODE, "none.jsonl: no suc"
    ),
    "tool calls of a path and a generator": (
        edit(SUITE, tool_calls=[{"name": "x", "path": "x.jsonl", "generator": "needles"}]), MODE,
        "tool_calls 'x': give exactly one of 'path' and 'generator'",
    ),
    "tool calls without a number": (
        edit(SUITE, tool_calls=[{"name": "x", "generator": "needles"}]), MODE, "needs 'num_questio"
    ),
    "tool calls of no generator": (
        edit(SUITE, tool_calls=[{"name": "x", "generator": "nedles", "num_questions": 1}]), MODE,
        "unknown generator 'nedles'",
    ),
    "tool calls without their file": (
        edit(SUITE, tool_calls=[{"name": "x", "path": "none.jsonl"}]), MODE, "none.jsonl: no such"
    ),
    "tool calls of texts": (
        edit("own/evals.yaml", tool_calls=[{"name": "x", "generator": "needles", "num_questions": 1}]),
        EVAL,
        "row 1: no messages",
    ),
    "evals that read a pipe": (
        both(pipe("recipe/p.txt"), edit("recipe/evals.yaml", perplexity=[
            {"name": "a", "path": "./p.txt", "max_tokens": 8}])), MODE, "p.txt: no such file beside the recip"
    ),
}  # fmt: skip

PIPE = "recipe/pipeline.yaml"
PIPELINES: dict[str, tuple[Make, str, str]] = {
    "no pipeline": (drop(PIPE), MODE, "pipeline.yaml: no such file; a recipe folder lists its runs there"),
    "a pipeline that is a pipe": (pipe(PIPE), MODE, "pipeline.yaml: no such file"),
    "no runs": (edit(PIPE, runs=[]), MODE, "runs: found [] (list), wanted"),
    "a cycle": (edit(PIPE, runs__2__parents=["../sft"]), MODE, "'../sft', which is no earlier run"),
    "a run that is its own parent": (edit(PIPE, runs__2__parents=["../mid"]), MODE, "which is no earlier ru"),
    "an unknown parent": (edit(PIPE, runs__3__parents=["../midd"]), MODE, "did you mean 'mid'?"),
    "a name twice": (edit(PIPE, runs__2__name="base"), MODE, "'base' is used twice or reserved"),
    "a name with a slash": (edit(PIPE, runs__2__name="a/b"), MODE, 'runs.2.name: found "a/b" (str)'),
    "a name that goes up": (edit(PIPE, runs__2__name=".."), MODE, 'runs.2.name: found ".." (str)'),
    "an absolute name": (edit(PIPE, runs__2__name="/tmp/x"), MODE, 'runs.2.name: found "/tmp/x" (str)'),
    "an empty name": (edit(PIPE, runs__2__name=""), MODE, 'runs.2.name: found "" (str)'),
    "a name with a line end": (edit(PIPE, runs__2__name="a\nb"), MODE, "runs.2.name: found"),
    "a name ending in a line end": (edit(PIPE, runs__2__name="a\n"), MODE, "runs.2.name: found"),
    "a long name": (edit(PIPE, runs__2__name="a" * 300), MODE, "runs.2.name: found"),
    "the name of the cache": (edit(PIPE, runs__2__name="cache"), MODE, "'cache' is used twice or reserved"),
    "the name of the evals": (edit(PIPE, runs__2__name="evals"), MODE, "'evals' is used twice or reserved"),
    "the name of a result": (edit(PIPE, runs__2__name="gates_sft"), MODE, "'gates_sft' is used twice or"),
    "the name of a soup": (edit(PIPE, runs__2__name="merge_soup"), MODE, "what the soup of 'merge' is calle"),
    "too few parents": (edit(PIPE, runs__3__parents=[]), MODE, "'sft' has 0 parents; stage sft wants 1"),
    "too many parents": (edit(PIPE, runs__3__parents=["../mid", "../base"]), MODE, "has 2 parents"),
    "a parent twice": (edit(PIPE, runs__6__parents=["../base", "../base"]), MODE, "names a parent twice"),
    "a parent that leaves its run": (
        edit(PIPE, runs__3__parents=["../mid/../../x"]), MODE, "which leaves its run; name a run"
    ),
    "an empty parent": (edit(PIPE, runs__3__parents=[""]), MODE, "runs.3.parents.0: found"),
    "an unknown stage of a run": (edit(PIPE, runs__3__stage="x"), MODE, 'runs.3.stage: found "x" (str)'),
    "stages that differ": (edit(PIPE, runs__3__recipe="mid.yaml"), MODE, "found 'mid', wanted 'sft' as run"),
    "a recipe that is not there": (edit(PIPE, runs__3__recipe="no.yaml"), MODE, "recipe/no.yaml: no such fi"),
    "a recipe that is a folder": (
        both(folder("recipe/d.yaml"), edit(PIPE, runs__3__recipe="d.yaml")), MODE, "d.yaml: is no file"
    ),
    "overrides of no key": (
        edit(PIPE, runs__3__overrides={"sede": 1}), MODE, "sede: unknown key; did you mean 'seed'?"
    ),
    "overrides into a number": (
        edit(PIPE, runs__3__overrides={"seed.x.y": 1, "max_tokens.a": 1}), MODE, "has no keys of its own"
    ),
    "evals of another stage": (edit(PIPE, evals="sft.yaml"), MODE, "stage: found sft, wanted evals"),
    "a wrong architecture": (
        both(edit(PIPE, architecture={"hidden_size": "x"}), edit(PIPE, runs=[
            {"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": ["org/name"]}])),
        "plan recipe", "hidden_size: found"
    ),
}  # fmt: skip

PLACES: dict[str, tuple[Make, str, str]] = {
    "a run root that is a file": (
        write("taken", "x"), "launch sft own/sft.yaml --run-dir taken", "taken/sft: cannot be made (Not a dir"
    ),
    "a run root under a device": (
        nothing, "launch sft own/sft.yaml --run-dir /dev/null/x", "/dev/null/x/sft: cannot be made"
    ),
    "a run root under /proc": (
        nothing, "launch sft own/sft.yaml --run-dir /proc/x", "/proc/x/sft: cannot be made"
    ),
    "a run root in a circle": (
        circle("taken"), "launch sft own/sft.yaml --run-dir taken", "taken/sft: cannot be made"
    ),
    "a run that is a file": (
        both(folder("taken"), write("taken/sft", "x")), "launch sft own/sft.yaml --run-dir taken", "cannot be"
    ),
    "a run of something else": (
        both(folder("taken"), folder("taken/sft"), write("taken/sft/thesis.tex", "x")),
        "launch sft own/sft.yaml --run-dir taken", "exists and is no run of ours",
    ),
    "a cache under a file": (write("taken", "x"), f"{INSPECT} --run-dir taken", "cannot be written (Not a d"),
    "a cache under /proc": (nothing, f"{INSPECT} --run-dir /proc/x", "cannot be written ("),
    "a cache in a circle": (circle("taken"), f"{INSPECT} --run-dir taken", "cannot be written ("),
    "a report of a file": (write("taken", "x"), "report recipe --run-dir taken", "no whole run"),
    "a report of a circle": (circle("taken"), "report recipe --run-dir taken", "no whole run"),
    "evals of a circle": (circle("taken"), "evals recipe --run-dir taken", "no run of recipe is whole yet"),
    "a page under a file": (
        write("taken", "x"), f"{INSPECT} --run-dir cached --html taken/page.html", "--html taken/page.html: "
    ),
    "an export into a file": (write("out", "x"), "export parent out --context 512", "exists and is no empty"),
    "an export into a circle": (circle("out"), "export parent out --context 512", "out: cannot be written"),
    "an export under a device": (nothing, "export parent /dev/null/x --context 512", "cannot be written"),
    "an export into itself": (nothing, "export parent parent/out --context 512", "lies inside parent"),
}  # fmt: skip

BAD_CALL = {"role": "assistant", "tool_calls": "calc"}
ROWS: dict[str, tuple[Make, str, str]] = {
    "no rows": (write("own/rows.jsonl", ""), INSPECT, "no rows to train on (it is empty)"),
    "blank lines": (write("own/rows.jsonl", "\n \n"), INSPECT, "no rows to train on"),
    "no such file of rows": (drop("own/rows.jsonl"), INSPECT, "rows.jsonl does not exist; paths count from"),
    "rows that are a folder": (folder("own/rows.jsonl"), INSPECT, "source 'chats': "),
    "rows that are a pipe": (pipe("own/rows.jsonl"), INSPECT, "rows.jsonl: is a pipe or device, wanted a fi"),
    "rows in a circle": (circle("own/rows.jsonl"), INSPECT, "rows.jsonl does not exist"),
    "rows of nobody's home": (source("~nobody-x/r.jsonl", nothing), INSPECT, "does not exist"),
    "rows that a run cannot find": (
        drop("own/rows.jsonl"), "launch sft own/sft.yaml", "sources: 'chats': "
    ),
    "rows of a run that are a pipe": (
        pipe("own/rows.jsonl"), "launch sft own/sft.yaml", "rows.jsonl: is no file that can be read whole"
    ),
    "a line that is no JSON": (row("{'messages': 1}"), INSPECT, "row 3: not JSON (Expecting property name"),
    "a line that is a list": (row([1]), INSPECT, "row 3: found list, wanted an object"),
    "a line of invalid UTF-8": (row(b'{"text": "\xff"}'), INSPECT, "row 3: "),
    "a line nested deeply": (row("[" * 100_000), INSPECT, "row 3: nested too deeply"),
    "a line of NUL": (row(b"\0\0\0"), INSPECT, "row 3: not JSON"),
    "a number of many digits": (row('{"x": ' + "9" * 5000 + "}"), INSPECT, "row 3: "),
    "a huge row": (row(answer(content="a" * 11_000_000)), INSPECT, "wanted at most 10,000,000 (max_row"),
    "text that is a number": (row({"text": 5}), INSPECT, "row 3: text: found int, wanted text"),
    "no column that we read": (row({"txt": "a"}), INSPECT, "row 3: found columns txt, wanted text"),
    "no messages": (row(ROW | {"messages": []}), INSPECT, "row 3: messages: found []"),
    "messages that are text": (row(ROW | {"messages": "hi"}), INSPECT, "wanted a list of messages, found 'h"),
    "a message that is text": (row(ROW | {"messages": ["hi"]}), INSPECT, "messages[0]: wanted a message"),
    "a message without a role": (
        row(ROW | {"messages": [{"content": "a"}]}), INSPECT, "messages[0]: no role, only content"
    ),
    "a role that is a number": (
        row(ROW | {"messages": [{"role": 1, "content": "a"}]}), INSPECT, "role: wanted text, found 1"
    ),
    "an unknown role": (row(answer(role="oracle")), INSPECT, "row 3: "),
    "content that is null": (row(answer(content=None)), INSPECT, "neither content nor tool calls"),
    "content that is NaN": (row(answer(content=float("nan"))), INSPECT, "wanted text as content, found nan"),
    "content in parts": (row(answer(content=[{"type": "text"}])), INSPECT, "wanted text as content, found ["),
    "half a surrogate pair": (row(answer(content="\ud83d")), INSPECT, "row 3: messages[1] (assistant): half"),
    "a control token in a text": (row(answer(content="<|im_end|>")), INSPECT, "holds the control token"),
    "no assistant turn": (row(ROW | {"messages": CHAT["messages"][:1]}), INSPECT, "no assistant turn to tra"),
    "no mode said": (row(CHAT), INSPECT, "row 3: the row has no mode: give the row enable_thinking"),
    "a mode that is text": (row(ROW | {"enable_thinking": "no"}), INSPECT, "wanted true or false, found 'no"),
    "two modes": (
        row(ROW | {"messages": [{"role": "system", "content": "/think /no_think"}, *CHAT["messages"]]}),
        INSPECT, "both /think and /no_think; keep one",
    ),
    "a kwarg unknown": (row(CHAT | {"chat_template_kwargs": {"enable_thinkin": True}}), INSPECT, "did you m"),
    "kwargs that are a list": (row(CHAT | {"chat_template_kwargs": [1]}), INSPECT, "wanted an object"),
    "kwargs that are no JSON": (row(CHAT | {"chat_template_kwargs": "{"}), INSPECT, "not JSON"),
    "tool calls that are text": (row(answer(tool_calls="calc")), INSPECT, "tool_calls: wanted a list of obj"),
    "a tool call without a name": (row(answer(tool_calls=[{"arguments": {}}])), INSPECT, "has no name, only"),
    "arguments that are no JSON": (
        row(answer(tool_calls=[{"name": "f", "arguments": "{x"}])), INSPECT, "arguments: not JSON"
    ),
    "arguments that are a list": (
        row(answer(tool_calls=[{"name": "f", "arguments": [1]}])), INSPECT, "wanted an object or JSON text"
    ),
    "arguments with NaN": (
        row(answer(tool_calls=[{"name": "f", "arguments": {"x": float("nan")}}])), INSPECT, "not JSON (Out of"
    ),
    "tools that are a number": (row(ROW | {"xml_tools": 5}), INSPECT, "xml_tools: wanted JSON objects, foun"),
    "tools nested deeply": (row(ROW | {"tools": "[" * 100_000}), INSPECT, "row 3: nested too deeply"),
    "an empty JSON list": (source("r.json", write("own/r.json", "[]")), INSPECT, "no rows to train on"),
    "a JSON object for a list": (
        source("r.json", write("own/r.json", "{}")), INSPECT, "r.json: found dict, wanted a list of rows"
    ),
    "half a JSON list": (source("r.json", write("own/r.json", "[{")), INSPECT, "r.json: not JSON"),
    "half a gzip": (
        source("r.jsonl.gz", write("own/r.jsonl.gz", gzip.compress(json.dumps(ROW).encode() * 99)[:-20])),
        INSPECT, "r.jsonl.gz: not readable (Compressed file ended",
    ),
    "a gzip that is none": (source("r.jsonl.gz", write("own/r.jsonl.gz", "plain")), INSPECT, "Not a gzipped"),
    "a zstd": (source("./r.jsonl.zst", write("own/r.jsonl.zst", "x")), INSPECT, "wanted .json, .json.gz, .j"),
    "half a parquet": (
        source("r.parquet", both(parquet("own/r.parquet", {"text": ["a"]}), cut("own/r.parquet", 90))),
        INSPECT, "source 'chats': r.parquet: could not be loaded",
    ),
    "a parquet of no bytes": (source("r.parquet", write("own/r.parquet", "")), INSPECT, "could not be loade"),
    "a parquet of other columns": (
        source("r.parquet", parquet("own/r.parquet", {"question": ["a"]})), INSPECT, "columns: found question"
    ),
    "a parquet without a named column": (
        source("r.parquet", parquet("own/r.parquet", {"text": ["a"]}), columns={"prompt": "q"}),
        INSPECT, "columns: found text, wanted 'q'",
    ),
    "a parquet without rows": (
        source("r.parquet", parquet("own/r.parquet", {"text": []})), INSPECT, "no rows to train on (it is emp"
    ),
    "an Arrow folder cut short": (
        source("./saved", both(saved("own/saved", {"text": ["a" * 999]}), lambda at: [
            os.truncate(one, 200) for one in (at / "own/saved").glob("*.arrow")])),
        INSPECT, "source 'chats': ./saved: could not be loaded",
    ),
    "an Arrow folder without its state": (
        source("./saved", both(saved("own/saved", {"text": ["a"]}), drop("own/saved/state.json"))),
        INSPECT, "source 'chats': ./saved: could not be loaded",
    ),
    "a folder that is no data set": (source("./d", folder("own/d")), INSPECT, "could not be loaded"),
    "columns that are missing": (
        edit("own/sft.yaml", sources__0__columns={"prompt": "question"}), INSPECT, "wanted 'question'"
    ),
    "equal answers": (pair(rejected="5"), PAIRS, "row 2: chosen and rejected are equal"),
    "prompts that differ": (
        pair(chosen=[{"role": "user", "content": "4?"}, *CHAT["messages"][1:]],
             rejected=[{"role": "user", "content": "4?"}, {"role": "assistant", "content": "6"}]),
        PAIRS, "row 2: chosen and rejected hold the whole conversation, but another one than prompt",
    ),
    "no prompt": (pair(prompt=None), PAIRS, "row 2: no prompt: give the column prompt"),
    "no answer": (pair(rejected=None), PAIRS, "row 2: rejected: wanted one assistant turn"),
    "an answer that is a number": (pair(chosen=5), PAIRS, "row 2: chosen: wanted a list of messages, found"),
    "pairs without a mode": (pair(enable_thinking=None), PAIRS, "row 2: the row has no mode"),
    "text for pairs": (
        edit("own/apo.yaml", sources__0__path="rows.jsonl"), PAIRS, "row 1: no prompt: give the column"
    ),
}  # fmt: skip

TEMPLATES: dict[str, tuple[Make, str, str]] = {
    "a template without spans": (
        template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"),
        INSPECT, "marks 0 of 1 assistant turns: wanted {% generation %} around each",
    ),
    "a template that does not parse": (template("{% for %}"), INSPECT, "the chat template refuses the row"),
    "a template that calls nothing": (template("{{ nowhere() }}"), INSPECT, "'nowhere' is undefined"),
    "a template that raises": (template("{{ raise_exception('no') }}"), INSPECT, "refuses the row: no; mend"),
    "a template that divides by zero": (template("{{ 1 / 0 }}"), INSPECT, "division by zero"),
    "a template that counts far": (
        template("{% for i in range(10**12) %}x{% endfor %}"), INSPECT, "the chat template refuses the row"
    ),
    "a template within itself": (
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), INSPECT, "chat_template mine.jinja"
    ),
    "a template that reaches out": (
        template("{{ messages.__class__.__mro__ }}"), INSPECT, "chat_template mine.jinja: it cannot write"
    ),
    "a template of nothing": (template(" "), INSPECT, "chat_template mine.jinja: it cannot write"),
    "spans that cover nothing": (
        template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
            "{% generation %}{% endgeneration %}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        INSPECT, "chat_template mine.jinja: it cannot write a chat of two turns",
    ),
    "a template with tokens that nobody has": (template("<|strange|>"), INSPECT, "the vocabulary lacks <|st"),
}  # fmt: skip
CONFIG, SAFE = "parent/config.json", "parent/model.safetensors"
INDEX = "parent/model.safetensors.index.json"


def indexed(**places: str) -> Make:
    tree = {"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"} | places}
    return both(write(INDEX, json.dumps(tree)), lambda at: (at / SAFE).rename(at / "parent/a.safetensors"))


CHECKPOINTS: dict[str, tuple[Make, str, str]] = {
    "a parent without config.json": (drop(CONFIG), "launch sft own/sft.yaml", "has no config.json, so it is"),
    "a parent that is not there": (
        lambda at: shutil.rmtree(at / "parent"), "launch sft own/sft.yaml", "has no config.json"
    ),
    "a parent without a tokenizer.json": (drop("parent/tokenizer.json"), INSPECT, "no loadable tokenizer"),
    "a tokenizer that is no JSON": (write("parent/tokenizer.json", "{"), INSPECT, "not readable as JSON"),
    "a tokenizer of nothing": (write("parent/tokenizer.json", "{}"), INSPECT, "parent: no loadable tokenize"),
    "a tokenizer that is a list": (write("parent/tokenizer.json", "[]"), INSPECT, "found list, wanted an ob"),
    "a tokenizer whose model is none": (
        edit("parent/tokenizer.json", model={"type": "BPE"}), INSPECT, "parent: no loadable tokenizer"
    ),
    "a tokenizer without the template's tokens": (
        both(swap("parent/tokenizer.json", '"<think>"', '"<hink>"')), INSPECT, "the vocabulary lacks <think>"
    ),
    "a tokenizer with more tokens than rows": (
        edit(CONFIG, vocab_size=300), INSPECT, "wanted ids below the vocab_size 300 of config.json"
    ),
    "settings of a tokenizer that are a list": (
        write("parent/tokenizer_config.json", "[]"), INSPECT, "found list, wanted an object"
    ),
    "config.json of a parent without JSON": (write(CONFIG, "{"), EVAL, "parent/config.json: not readable as"),
    "config.json that is a list": (write(CONFIG, "[]"), EVAL, "parent/config.json: found list, wanted an ob"),
    "config.json of nothing": (write(CONFIG, "{}"), EVAL, "parent/config.json: not a model configuration"),
    "an unknown model": (edit(CONFIG, model_type="gpt9"), EVAL, "parent/config.json: not a model configurat"),
    "code of its own": (
        edit(CONFIG, model_type="mine", auto_map={"AutoConfig": "mine.Mine"}), EVAL, "auto_map names code"
    ),
    "sizes that are text": (edit(CONFIG, hidden_size="many"), EVAL, "parent/config.json: hidden_size: found"),
    "another hidden size": (edit(CONFIG, hidden_size=32), EVAL, "parent: weights do not fit config.json"),
    "more layers": (
        edit(CONFIG, num_hidden_layers=2, layer_types=None, no_rope_layers=None), EVAL, "weights do not fit"
    ),
    "more layers than kinds of layers": (
        edit(CONFIG, num_hidden_layers=9), EVAL, "parent/config.json: not a model configuration"
    ),
    "a model of no heads": (edit(CONFIG, num_attention_heads=0), EVAL, "parent/config.json: "),
    "a model of negative size": (edit(CONFIG, intermediate_size=-1), EVAL, "parent/config.json: "),
    "a model of negative depth": (edit(CONFIG, num_hidden_layers=-1), EVAL, "parent/config.json: "),
    "a model of no tokens": (edit(CONFIG, vocab_size=0), EVAL, "vocab_size: found 0 (int), wanted a whole"),
    "fewer rows of the vocabulary": (
        lambda at: edit(CONFIG, vocab_size=json.loads((at / CONFIG).read_text())["vocab_size"] + 64)(at),
        EVAL, "weights do not fit config.json",
    ),
    "no weights": (drop(SAFE), EVAL, "parent: found no .safetensors"),
    "weights that are a pickle": (
        lambda at: (at / SAFE).rename(at / "parent" / "pytorch_model.bin"), EVAL, "found pickled weights"
    ),
    "weights of zero bytes": (cut(SAFE, 0), EVAL, "parent: no loadable weights"),
    "weights cut short": (cut(SAFE, 2000), EVAL, "parent: no loadable weights"),
    "weights of text": (write(SAFE, "x" * 5000), EVAL, "parent: no loadable weights"),
    "a weight that is NaN": (
        weights(lambda all: all["model.norm.weight"].__setitem__(3, float("nan"))), EVAL,
        "model.norm.weight: found 1 of 16 values that are NaN or infinite",
    ),
    "a weight that is infinite": (
        weights(lambda all: all["model.embed_tokens.weight"].__setitem__((5, 2), float("inf"))), EVAL,
        "model.embed_tokens.weight: found 1 of",
    ),
    "a tensor too few": (weights(lambda all: all.pop("model.norm.weight")), EVAL, "(model.norm.weight, 1 in"),
    "a tensor too many": (
        weights(lambda all: all.update(extra=all["model.norm.weight"].clone())), EVAL, "(extra, 1 in all)"
    ),
    "an index without JSON": (both(drop(SAFE), write(INDEX, "{")), EVAL, "index.json: not readable as JSON"),
    "an index without a map": (both(drop(SAFE), write(INDEX, "{}")), EVAL, "index.json: weight_map: found n"),
    "an index that lacks a shard": (indexed(x="b.safetensors"), EVAL, "found 'b.safetensors', wanted a file"),
    "an index that points outside": (indexed(x="../own/rows.jsonl"), EVAL, "names '../own/rows.jsonl', want"),
    "an export without weights": (drop(SAFE), "export parent out --context 512", "found no .safetensors"),
    "an export of half the weights": (cut(SAFE, 999), "export parent out --context 512", "no loadable weigh"),
    "an export of an index of nothing": (
        write(INDEX, "{}"), "export parent out --context 512", "weight_map: found null"
    ),
    "an export of no context": (edit(CONFIG, max_position_embeddings="x"), "export parent out --context 512",
                                "found no rope_parameters.rope_theta with max_position"),
    "an export of RoPE that is a list": (
        edit(CONFIG, rope_parameters=[1]), "export parent out --context 512", "rope_parameters"
    ),
    "a plan of a parent without sizes": (
        both(edit(CONFIG, hidden_size="many")), "plan own", "hidden_size: found \"many\" (str), wanted a whol"
    ),
    "a plan of a parent without JSON": (write(CONFIG, "{"), "plan own", "config.json: not readable as JSON"),
}  # fmt: skip

MANIFEST, STAGE = "runs/recipe/mid/manifest.json", "launch sft recipe/sft.yaml"
GATED = "runs/recipe/evals/gates_mid.json"
RESULT, REPORT = "runs/recipe/evals/mid.json", "report recipe"
OURS = "launch sft own/sft.yaml"


def gates(**keys: Any) -> Make:
    def made(at: Path) -> None:
        digest = json.loads((at / MANIFEST).read_text())["digest"]
        manifest.write_json(at / GATED, {"digest": digest} | keys)

    return made


RECORDS: dict[str, tuple[Make, str, str]] = {
    "a manifest that is no JSON": (write(MANIFEST, "{"), STAGE, "mid/manifest.json: not readable as JSON"),
    "a manifest that is a list": (write(MANIFEST, "[]"), STAGE, "mid/manifest.json: found list, wanted an o"),
    "a manifest of bytes": (write(MANIFEST, b"\xff"), STAGE, "mid/manifest.json: not readable as JSON"),
    "a manifest nested deeply": (write(MANIFEST, "[" * 100_000), STAGE, "not readable as JSON"),
    "a manifest of another schema": (edit(MANIFEST, schema=9), STAGE, "found schema 9, wanted 1; make the r"),
    "a manifest without its digest": (drop(MANIFEST, "digest"), STAGE, "manifest.json: digest: found null"),
    "a manifest without its stage": (drop(MANIFEST, "stage"), STAGE, "manifest.json: stage: found null"),
    "a manifest without its files": (drop(MANIFEST, "files"), STAGE, "manifest.json: files: found null"),
    "a manifest whose files are a list": (edit(MANIFEST, files=[]), STAGE, "files: found [] (list), wanted"),
    "a manifest whose digest is another": (edit(MANIFEST, digest="x"), STAGE, "digest: is not that of its f"),
    "weights that changed": (
        write("runs/recipe/mid/model.safetensors", "x"), STAGE, "has changed since the run ended; restore it"
    ),
    "a tokenizer that is gone": (
        drop("runs/recipe/mid/tokenizer.json"), STAGE, "tokenizer.json: is missing since the run ended"
    ),
    "a file that was added": (write("runs/recipe/mid/x.json", "{}"), STAGE, "x.json: was added since the ru"),
    "a run of another recipe": (
        nothing, "launch base recipe/base.yaml", "holds a whole run of something else"
    ),
    "a manifest of our own that is damaged": (
        drop("runs/recipe/base/manifest.json", "fingerprint"), "launch base recipe", "fingerprint: found null"
    ),
    "a gate that is no JSON": (write(GATED, "x"), STAGE, "gates_mid.json: not readable as JSON; remove it"),
    "a gate that is a list": (write(GATED, "[]"), STAGE, "gates_mid.json: found list, wanted an object"),
    "a gate without a verdict": (gates(short=[]), STAGE, "gates_mid.json: passed: found null"),
    "a gate without reasons": (gates(passed=False), STAGE, "gates_mid.json: short: found null"),
    "a gate that was failed": (gates(passed=False, short=["a is 0"]), STAGE, "falls short: a is 0; mend"),
    "a state that is no JSON": (
        both(unfinished(), write("runs/own/sft/state.json", "{")), OURS, "state.json: not readable as JSON"
    ),
    "a state that is a list": (
        both(unfinished(), write("runs/own/sft/state.json", "[]")), OURS, "state.json: found list, wanted an"
    ),
    "a state without its print": (unfinished(fingerprint="gone"), OURS, "state.json: fingerprint: found nul"),
    "a state without its recipe": (unfinished(recipe="gone"), OURS, "state.json: recipe: found null"),
    "a state with strange parents": (unfinished(parents=[1]), OURS, "state.json: parents.0: found 1 (int),"),
    "a state whose sources are numbers": (
        unfinished(recipe={"sources": [1]}), OURS, "holds an unfinished run of something else"
    ),
    "evals that are no JSON": (write(RESULT, "{"), REPORT, "evals/mid.json: not readable as JSON"),
    "evals that are a list": (write(RESULT, "[]"), REPORT, "evals/mid.json: found list, wanted an object"),
    "metrics that are a list": (edit(RESULT, metrics=[1]), REPORT, "metrics: found [1] (list), wanted an ob"),
    "a metric that is text": (edit(RESULT, metrics={"a": "x"}), REPORT, "metrics.a: found"),
    "samples that are text": (edit(RESULT, samples="x"), REPORT, "samples: found"),
    "a log that is no JSON": (write("runs/recipe/mid/train_log.jsonl", "{\n"), REPORT, "line 1: not JSON"),
    "a log that is a list": (write("runs/recipe/mid/train_log.jsonl", "[]"), REPORT, "wanted a JSON object"),
    "a loss without a step": (
        write("runs/recipe/mid/train_log.jsonl", '{"loss": 1}'), REPORT, "wanted a loss and its step"
    ),
    "a report of a damaged manifest": (write(MANIFEST, "[]"), REPORT, "found list, wanted an object"),
    "a report of a manifest without keys": (write(MANIFEST, '{"schema": 1}'), REPORT, "mid/manifest.json: "),
    "a report of strange parents": (edit(MANIFEST, parents=[1]), REPORT, "mid/manifest.json: parents"),
    "a report of strange data": (edit(MANIFEST, data=[1]), REPORT, "mid/manifest.json: data"),
    "a report of strange metrics": (edit(MANIFEST, metrics=[1]), REPORT, "mid/manifest.json: metrics"),
    "a report of strange proofs": (write("runs/recipe/mid/verify.json", "[]"), REPORT, "verify.json: found"),
    "a report of proofs without proofs": (
        write("runs/recipe/mid/verify.json", '{"proofs": 1}'), REPORT, "verify.json: proofs: found 1"
    ),
    "a comparison of a damaged run": (
        write(MANIFEST, "[]"), "compare runs/recipe/base runs/recipe/mid", "found list, wanted an object"
    ),
}  # fmt: skip

COMMANDS: dict[str, tuple[Make, str, str]] = {
    **{
        f"{one} without a word": (nothing, one, "")
        for one in ("run", "evals", "report", "compare", "export", "eval", "plan", "prepare", "inspect",
                    "verify", "release")
    },
    "check without a word": (nothing, "check", "the following arguments are required: recipe; see smol-post"),
    "a stage without a word": (nothing, "sft", "no recipe given; type: accelerate launch"),
    **{
        f"{line.split()[0]} with an unknown option": (nothing, f"{line} --bogus", "--bogus")
        for line in ("run recipe", "evals recipe", "report recipe", "compare a b", "export a b --context 5",
                     "release a b",
                     "eval a --suite b", "plan recipe", "prepare recipe", "inspect own/sft.yaml",
                     "verify recipe", "check recipe", "sft recipe/sft.yaml")
    },
    **{
        f"{line.split()[0]} of what is not there": (nothing, line, "nowhere")
        for line in ("run nowhere", "evals nowhere", "report nowhere", "compare nowhere nowhere",
                     "plan nowhere",
                     "export nowhere out --context 512", "release nowhere out",
                     "eval nowhere --suite own/evals.yaml",
                     "check nowhere",
                     "eval parent --suite nowhere", "prepare nowhere", "inspect nowhere", "verify nowhere",
                     "merge nowhere")
    },
    "run of a file": (nothing, "run recipe/evals.yaml", "recipe/evals.yaml: no run of"),
    "evals of a file": (nothing, "evals recipe/sft.yaml", "no such file"),
    "report of a file": (nothing, "report recipe/sft.yaml", "no such file"),
    "plan of a file": (nothing, "plan recipe/sft.yaml", "no such folder; give a recipe folder"),
    "compare of one": (nothing, "compare runs/recipe/base", "the following arguments are required"),
    "compare of three": (nothing, "compare a b c", "unrecognized arguments: c"),
    "compare of a folder": (nothing, "compare recipe parent", "recipe: no whole run; give a run directory"),
    "eval of a recipe": (nothing, "eval recipe --suite own/evals.yaml", "recipe: no config.json"),
    "eval by no suite": (nothing, "eval parent --suite own/sft.yaml", "stage: found sft, wanted evals"),
    "eval in no mode": (nothing, f"{EVAL} --mode loud", "invalid choice: 'loud'"),
    "eval of a file": (nothing, "eval own/sft.yaml@ --suite own/evals.yaml", "no such folder and no Hub id"),
    "eval of what is not cached": (nothing, "eval org/none --suite own/evals.yaml", "not to be had from the"),
    "eval past the context": (nothing, f"{EVAL} 'probes=[{{kind: single, lengths: [999]}}]'", "takes 999 to"),
    "chat without a word": (nothing, "chat", "the following arguments are required: RUN"),
    "chat with an unknown option": (nothing, "chat parent --bogus", "unrecognized arguments: --bogus"),
    "chat with what is not there": (nothing, "chat nowhere", "nowhere: no such folder and no Hub id"),
    "chat with a recipe": (nothing, "chat recipe", "recipe: no config.json, so no checkpoint; give a"),
    "chat with a folder of runs": (nothing, "chat .", ".: no config.json, so no checkpoint; give parent"),
    "chat with a tokenizer that does not chat": (
        lambda at: (at / "parent" / "chat_template.jinja").unlink(), "chat parent", "has no chat template, so"
    ),
    "chat with tools that are not there": (nothing, TALK, "t.json: no such file; give a JSON list"),
    "chat with tools by a pipe": (pipe("t.json"), TALK, "t.json: no such file"),
    "chat with tools that are no JSON": (write("t.json", "["), TALK, "t.json: not readable as JSON"),
    "chat with a command that is a line": (
        write("t.json", '[{"name": "f", "command": "rm -rf /"}]'), TALK, "wanted a list of words"
    ),
    "chat with one name twice": (
        both(write("t.json", '[{"name": "f"}]'), write("p.json", '["def f()"]')),
        f"{TALK} --python-tools p.json", "the name 'f' stands twice",
    ),
    "chat with a template without tools": (
        both(write("t.json", '[{"name": "f"}]'), write("parent/chat_template.jinja", "{{ messages }}")),
        TALK, "tools: the chat template has no place for tools",
    ),
    "chat at no temperature": (nothing, "chat parent --temperature 0", "--temperature: found 0.0, wanted"),
    "chat of two minds": (nothing, "chat parent --greedy --seed 1", "--greedy: takes no --temperature"),
    "chat of no tokens": (nothing, "chat parent --max-new-tokens 0", "found 0, wanted 1 to"),
    "chat with a system that ends itself": (nothing, "chat parent --system '<|im_end|>'", "control token"),
    "export to no length": (nothing, "export parent out --context many", "invalid int value: 'many'"),
    "export to a shorter length": (nothing, "export parent out --context 5", "nothing to extend"),
    "release of a checkpoint": (nothing, "release parent out", "parent: no whole run; give a run directory"),
    "release of a run without recipe": (nothing, "release runs/recipe/base out", "pipeline.yaml"),
    "release in no size": (nothing, "release parent out --shard-size 0GB", "--shard-size 0GB: wanted a numb"),
    "release in 4 bits": (nothing, "release parent out --quantize int4", "invalid choice: 'int4'"),
    "release under a licence in words": (
        nothing, "release parent out --license 'Apache 2'", "--license Apache 2: wanted one as the Hub spell"
    ),
    "release in private to nowhere": (nothing, "release parent out --private", "give --push-to-hub org/name"),
    "release to a name without owner": (nothing, "release parent out --push-to-hub tiny", "wanted org/name"),
    "release to a name that is none": (nothing, "release parent out --push-to-hub me/a--b", "me/a--b"),
    "release to a Hub that is offline": (nothing, "release parent out --push-to-hub me/tiny", "not to be"),
    "export to a negative length": (nothing, "export parent out --context -5", "nothing to extend"),
    "plan for no devices": (nothing, "plan recipe --devices 0", "--devices: found 0, wanted a number above"),
    "plan at a rate that is NaN": (nothing, "plan recipe --mfu nan", "--mfu: found nan"),
    "plan by a launch file that is a list": (write("l.yaml", "[1]"), "plan recipe --launch l.yaml", "found"),
    "plan by a pipe": (pipe("l.yaml"), "plan recipe --launch l.yaml", "l.yaml: is no file that can be read"),
    "prepare by no workers": (nothing, "prepare recipe --workers 0", "--workers: found 0, wanted at least 1"),
    "prepare in words": (nothing, "prepare recipe --workers two", "invalid int value: 'two'"),
    "prepare of a merge": (nothing, "prepare recipe --run merge", "no run of it has sources"),
    "inspect of many": (nothing, "inspect recipe", "name one, --run base"),
    "inspect of no rows": (nothing, "inspect own/sft.yaml --rows 0", "--rows: found 0, wanted at least 1"),
    "inspect of no source": (nothing, f"{INSPECT} --run-dir cached --source x", "source"),
    "inspect of no mode": (nothing, f"{INSPECT} --run-dir cached --mode x", "mode"),
    "verify of a merge": (nothing, "verify recipe --run merge", "nothing to train, so nothing to verify"),
    "verify at no level": (nothing, "verify recipe --level x", "invalid choice: 'x'"),
    "a run of no name": (nothing, "sft recipe/sft.yaml --run sfft", "--run sfft: no such run"),
    "a run until nothing": (nothing, "run recipe --until sfft", "--until sfft: no such run; did you mean 's"),
    "a stage of another recipe": (nothing, "sft recipe/mid.yaml", "found no run of stage sft; stages here:"),
    "two recipes": (nothing, "sft recipe/sft.yaml recipe/mid.yaml", "wanted key=value (one recipe is given"),
    "a gate that nothing measures": (
        both(edit(SFT, gates={"x": {"min": 0.5}})), "run recipe", "gates: its suite measures no 'x'"
    ),
}  # fmt: skip

CATALOGUE = RECIPES | GENERATORS | PIPELINES | PLACES | ROWS | TEMPLATES | CHECKPOINTS | RECORDS | COMMANDS


@pytest.mark.parametrize("name", CATALOGUE)
def test_bad_input_is_refused_in_a_line_that_says_what_to_do_and_nothing_changes(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, line, says = CATALOGUE[name]
    make(place)
    before = snapshot(place)
    code = call(line)
    said = capsys.readouterr()
    assert code == 2, said.out + said.err
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("refused: ")
    assert lines[0].isprintable()
    assert says in lines[0]
    assert len(lines[0]) < 2000
    after = snapshot(place)
    changed = {path for path in {*before, *after} if after.get(path) != before.get(path)}
    assert not {path for path in changed if not path.startswith(f"{place}/cached")}


def test_harmless_yaml_works(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte order mark, anchors, aliases and merge keys, whose keys may be given anew."""
    shared = "\ufeffstage: sft\nmax_tokens: &length 512\nglobal_batch_size: 4\nnum_steps: 6\nsources:\n"
    first = "  - &first {name: a, generator: dual_mode_chats, num_rows: *length, seed: 2}\n"
    (place / SFT).write_text(f"{shared}{first}  - {{<<: *first, name: b}}\n")
    assert call(CHECK) == 0, capsys.readouterr().err
    recipe: Any = loading.load_recipe(place / SFT)
    assert [(one.name, one.num_rows, one.seed) for one in recipe.sources] == [("a", 512, 2), ("b", 512, 2)]


def test_paths_with_spaces_and_letters_of_any_alphabet_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit("own/sft.yaml", sources__0__path="./Zeilen \u00fc \u6570.jsonl")(place)
    (place / "own" / "rows.jsonl").rename(place / "own" / "Zeilen \u00fc \u6570.jsonl")
    (place / "own").rename(place / "mein Rezept \u00e9\u6570")
    where = "'mein Rezept \u00e9\u6570"
    assert call(f"check {where}'") == 0, capsys.readouterr().err
    assert call(f"inspect {where}/sft.yaml' --rows 1 --run-dir 'ein Ort \u6570'") == 0, (
        capsys.readouterr().err
    )
    assert "2+3?" in capsys.readouterr().out


def test_the_catalogue_counts_every_entry_once() -> None:
    parts = (RECIPES, GENERATORS, PIPELINES, PLACES, ROWS, TEMPLATES, CHECKPOINTS, RECORDS, COMMANDS)
    assert len(CATALOGUE) == sum(map(len, parts)) >= 60
