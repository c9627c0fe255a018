"""The end of the chain: its checkpoints measured side by side, the last one exported for a longer context."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smol_post import commands, evals, plan
from smol_post.refusal import Refusal

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
LATE = ["sft", "apo_seed0", "apo_seed1", "merge_soup", "merge"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("refused: ")
    return line


@pytest.fixture(scope="module")
def exported(chain: Chain, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model, trained to 512 tokens, for 2,048."""
    out = tmp_path_factory.mktemp("exports") / "deep" / "merge-2k"
    before = snapshot(chain[1])
    done = command("smol-post", "export", chain[1] / "merge", out, "--context", "2048")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 2,048 tokens, YaRN factor 4 of 512\n"
    assert snapshot(chain[1]) == before
    return out


def test_an_exported_folder_loads_with_yarn_s_frequencies(exported: Path) -> None:
    """Derived here once more, in the words of the paper's authors' code, for head_dim 8 and theta 1.5e6."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def dimension(turns: int) -> float:
        return 8 * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(1.5e6))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    wanted = []
    for i in range(4):
        plain, ramp = 1.5e6 ** (-2 * i / 8), min(max((i - low) / (high - low), 0), 1)
        wanted.append(plain / 4 * ramp + plain * (1 - ramp))
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert lm.model.rotary_emb.inv_freq.tolist() == pytest.approx(wanted, rel=1e-5)
    assert lm.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert lm.config.max_position_embeddings == 2048
    assert [layer.self_attn.use_rope for layer in lm.model.layers] == [1, 1, 1, 0]
    text = lm.generate(**tokenizer("3+4", return_tensors="pt"), max_new_tokens=2)
    assert text.shape[1] > 3


def test_an_export_is_the_checkpoint_with_another_configuration(exported: Path, chain: Chain) -> None:
    run = chain[1] / "merge"
    made, about = read(run / "manifest.json"), read(exported / "export.json")
    assert {path.name for path in exported.iterdir()} == {*made["files"], "export.json"}
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    for name in made["files"].keys() - {"config.json", "generation_config.json"}:
        assert (exported / name).read_bytes() == (run / name).read_bytes()
        assert (exported / name).stat().st_nlink == 1
    before, after = read(run / "config.json"), read(exported / "config.json")
    scaled = {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 1.5e6,
        "rope_type": "yarn",
    }
    assert after == {**before, "max_position_embeddings": 2048, "rope_parameters": scaled}
    assert about["source"] == {"path": str(run), "run": "merge", "stage": "merge", "digest": made["digest"]}
    assert (about["original"], about["context"], about["factor"]) == (512, 2048, 4.0)
    assert about["files"]["model.safetensors"] == made["files"]["model.safetensors"]
    assert {"torch", "transformers", "smol-post"} <= about["versions"].keys()
    assert ".part" not in (exported / "export.json").read_text()


def test_an_export_samples_as_the_model_card_says_and_ends_as_before(exported: Path, chain: Chain) -> None:
    from transformers import GenerationConfig

    before, after = (GenerationConfig.from_pretrained(one) for one in (chain[1] / "merge", exported))
    assert (after.do_sample, after.temperature, after.top_p) == (True, 0.6, 0.95)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after, name) == getattr(before, name) is not None


def broken(run: Path, case: str) -> None:
    """Make a copy of a whole run one that cannot be exported."""
    weights, config = run / "model.safetensors", read(run / "config.json")
    if case == "unfinished":
        (run / "manifest.json").rename(run / "state.json")
    elif case == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    else:
        (run / "manifest.json").unlink()
        del config["rope_parameters"]
        (run / "config.json").write_text(json.dumps(config))


REFUSALS = {
    "no context": (["merge", "out"], "arguments are required: --context; see smol-post export --help"),
    "a context in words": (["merge", "out", "--context", "1k"], "--context: invalid int value: '1k'"),
    "no more than trained": (["merge", "out", "--context", "512"], "context of 512: nothing to extend"),
    "no such run": (["merg", "out", "--context", "1024"], "merg: found no config.json, so no checkpoint"),
    "a folder of runs": ([".", "out", "--context", "1024"], ".: found no config.json, so no checkpoint"),
    "a place that is taken": (
        ["merge", "taken", "--context", "1024"],
        "taken: exists and is no empty folder",
    ),
    "a file": (["merge", "taken/thesis.tex", "--context", "1024"], "exists and is no empty folder"),
    "a place in the run": (["merge", "merge/long", "--context", "1024"], "merge/long: lies inside merge"),
    "a place in a file": (["merge", "taken/thesis.tex/out", "--context", "1024"], "cannot be written"),
    "unfinished": (
        ["merge", "out", "--context", "1024"],
        "merge: found an unfinished run, wanted a whole one",
    ),
    "changed": (["merge", "out", "--context", "1024"], "model.safetensors: has changed since the run ended"),
    "no rope": (["merge", "out", "--context", "1024"], "found no rope_parameters.rope_theta"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_exported_is_refused_in_one_line_and_nothing_is_written(
    chain: Chain, command: Command, tmp_path: Path, case: str
) -> None:
    words, message = REFUSALS[case]
    shutil.copytree(chain[1] / "merge", tmp_path / "merge")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    if case in ("unfinished", "changed", "no rope"):
        broken(tmp_path / "merge", case)
    before = snapshot(tmp_path)
    assert message in refused(command("smol-post", "export", *words, cwd=tmp_path))
    assert snapshot(tmp_path) == before


def test_an_export_is_not_exported_again(exported: Path, command: Command, tmp_path: Path) -> None:
    line = refused(command("smol-post", "export", exported, tmp_path / "out", "--context", "4096"))
    assert "found RoPE that is scaled or partial already" in line
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_needs_no_torch(chain: Chain, environment: dict[str, str], tmp_path: Path) -> None:
    """The last one that can be: after every file was hashed."""
    run = Path(shutil.copytree(chain[1] / "merge", tmp_path / "merge"))
    broken(run, "changed")
    code = (
        "import sys; from smol_post import export; print(export.export(sys.argv[1:]), 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, run, tmp_path / "out", "--context", "1024"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_export_leaves_no_torn_folder_and_blocks_none(
    chain: Chain, command: Command, environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    words: list[str | Path] = ["export", chain[1] / "merge", tmp_path / "out", "--context", "1024"]
    part = tmp_path / ".out.part"
    program = Path(sys.executable).with_name("smol-post")
    victim = subprocess.Popen([program, *words], env=environment, stderr=subprocess.DEVNULL)
    while victim.poll() is None and not (part / "generation_config.json").is_file():
        time.sleep(0.001)
    victim.send_signal(number)
    assert victim.wait() == (75 if number == signal.SIGTERM else -signal.SIGKILL), "ended before the kill"
    assert list(tmp_path.iterdir()) == ([part] if number == signal.SIGKILL else [])
    done = command("smol-post", *words)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_yarn_is_measured_on_the_last_run_only(chain: Chain) -> None:
    found = {path.stem: read(path)["metrics"].keys() for path in (chain[1] / "evals").glob("*.json")}
    longer = {"needle_3x", "needle_2x_yarn", "needle_3x_yarn"}
    assert longer <= found.pop("merge")
    assert all(not longer & names for names in found.values())


@pytest.mark.parametrize("run", ["sft", "merge"])
def test_workers_measure_what_one_process_does(chain: Chain, run: str, one_thread: None) -> None:
    recipe = commands.load_evals(chain[0])
    assert recipe is not None
    written = read(chain[1] / "evals" / f"{run}.json")
    metrics, samples = evals.evaluate(chain[1] / run, recipe)
    known = {name: metric for name, metric in metrics.items() if name in written["metrics"]}
    assert (known, samples) == (written["metrics"], written["samples"])


@pytest.fixture
def unmeasured(chain: Chain, tmp_path: Path) -> Path:
    """A copy of the run folder without the evals of its later checkpoints."""
    root = Path(shutil.copytree(chain[1], tmp_path / "runs", ignore=shutil.ignore_patterns("cache")))
    for name in LATE:
        (root / "evals" / f"{name}.json").unlink()
    return root


def processes(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_evals_keep_what_is_measured_and_leave_no_process(
    chain: Chain, command: Command, environment: dict[str, str], unmeasured: Path, number: signal.Signals
) -> None:
    words = ["evals", chain[0], "--run-dir", unmeasured]
    program = Path(sys.executable).with_name("smol-post")
    victim = subprocess.Popen(
        [program, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = unmeasured / "evals"
    while victim.poll() is None and not any((folder / f"{name}.json").is_file() for name in LATE):
        time.sleep(0.005)
    (os.killpg if number == signal.SIGINT else os.kill)(victim.pid, number)  # Ctrl-C reaches the group
    _, errors = victim.communicate()
    if number != signal.SIGKILL:
        code = 130 if number == signal.SIGINT else 75
        assert (victim.returncode, errors) == (code, "evals: interrupted; what is evaluated is kept\n")
    deadline = time.monotonic() + 60
    while processes(victim.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(victim.pid) == []
    kept = {
        name: (folder / f"{name}.json").read_bytes() for name in LATE if (folder / f"{name}.json").is_file()
    }
    assert 0 < len(kept) < len(LATE), "all was measured before the signal"
    if number != signal.SIGINT:
        return
    done = command("smol-post", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kept, same checkpoint and suite") == 3 + len(kept)
    assert {path.stem for path in folder.glob("*.json")} == {"base", "long_context_1", "mid", *LATE}
    assert {name: (folder / f"{name}.json").read_bytes() for name in kept} == kept


def test_a_checkpoint_that_cannot_be_measured_is_refused_in_one_line(
    chain: Chain, command: Command, unmeasured: Path
) -> None:
    (unmeasured / "sft" / "model.safetensors").write_bytes(b"torn")
    line = refused(command("smol-post", "evals", chain[0], "--run-dir", unmeasured))
    assert "sft: no loadable weights" in line
    assert any((unmeasured / "evals" / f"{name}.json").is_file() for name in LATE)
    assert not (unmeasured / "evals" / "sft.json").exists()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was shown; SIGTERM does afterwards what it did before."""
    lines: list[Any] = []
    monkeypatch.setattr(evals, "say", lines.append)
    before = signal.getsignal(signal.SIGTERM)
    yield lines
    signal.signal(signal.SIGTERM, before)


def test_results_are_shown_as_they_come(said: list[Any]) -> None:
    tasks = [(f"__import__('time').sleep({seconds}) or {seconds}",) for seconds in (4, 0.1, 0.2)]
    assert evals.at_once(eval, tasks, num_workers=2)
    assert said == [0.1, 0.2, 4]


def test_a_worker_that_is_killed_is_told_of(said: list[Any]) -> None:
    with pytest.raises(Refusal, match=r"one of 2 workers was killed.*higher num_threads"):
        evals.at_once(os._exit, [(1,), (1,)], num_workers=2)


def test_an_error_ends_the_other_workers(said: list[Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        evals.at_once(
            eval,
            [("3",), *((f"__import__('time').sleep({s}) or 1 / 0",) for s in (100, 1, 100))],
            num_workers=2,
        )
    assert time.monotonic() - started < 60
    assert said == [3]


def test_ctrl_c_is_silent_in_a_worker_that_waits(environment: dict[str, str]) -> None:
    code = """from smol_post import evals
tasks = [("__import__('time').sleep(1) or 1",)] * 2 + [("__import__('time').sleep(60)",)]
try:
    evals.at_once(eval, tasks, num_workers=2)
except KeyboardInterrupt:
    print("interrupted")"""
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() + started.stdout.readline() == "1\n1\n"
    started.send_signal(signal.SIGSTOP)  # so that the worker has time to speak
    os.killpg(started.pid, signal.SIGINT)
    time.sleep(0.5)
    started.send_signal(signal.SIGCONT)
    assert started.communicate(timeout=120) == ("interrupted\n", "")


def test_results_of_something_else_are_measured_again_one_by_one_beside_an_accelerator(
    chain: Chain, unmeasured: Path, monkeypatch: pytest.MonkeyPatch, said: list[Any]
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(evals, "at_once", lambda *_, **__: False)
    monkeypatch.setattr(evals, "measure", lambda *task: measured.append(task[-1]["run"]) or "")
    for name, key in (("base", "checkpoint_digest"), ("mid", "suite_digest")):
        path = unmeasured / "evals" / f"{name}.json"
        path.write_text(json.dumps(read(path) | {key: "sha256:another"}))
    recipe = commands.load_evals(chain[0])
    assert recipe is not None
    evals.evaluate_all(recipe, plan.make_plan(chain[0], run_root=unmeasured, arguments=[]).pipeline)
    assert measured == ["base", "mid", *LATE]
    assert said[0] == "evals: long_context_1: kept, same checkpoint and suite"
    assert f"evals: measuring {', '.join(measured)}" in said


@pytest.mark.parametrize(("num_threads", "num_workers"), [(1, [4]), (2, [2]), (3, []), (None, [])])
def test_as_many_checkpoints_are_measured_at_once_as_the_cores_allow(
    chain: Chain,
    monkeypatch: pytest.MonkeyPatch,
    said: list[Any],
    num_threads: int | None,
    num_workers: list[int],
) -> None:
    used: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(evals, "at_once", lambda *_, num_workers: used.append(num_workers) or True)
    monkeypatch.setattr(evals, "measure", lambda *_: "")
    recipe = commands.load_evals(chain[0])
    assert recipe is not None
    recipe = recipe.model_copy(update={"num_threads": num_threads, "seed": 1})
    evals.evaluate_all(recipe, plan.make_plan(chain[0], run_root=chain[1], arguments=[]).pipeline)
    assert used == num_workers
