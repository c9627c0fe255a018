"""What comes from others is data, seen through the real commands and in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smol_post import data, manifest, training
from smol_post.config import SftRecipe, Source
from smol_post.inspection import Row, Token, to_html
from smol_post.report import write_report
from smol_post.vocabulary import Vocabulary

Build = Callable[..., Any]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMMIT = "c" * 40
OWN = """import pathlib
from transformers import SmolLM3Config, SmolLM3ForCausalLM

pathlib.Path({marker!r}).touch()


class OwnConfig(SmolLM3Config):
    model_type = "own"


class OwnModel(SmolLM3ForCausalLM):
    config_class = OwnConfig
"""


# Code


@pytest.mark.slow
def test_code_of_a_checkpoint_runs_where_the_recipe_trusts_it_and_is_recorded_by_commit(
    build: Build, tokenizer: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    """A model class of its own, from the Hub's cache, trained by the real command without a network."""
    marker, place = tmp_path / "it_ran", tmp_path / "hub" / "models--ours--own"
    parent = place / "snapshots" / COMMIT
    build().save_pretrained(parent)
    tokenizer.save_pretrained(parent)
    (parent / "own.py").write_text(OWN.format(marker=str(marker)))
    tree = json.loads((parent / "config.json").read_text())
    tree |= {"model_type": "own", "architectures": ["OwnModel"]}
    tree["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (parent / "config.json").write_text(json.dumps(tree))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    folder = tmp_path / "recipe"
    folder.mkdir()
    recipe = {"stage": "sft", "max_tokens": 256, "global_batch_size": 2, "num_steps": 2,
              "sources": [{"name": "s", "generator": "dual_mode_chats", "num_rows": 40}]}  # fmt: skip
    runs = [{"name": "sft", "stage": "sft", "recipe": "sft.yaml", "parents": ["ours/own"]}]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}

    def sft(**keys: Any) -> subprocess.CompletedProcess[str]:
        (folder / "sft.yaml").write_text(yaml.safe_dump(recipe | keys))
        words = [sys.executable, "-m", "smol_post", "sft", folder, "--run-dir", tmp_path / "runs"]
        return subprocess.run(words, env=environment | where, capture_output=True, text=True, check=False)

    assert (sft().returncode, marker.exists(), (tmp_path / "runs").exists()) == (2, False, False)
    done = sft(trust_remote_code=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert marker.exists()
    made = manifest.verify(tmp_path / "runs" / "sft")
    assert [one["digest"] for one in made["parents"]] == [f"hub:ours/own@{COMMIT}"]
    assert "own.py" in made["files"]
    assert made["recipe"]["trust_remote_code"] is True


# Pickles


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


Trained = tuple[Path, Callable[[Path], Any]]


@pytest.fixture(scope="module")
def trained(build: Build, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A sealed checkpoint of step 2, and a trainer that goes on from it in another place."""
    root = tmp_path_factory.mktemp("resume")
    recipe = SftRecipe(
        stage="sft",
        max_tokens=256,
        global_batch_size=2,
        num_steps=3,
        sources=[Source(name="s", generator="dual_mode_chats", num_rows=40)],
        trainer={"save_strategy": "steps", "save_steps": 2},
    )
    words = Vocabulary(tokenizer, tokenizer.chat_template, "<|endoftext|>", [])
    packs = data.prepare(recipe, words, folder=root, cache_dir=root / "cache")

    def go_on(run_dir: Path) -> Any:
        arguments = training.trainer_arguments(recipe, run_dir=run_dir, num_processes=1)
        return training.pack_trainer(build(), tokenizer, packs.dataset, arguments=arguments)

    go_on(root).train()
    manifest.seal(root / "checkpoints" / "checkpoint-2")
    return root, go_on


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_planted_in_a_sealed_checkpoint_does_not_run_when_it_resumes(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    root, go_on = trained
    shutil.copytree(root / "checkpoints", tmp_path / "checkpoints")
    marker, planted = tmp_path / "it_ran", tmp_path / "checkpoints" / "checkpoint-2"
    assert (planted / name).is_file()
    torch.save(Trap(marker), planted / name)
    manifest.seal(planted)
    assert training.last_checkpoint(tmp_path, announce=str) == planted
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        go_on(tmp_path).train(resume_from_checkpoint=str(planted))
    assert not marker.exists()


@pytest.mark.slow
def test_other_pickles_of_a_checkpoint_are_not_read_when_it_resumes(trained: Trained, tmp_path: Path) -> None:
    root, go_on = trained
    shutil.copytree(root / "checkpoints", tmp_path / "checkpoints")
    marker, planted = tmp_path / "it_ran", tmp_path / "checkpoints" / "checkpoint-2"
    for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "random_0.pkl"):
        torch.save(Trap(marker), planted / name)
    trainer = go_on(tmp_path)
    trainer.train(resume_from_checkpoint=str(planted))
    assert (trainer.state.global_step, marker.exists()) == (3, False)


# Secrets and names


@pytest.mark.slow
def test_no_file_and_no_line_of_a_chain_holds_a_secret_of_the_environment(
    chain: tuple[Path, Path], environment: dict[str, str]
) -> None:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
    secrets = [environment[name].encode() for name in names]
    assert all(b"planted" in one for one in secrets)
    files = [path for path in chain[1].parent.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert "output.txt" in {path.name for path in files}  # what the command said
    assert [path for path in files if any(one in path.read_bytes() for one in secrets)] == []


@pytest.mark.slow
def test_names_for_trackers_write_nothing_outside_the_run(
    command: Callable[..., Any], recipe_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "a" / "b" / "runs"
    given = ["trainer.report_to=tensorboard", "trainer.run_name=../../../escaped", "num_steps=1",
             "trainer.project=../../escaped", "sources.0.name=../../../escaped"]  # fmt: skip
    done = command("smol-post", "base", recipe_folder, "--run-dir", root, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((root / "base" / "tensorboard").glob("events*"))
    assert not list(tmp_path.rglob("*escaped*"))
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"runs"}


# Pages

ATTACKS = [
    "<script>document.title='planted'</script>",
    "<img src=x onerror=\"document.title='planted'\">",
    '" onmouseover="document.title=1" x="',
    "' onfocus='document.title=1",
    "</pre></details><script>document.title='planted'</script>",
    "</script><script>document.title='planted'</script>",
    "--><script>document.title='planted'</script>",
    "]]><svg onload=\"document.title='planted'\"/>",
    "[click](javascript:alert(1)) ![x](javascript:alert(1))",
    "a | b \\| c\n| d |",
    "`code` ``` <javascript:alert(1)>",
]
TEXT = " ".join(ATTACKS)


def write_attacks(root: Path) -> list[str]:
    """A run root in which every text that a report shows is an attack; the names of its runs."""
    metric = {"value": 0.5, "stderr": 0.1}
    counts = {"num_documents": 1, "num_tokens": 2, "num_trained_tokens": 1}
    sweep = [
        {"weight": w, "keeps": True, "chosen": w > 0, "metrics": {TEXT: metric, "think_greedy": metric}}
        for w in (0.0, 0.5)
    ]
    found: dict[str, Any] = {
        "run": TEXT, "stage": TEXT, "digest": f"sha256:{TEXT}", "seed": TEXT, "seconds": 1.0,
        "recipe": {TEXT: TEXT, "gates": {TEXT: {"min": 0.5, "max": None}}}, "recipe_file": f"{ATTACKS[0]}/x",
        "parents": [{"path": f"../{TEXT}", "digest": TEXT}], "versions": {TEXT: TEXT},
        "data": {**counts, "by_source": {TEXT: counts}, "by_mode": {TEXT: counts}, "fingerprint": TEXT},
        "metrics": {"num_tokens_seen": 2, "train_loss": 0.5, "sweep": sweep},
    }  # fmt: skip
    proofs = [{"name": TEXT, "status": "failed", "found": {TEXT: TEXT}, "wanted": TEXT}]
    metrics = dict.fromkeys([f"{TEXT}0", f"{TEXT}1", f"think_{TEXT}", "needle_4x", f"single_4{TEXT}"], metric)
    samples = [{"mode": TEXT, "prompt": TEXT, "output": TEXT, "right": False}]
    evals = {"checkpoint_digest": found["digest"], "metrics": metrics, "samples": samples}
    names = ["a", "b"]
    for name in names:
        for path, content in (
            (root / name / "manifest.json", found),
            (root / name / "verify.json", {"level": TEXT, "step": 1, "proofs": proofs}),
            (root / "evals" / f"{name}.json", evals),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        (root / name / "train_log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, TEXT: TEXT}) + "\n")
    return names


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_report_escapes_whatever_runs_recipes_and_models_say(tmp_path: Path) -> None:
    names = write_attacks(tmp_path)
    page, text = (path.read_text() for path in write_report(tmp_path, runs=names)[:2])
    found = Tags(page).found
    assert not {"script", "img", "iframe", "object", "a", "form"} & {tag for tag, _ in found}
    assert not [name for _, attributes in found for name in attributes if name.startswith("on")]
    assert page.count("document.title=") > 20  # it is all there, as text
    text = re.sub("```sh\n.*?\n```", "", text, flags=re.DOTALL)  # the commands, as they are to be typed
    assert not re.search(r"<[a-z!/]", text)
    assert not re.search(r"(?<!\\)(\\\\)*\[[^\]]*\]\(", text)


def test_a_page_may_load_nothing_and_run_only_its_own_script(tmp_path: Path) -> None:
    page = write_report(tmp_path, runs=write_attacks(tmp_path))[0].read_text()
    for text, scripts in ((page, 0), (to_html([], title=TEXT, ledger={}), 1)):
        found = Tags(text).found
        policy = next(str(a["content"]) for _, a in found if a.get("http-equiv") == "Content-Security-Policy")
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert ("script-src" in rules, [tag for tag, _ in found].count("script")) == (bool(scripts), scripts)
        assert "unsafe" not in rules.get("script-src", "")


# As a browser sees it


def dom(page: Path) -> str:
    """The page after its scripts, if any, have run; the browser gets 60 seconds."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
             f"--user-data-dir={page.parent / 'profile'}"]  # fmt: skip
    words = [str(BROWSER), *flags, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def title(text: str) -> str:
    return re.findall("<title>(.*?)</title>", text, re.DOTALL)[0]


def write_pages(root: Path) -> dict[str, Path]:
    """Both pages, of a report and of an inspection, from nothing but attacks."""
    report, _ = write_report(root, runs=write_attacks(root))
    tokens = [Token(7, text, True, 0, at) for at, text in enumerate(ATTACKS)]
    rows = [Row(source, TEXT, 1, 0, 0, tokens, 0, len(tokens)) for source in (TEXT, "other")]
    (root / "inspect.html").write_text(to_html(rows, title=f"inspect {TEXT}", ledger={"num_tokens": 1}))
    return {"report": report, "inspect": root / "inspect.html"}


in_a_browser = pytest.mark.skipif(BROWSER is None, reason="not run: no Chromium installed")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(("name", "begins"), [("report", "smol_post: "), ("inspect", "inspect &lt;script")])
def test_no_planted_script_runs_in_a_browser(tmp_path: Path, name: str, begins: str) -> None:
    page = write_pages(tmp_path)[name]
    page.write_text(re.sub("<meta http-equiv.*?>", "", page.read_text()))  # by escaping alone
    found = dom(page)
    assert found.count("document.title=") > 5  # as text
    assert title(found).startswith(begins)


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("name", ["report", "inspect"])
def test_even_what_is_not_escaped_does_not_run_in_a_browser(tmp_path: Path, name: str) -> None:
    """The second line: the policy of the page, without which the same script runs."""
    page = write_pages(tmp_path)[name]
    raw = "<main><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
    whole = page.read_text().replace("<main>", raw)
    page.write_text(whole)
    assert title(dom(page)) != "ran"
    page.write_text(re.sub("<meta http-equiv.*?>", "", whole))
    assert title(dom(page)) == "ran"


@pytest.mark.slow
@in_a_browser
def test_the_script_of_an_inspection_runs_under_its_policy(tmp_path: Path) -> None:
    page = write_pages(tmp_path)["inspect"]
    page.write_text(page.read_text().replace("<option>other</option>", "<option selected>other</option>"))
    assert len(re.findall(r'<section class="row"[^>]* hidden=""', dom(page))) == 1
