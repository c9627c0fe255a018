"""One command takes a base model through all stages; it can be stopped, repeated and trusted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
RUNS = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1", "merge"]
PARENTS = {
    "base": [],
    "long_context_1": ["base"],
    "mid": ["long_context_1"],
    "sft": ["mid"],
    "apo_seed0": ["sft"],
    "apo_seed1": ["sft"],
    "merge": ["apo_seed0", "apo_seed1", "long_context_1"],
}


def manifest_of(root: Path, run: str) -> dict[str, Any]:
    return json.loads((root / run / "manifest.json").read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    return line


def copy_runs(root: Path, to: Path, *runs: str) -> Path:
    for run in runs:
        shutil.copytree(root / run, to / run)
    return to


@pytest.mark.parametrize("run", RUNS)
def test_every_run_is_whole_and_its_parents_are_those_it_was_made_from(chain: Chain, run: str) -> None:
    root = chain[1]
    made = manifest_of(root, run)
    assert (made["run"], made["num_processes"], made["recipe"]["stage"]) == (run, 1, made["stage"])
    assert [one["path"] for one in made["parents"]] == [f"../{parent}" for parent in PARENTS[run]]
    for one, parent in zip(made["parents"], PARENTS[run], strict=True):
        assert one["digest"] == manifest_of(root, parent)["digest"]
    assert not {".lock", "state.json", "training_args.bin"} & {path.name for path in (root / run).iterdir()}
    if run != "merge":
        assert made["metrics"]["num_steps"] == made["recipe"]["num_steps"]
        assert 0 < made["data"]["num_trained_tokens"] <= made["data"]["num_tokens"]


@pytest.mark.parametrize("run", RUNS)
def test_every_run_directory_is_a_plain_checkpoint(chain: Chain, run: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = chain[1] / run
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theta = 50_000 if run == "base" else 1_500_000
    assert lm.config.rope_parameters["rope_theta"] == theta
    assert lm.model.rotary_emb.inv_freq[1].item() == pytest.approx(theta ** (-1 / 4))
    assert lm.config.max_position_embeddings == (64 if run == "base" else 512)
    assert lm.config.use_cache is True
    assert len(tokenizer) == lm.config.vocab_size
    text = lm.generate(**tokenizer("3+4", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert torch.isfinite(lm(text).logits).all()


def test_every_stage_changed_the_weights(chain: Chain) -> None:
    digests = [manifest_of(chain[1], run)["files"]["model.safetensors"] for run in RUNS if run != "merge"]
    assert len(set(digests)) == len(digests)


def test_the_final_tokenizer_speaks_both_modes_and_takes_tools(chain: Chain) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chain[1] / "merge")
    asked = [{"role": "user", "content": "2+3?"}]

    def text(**variables: Any) -> str:
        return tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, date_string="01 July 2025", **variables
        )

    thinking, direct = text(enable_thinking=True), text(enable_thinking=False)
    assert thinking == text() != direct
    assert thinking.endswith("<|im_start|>assistant\n")
    assert re.search(r"<think>\s*</think>\s*$", direct)
    tool = {"name": "weather", "parameters": {"city": {"type": "string"}}}
    assert '"name": "weather"' in text(xml_tools=[tool])
    assert "def weather(city)" in text(python_tools=["def weather(city): ..."])
    assert '"name": "weather"' not in thinking


def test_every_checkpoint_is_evaluated_under_its_digest_and_reported(chain: Chain) -> None:
    root = chain[1]
    found = {path.stem: json.loads(path.read_text()) for path in (root / "evals").glob("*.json")}
    assert found.keys() == {*RUNS, "merge_soup"}
    for run in RUNS:
        assert found[run]["checkpoint_digest"] == manifest_of(root, run)["digest"]
    assert "preference_accuracy" in found["sft"]["metrics"]
    assert "think_greedy" not in found["base"]["metrics"]
    assert {path.name for path in root.glob("report.*")} == {"report.html", "report.md"}
    assert all(run in (root / "report.md").read_text() for run in RUNS)


def test_a_second_call_keeps_everything_and_touches_no_run(chain: Chain, command: Command) -> None:
    recipe, root = chain
    before = {run: snapshot(root / run) for run in [*RUNS, "evals"]}
    done = command("smol-post", "run", recipe, "--run-dir", root)
    assert done.returncode == 0, done.stderr
    assert {run: snapshot(root / run) for run in [*RUNS, "evals"]} == before
    assert done.stdout.count("whole already, kept") == len(RUNS)


def test_an_edited_recipe_is_refused_with_the_key_that_changed(
    chain: Chain, command: Command, recipe_folder: Path
) -> None:
    root = chain[1]
    path = recipe_folder / "mid.yaml"
    path.write_text(path.read_text().replace("num_steps: 4", "num_steps: 5"))
    before = snapshot(root)
    line = refused(command("smol-post", "run", recipe_folder, "--run-dir", root))
    assert "mid: holds a whole run of something else (recipe num_steps: 4 -> 5)" in line
    assert snapshot(root) == before


def test_a_parent_that_was_touched_is_refused(
    chain: Chain, command: Command, recipe_folder: Path, tmp_path: Path
) -> None:
    root = copy_runs(chain[1], tmp_path / "runs", "mid")
    (root / "mid" / "config.json").write_text("{}")
    done = command("smol-post", "sft", recipe_folder / "sft.yaml", "--run-dir", root)
    assert "mid/config.json: has changed since the run ended" in refused(done)
    assert not (root / "sft").exists()


def test_what_is_prepared_before_any_run_exists_is_what_the_runs_train_on(
    chain: Chain, command: Command, tmp_path: Path
) -> None:
    done = command("smol-post", "prepare", chain[0], "--run-dir", tmp_path, "--json")
    prepared = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["run"] for one in prepared] == RUNS[:-1]
    for one in prepared:
        trained = manifest_of(chain[1], one["run"])["data"]
        assert {key: one[key] for key in trained if "seconds" not in key and key != "by_source"} == {
            key: trained[key] for key in trained if "seconds" not in key and key != "by_source"
        }


CHATS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
ROWS = {
    "empty data": ([], "rows.jsonl: no rows to train on (it is empty); mend or remove it"),
    "no assistant turn": (
        [{"messages": CHATS}, {"messages": CHATS[:1]}],
        "row 2: no assistant turn to train on: the roles are user",
    ),
    "bad JSON line": ([{"messages": CHATS}, '{"messages": ['], "rows.jsonl: row 2: not JSON"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_refused_in_one_line_and_the_parent_is_left_alone(
    chain: Chain, command: Command, recipe_folder: Path, tmp_path: Path, case: str
) -> None:
    rows, message = ROWS[case]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (recipe_folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    tree = yaml.safe_load((recipe_folder / "sft.yaml").read_text())
    tree["sources"] = [{"name": "chats", "path": "rows.jsonl", "mode": "think"}]
    (recipe_folder / "sft.yaml").write_text(yaml.safe_dump(tree))
    root = copy_runs(chain[1], tmp_path / "runs", "mid")
    before = snapshot(root / "mid")
    done = command("smol-post", "sft", recipe_folder / "sft.yaml", "--run-dir", root)
    assert message in refused(done)
    assert snapshot(root / "mid") == before
    assert not (root / "sft" / "manifest.json").exists()
    state = json.loads((root / "sft" / "state.json").read_text())
    assert (state["status"], message in state["message"]) == ("refused", True)


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(
    chain: Chain, command: Command, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe, root = chain
    words = [
        "sft", recipe / "sft.yaml", "num_steps=30", "trainer.save_strategy=steps", "trainer.save_steps=3",
    ]  # fmt: skip
    whole, torn = (copy_runs(root, tmp_path / name, "mid") for name in ("whole", "torn"))
    done = command("smol-post", *words, "--run-dir", whole)
    assert done.returncode == 0, done.stderr
    program = Path(sys.executable).with_name("smol-post")
    victim = subprocess.Popen(
        [program, *words, "--run-dir", torn],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = torn / "sft" / "checkpoints"
    while victim.poll() is None and not (checkpoints / "checkpoint-6" / "whole.json").is_file():
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (torn / "sft" / "manifest.json").exists(), "the run ended before it could be killed"
    # What a crash in the middle of a save leaves behind: the newest checkpoint, torn.
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    half = checkpoints / "checkpoint-29"
    shutil.copytree(newest, half)
    (half / "whole.json").unlink(missing_ok=True)
    (half / "optimizer.pt").unlink(missing_ok=True)
    done = command("smol-post", *words, "--run-dir", torn)
    assert done.returncode == 0, done.stderr
    resumed, straight = manifest_of(torn, "sft"), manifest_of(whole, "sft")
    assert 6 <= resumed["metrics"]["resumed_from_step"] < 29
    assert straight["metrics"]["resumed_from_step"] == 0
    assert resumed["files"] == straight["files"]
    assert resumed["digest"] == straight["digest"]
    log = [json.loads(line) for line in (torn / "sft" / "train_log.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (whole / "sft" / "train_log.jsonl").read_text().splitlines()]
    assert [(one["step"], one["loss"]) for one in log] == [(one["step"], one["loss"]) for one in other]


def test_a_missing_parent_is_built_first_where_the_recipe_says_so(
    chain: Chain, command: Command, tmp_path: Path
) -> None:
    recipe, root = chain
    runs = copy_runs(root, tmp_path / "runs", "long_context_1", "apo_seed0")
    (tmp_path / "runs" / "apo_seed0").rename(tmp_path / "apo_seed0")
    done = command("smol-post", "sft", recipe / "sft.yaml", "--run-dir", runs)
    assert done.returncode == 0, done.stderr
    for run in ("mid", "sft"):
        assert (runs / run / "model.safetensors").read_bytes() == (
            root / run / "model.safetensors"
        ).read_bytes()
    assert not (runs / "base").exists()


def test_the_saved_weights_are_those_of_the_last_step(chain: Chain) -> None:
    """Tied: the head is not saved beside the embedding, and nothing else is lost."""
    names = load_file(chain[1] / "sft" / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 4 * 9


def test_the_long_context_checkpoint_says_what_it_was_trained_at(chain: Chain) -> None:
    recipe = yaml.safe_load((chain[0] / "long_context_1.yaml").read_text())
    saved = json.loads((chain[1] / "long_context_1" / "config.json").read_text())
    assert saved["max_position_embeddings"] == recipe["max_tokens"]
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": recipe["rope_theta"]}
    for later in ("mid", "sft", "merge"):
        assert (
            json.loads((chain[1] / later / "config.json").read_text())["rope_parameters"]
            == saved["rope_parameters"]
        )


def test_a_copied_chain_holds_and_a_flipped_byte_or_an_edited_recipe_is_named(
    chain: Chain, command: Command, recipe_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(chain[1], tmp_path / "copied"))
    done = command("smol-post", "lineage", "../merge", "--verify", cwd=root / "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note" not in done.stdout
    assert done.stdout.count("\nok") == len(RUNS)
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("as above")] == [
        "../sft", "../long_context_1",
    ]  # fmt: skip
    for run in RUNS[:-1]:
        made = manifest_of(root, run)
        stores = {path.name for path in (root / "cache" / "documents").iterdir()}
        assert set(made["documents"]) < stores
        assert len(made["documents"]) == len(made["recipe"]["sources"])

    place = root / "sft" / "model.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    store = next(root.glob(f"cache/documents/{manifest_of(root, 'mid')['documents'][0]}/tokens*.bin"))
    store.unlink()
    done = command("smol-post", "lineage", root / "merge", "--verify")
    changed = [line for line in done.stdout.splitlines() if line.startswith("changed")]
    assert done.returncode == 1
    assert changed == [
        f"changed  {root / 'apo_seed0'}: parent ../sft has other contents than it was made from",
        f"changed  {place}: has changed",
        f"changed  {store.parent}: prepared data: {store.name} is missing; remove it, it is made anew",
        f"changed  {root / 'apo_seed1'}: parent ../sft has other contents than it was made from",
    ]

    path = recipe_folder / "sft.yaml"
    path.write_text(path.read_text().replace("num_steps: 6", "num_steps: 7"))
    done = command("smol-post", "status", recipe_folder, "--run-dir", root)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:-1])
    assert [run for run in RUNS if told[run].startswith("stale")] == RUNS[3:]
    assert told["sft"].endswith("recipe num_steps: 6 -> 7")
    assert done.stdout.splitlines()[-1].startswith(
        f"evals of {len(RUNS)} of {len(RUNS)} whole runs; report: "
    )
    done = command("smol-post", "status", chain[1])
    assert [line.split()[1] for line in done.stdout.splitlines()[1:-1]] == ["whole"] * len(RUNS)


def test_a_run_under_way_is_told_with_its_step_and_afterwards_where_it_would_go_on(
    command: Command, environment: dict[str, str], recipe_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    program = Path(sys.executable).with_name("smol-post")
    path = recipe_folder / "base.yaml"
    text = path.read_text().replace("num_steps: 12", "num_steps: 5000")
    path.write_text(text.replace("trainer: {", "trainer: {save_strategy: steps, save_steps: 20, "))
    running = subprocess.Popen(
        [program, "base", path, "--run-dir", root],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told, wanted = "", re.compile(r"base +running +process (\d+), step (\d+)/5000, .* left")
        while running.poll() is None and not (found := wanted.search(told)):
            told = command("smol-post", "status", recipe_folder, "--run-dir", root).stdout
        assert running.poll() is None, told
        assert found
        os.kill(int(found[1]), 0)  # the process that is named is there
        assert 0 < int(found[2]) < 5000
        while not (root / "base" / "checkpoints" / "checkpoint-20" / "whole.json").is_file():
            time.sleep(0.01)
    finally:
        running.terminate()
        running.wait()
    told = command("smol-post", "status", root).stdout
    step = re.search(r"whole as far as step (\d+); base: stopped after step \1, which is saved", told)
    assert step, told
    explain = ["smol-post", "run", recipe_folder, "--run-dir", root, "--explain"]
    done = command(*explain)
    assert done.returncode == 0, done.stdout
    assert re.search(rf"base +would go on from step {step[1]}\n", done.stdout)
    path.write_text(text)
    done = command(*explain)
    assert done.returncode == 2
    assert "recipe trainer.save_steps: 20 -> None" in done.stdout
