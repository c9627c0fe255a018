"""A released model is the run, whoever reads it: versions of transformers, a server, its card, the Hub."""

import base64
import contextlib
import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from smol_post import manifest, release

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
OLD = ("transformers==4.53.3", "huggingface_hub>=0.30,<1", "tokenizers>=0.21,<0.22")
CONTEXT = 2048
PROGRAM = Path(sys.executable).with_name("smol-post")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def beside(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """A folder with packages in other versions than the environment's, kept; skips where they are not had."""

    def made(name: str, *packages: str) -> Path:
        assert pytestconfig.cache is not None
        folder = pytestconfig.cache.mkdir(f"beside-{name}") / "site"
        if not folder.is_dir():
            words = [
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--target",
                folder.with_name("part"),
            ]
            shutil.rmtree(folder.with_name("part"), ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", *map(str, words), *packages]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{', '.join(packages)}: not to be installed: {done.stderr.splitlines()[-1]}")
            folder.with_name("part").rename(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def released(chain: Chain, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model, trained to 512 tokens, in small files, with a configuration for 2,048."""
    out = tmp_path_factory.mktemp("releases") / "tiny"
    words = ["--context", str(CONTEXT), "--shard-size", "100KB", "--license", "mit"]
    done = command("smol-post", "release", chain[1] / "merge", out, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(out))}: \d+ files, [\d.]+ MB\n", done.stdout)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    return out


def test_a_release_holds_the_model_its_card_its_recipe_and_its_report(released: Path, chain: Chain) -> None:
    about = read(released / "release.json")
    found = {one.relative_to(released).as_posix() for one in released.rglob("*") if one.is_file()}
    assert found == {*about["files"], "release.json"}
    assert all(manifest.digest_file(released / name) == one for name, one in about["files"].items())
    assert {one.split("/")[0] for one in found if "/" in one} == {"recipe", "report", "yarn"}
    assert {one for one in found if "model-0" in one} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert (released / "recipe" / "sft.yaml").read_bytes() == (chain[0] / "sft.yaml").read_bytes()
    assert [one["run"] for one in about["chain"]][-1] == "merge"
    assert about["source"]["digest"] == read(chain[1] / "merge" / "manifest.json")["digest"]
    assert "me@" not in (released / "README.md").read_text()


READS = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, found = sys.argv[1], []
tokenizer = AutoTokenizer.from_pretrained(folder)
chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+30? caf\\u00e9  1234"}]
for variant in ("plain", "yarn"):
    config = AutoConfig.from_pretrained(folder, **({"subfolder": "yarn"} if variant == "yarn" else {}))
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    rotary = model.model.rotary_emb
    for options in ({}, {"enable_thinking": False}, {"xml_tools": [{"name": "f"}]}, {"python_tools": ["f"]}):
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, date_string="today", return_dict=True,
            return_tensors="pt", **options)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append([variant, sorted(inputs), inputs["input_ids"].tolist(), logits.tolist(), made.tolist(),
                      rotary.inv_freq.tolist(), rotary.attention_scaling, config.max_position_embeddings])
ends = model.generation_config
said = [ends.eos_token_id, ends.do_sample, ends.temperature, ends.top_p, str(model.dtype),
        tokenizer.eos_token, tokenizer.pad_token, tokenizer.all_special_tokens]
print(json.dumps([transformers.__version__, said, found]))
"""


def test_transformers_4_53_reads_the_same_model_as_5(
    released: Path, beside: Callable[..., Path], environment: dict[str, str]
) -> None:
    answers = []
    for site in ([], [str(beside("transformers-4.53", *OLD))]):
        paths = ":".join([*site, environment["PYTHONPATH"]])
        words = [sys.executable, "-c", READS, released]
        done = subprocess.run(words, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    (new, said, found), (old, said_before, before) = answers
    assert (new.split(".")[0], old) == ("5", "4.53.3")
    assert said == said_before
    for one, other in zip(found, before, strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], rel=1e-5, abs=1e-6)
        assert one[4:] == other[4:]
    theta = {round(one[5][1] ** (-8 / 2)) for one in found if one[0] == "plain"}
    assert theta == {1_500_000}
    assert {one[7] for one in found if one[0] == "yarn"} == {CONTEXT}


def test_a_card_s_snippets_run(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of the card, in order, from the folder that the release lies in."""
    monkeypatch.chdir(released.parent)
    code = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    assert len(code) == 4
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(code).replace("max_new_tokens=512", "max_new_tokens=2"), space)
    assert space["model"].config.max_position_embeddings == CONTEXT
    prompt = space["tokenizer"].apply_chat_template(
        space["question"], tokenize=False, xml_tools=[space["weather"]]
    )
    assert '"name": "get_weather"' in prompt


# What users of SmolLM3 copy from its model card (Apache 2.0), verbatim but for the model's name, the device,
# max_new_tokens and `**inputs`: apply_chat_template returns a mapping today.
SNIPPETS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = "tiny"
device = "cpu"  # for GPU usage or "cpu" for CPU usage

# load the tokenizer and the model
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(
    model_name,
).to(device)

# prepare the model input
prompt = "Give me a brief explanation of gravity in simple terms."
messages_think = [
    {"role": "user", "content": prompt}
]

text = tokenizer.apply_chat_template(
    messages_think,
    tokenize=False,
    add_generation_prompt=True,
)
model_inputs = tokenizer([text], return_tensors="pt").to(model.device)

# Generate the output
generated_ids = model.generate(**model_inputs, max_new_tokens=4)

# Get and decode the output
output_ids = generated_ids[0][len(model_inputs.input_ids[0]) :]
print(tokenizer.decode(output_ids, skip_special_tokens=True))
---
prompt = "Give me a brief explanation of gravity in simple terms."
messages = [
    {"role": "system", "content": "/no_think"},
    {"role": "user", "content": prompt}
]

text = tokenizer.apply_chat_template(
    messages,
    tokenize=False,
    add_generation_prompt=True,
)
---
prompt = "Give me a brief explanation of gravity in simple terms."
messages = [
    {"role": "user", "content": prompt}
]

text = tokenizer.apply_chat_template(
    messages,
    tokenize=False,
    add_generation_prompt=True,
    enable_thinking=False
)
---
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint = "tiny"

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint)

tools = [
    {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city to get the weather for"}}}}
]

messages = [
    {
        "role": "user",
        "content": "Hello! How is the weather today in Copenhagen?"
    }
]

inputs = tokenizer.apply_chat_template(
    messages,
    enable_thinking=False, # True works as well, your choice!
    xml_tools=tools,
    add_generation_prompt=True,
    tokenize=True,
    return_tensors="pt"
)

outputs = model.generate(**inputs, max_new_tokens=4)
print(tokenizer.decode(outputs[0]))
---
prompt = "Give me a brief explanation of gravity in simple terms."
messages = [
    {"role": "system", "content": "Speak like a pirate./think"},
    {"role": "user", "content": prompt}
]

text = tokenizer.apply_chat_template(
    messages,
    tokenize=False,
    add_generation_prompt=True,
)
"""  # noqa: E501


def test_the_snippets_of_smollm3_s_card_run_on_a_release(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(released.parent)
    thinks, flag, argument, tools, pirate = SNIPPETS.split("---\n")
    space: dict[str, Any] = {}

    def shown(code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, space)
        return said.getvalue()

    assert shown(thinks)
    assert "/think\n" in space["text"]
    assert space["text"].endswith("<|im_start|>assistant\n")
    for code in (flag, argument):
        shown(code)
        assert "Mode: /no_think\n" in space["text"]
        assert space["text"].endswith("<think>\n\n</think>\n")
    said = shown(tools)
    assert '<tools>\n{"name": "get_weather"' in said
    assert "Copenhagen?" in said
    assert "</think>" in said
    said = shown(tools.replace("xml_tools=tools", "python_tools=tools"))
    assert "## Python Tools\n" in said
    shown(pirate)
    assert "Speak like a pirate." in space["text"]
    assert "Mode: /think\n" in space["text"]


def test_transformers_serve_answers_in_both_modes(released: Path, environment: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place, path = ["--host", "127.0.0.1", "--port", str(port)], Path(sys.executable).with_name("transformers")
    server = subprocess.Popen([path, "serve", *place, "--device", "cpu"], env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip

    def ask(tail: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{tail}", data, {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))

    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                ask("/health")
                break
            time.sleep(0.2)
        assert server.poll() is None, server.stderr and server.stderr.read().decode()
        body = {"model": str(released), "messages": [{"role": "user", "content": "3+4?"}], "max_tokens": 3}
        think = ask("/v1/chat/completions", body)
        direct = ask("/v1/chat/completions", body | {"chat_template_kwargs": {"enable_thinking": False}})
    finally:
        server.terminate()
        server.communicate()
    for answer in (think, direct):
        assert isinstance(answer["choices"][0]["message"]["content"], str)
    assert think["usage"]["prompt_tokens"] != direct["usage"]["prompt_tokens"]


@pytest.fixture
def stand_in() -> Iterator[tuple[str, dict[str, dict[str, str]], list[str]]]:
    """(address, files by revision, calls): the routes of the Hub that an upload takes, on loopback."""
    stored: dict[str, dict[str, str]] = {}
    calls: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            here, path = f"http://127.0.0.1:{self.server.server_address[1]}", self.path.partition("?")[0]
            calls.append(f"{self.command} {path}")
            said: Any = {}
            if path == "/api/whoami-v2":
                said = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
            elif path == "/api/repos/create":
                said = {"url": f"{here}/me/tiny"}
            elif path == "/api/models/me/tiny":
                said = {"id": "me/tiny", "private": True}
            elif "/preupload/" in path:
                names = [one["path"] for one in json.loads(body)["files"]]
                said = {"files": [{"path": name, "shouldIgnore": False,
                                   "uploadMode": "lfs" if name.endswith(".safetensors") else "regular"}
                                  for name in names]}  # fmt: skip
            elif path.endswith("/objects/batch"):
                said = {"objects": [one | {"actions": {"upload": {"href": f"{here}/lfs/{one['oid']}"}}}
                                    for one in json.loads(body)["objects"]]}  # fmt: skip
            elif path.startswith("/lfs/"):
                assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            elif "/tree/" in path:
                said = [{"type": "file", "path": "model.safetensors", "oid": "0", "size": 1}]
            elif "/commit/" in path:
                self.commit(path.rpartition("/")[2], [json.loads(line) for line in body.splitlines()])
                said = {"commitUrl": f"{here}/me/tiny/commit/0", "commitOid": "0"}
            text = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text)

        def commit(self, revision: str, lines: list[dict[str, Any]]) -> None:
            files = stored.setdefault(revision, {"model.safetensors": "of an older release"})
            for line in lines:
                value = line["value"]
                if line["key"] == "deletedFile":
                    files.pop(value["path"])
                elif line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = "sha256:" + hashlib.sha256(content).hexdigest()
                elif line["key"] == "lfsFile":
                    files[value["path"]] = "sha256:" + value["oid"]

        do_GET = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", stored, calls
    server.shutdown()


def test_a_release_is_pushed_as_it_is_and_every_run_of_its_chain_as_a_branch(
    released: Path, chain: Chain, environment: dict[str, str], stand_in: Any
) -> None:
    address, stored, calls = stand_in
    words = ["--context", str(CONTEXT), "--shard-size", "100KB", "--license", "mit"]
    words += ["--push-to-hub", "me/tiny", "--private", "--revisions"]
    there = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    call = [PROGRAM, "release", chain[1] / "merge", released, *words]
    done = subprocess.run(call, env=environment | there, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{released}: kept, this very release; its card is that of me/tiny\n")
    assert 'model_name = "me/tiny"' in (released / "README.md").read_text()
    about = read(released / "release.json")
    main = stored.pop("main")
    assert main.pop("release.json") == manifest.digest_file(released / "release.json")
    assert main == about["files"]
    runs = ["base", "long_context_1", "mid", "sft", "apo_seed0", "apo_seed1", "merge_soup"]
    assert list(stored) == runs
    assert (
        stored["sft"]["chat_template.jinja"]
        == read(chain[1] / "sft" / "manifest.json")["files"]["chat_template.jinja"]
    )
    assert all("model-00001-of-00003.safetensors" in files for files in stored.values())
    assert not any("model.safetensors" in files for files in (main, *stored.values()))
    assert calls.index("POST /api/validate-yaml") < calls.index("POST /api/repos/create")


@pytest.fixture
def copy(chain: Chain, tmp_path: Path) -> Path:
    """The chain and its recipe, to be edited; the released run's folder."""
    shutil.copytree(chain[0], tmp_path / "recipe")
    shutil.copytree(chain[1], tmp_path / "runs", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "runs" / "merge"


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert release.release([str(one) for one in words]) == 2
    return capsys.readouterr().err


def test_a_run_short_of_its_gates_is_released_only_with_its_card_saying_so(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe" / "merge.yaml", tmp_path / "out"
    recipe.write_text(recipe.read_text() + "\ngates: {think_greedy: {min: 0.9}}\n")
    assert "its gates were not measured" in refused(capsys, copy, out)
    short = "think_greedy 0.000, wanted at least 0.9"
    gate = {"min": 0.9, "max": None, "value": 0.0, "stderr": 0.0, "passed": False}
    found = {"digest": read(copy / "manifest.json")["digest"], "passed": False, "short": [short]}
    found |= {"gates": {"think_greedy": gate}}
    manifest.write_json(copy.parent / "evals" / "gates_merge.json", found)
    assert f"falls short of its gates: {short}" in refused(capsys, copy, out)
    assert not out.exists()
    assert release.release([str(copy), str(out), "--despite-gates"]) == 0
    assert (
        f"It falls short of what its recipe demands**, and is released nevertheless: {short}"
        in (out / "README.md").read_text()
    )


def test_what_no_longer_is_what_it_was_made_from_is_not_released(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe" / "sft.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("num_steps: 6", "num_steps: 7"))
    assert "is stale (parent ../apo_seed0 is stale" in refused(capsys, copy, tmp_path / "out")
    recipe.write_text(text)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert "model.safetensors: has changed since the run ended" in refused(capsys, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_8_bit_weights_load_as_they_were_saved_and_the_card_says_what_they_cost(
    chain: Chain, beside: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    """The command itself loads them again and compares; torchao is no part of the tests' environment."""
    paths = f"{beside('torchao', 'torchao==0.18.0')}:{environment['PYTHONPATH']}"
    words = [PROGRAM, "release", chain[1] / "merge", tmp_path / "out", "--quantize", "int8"]
    done = subprocess.run(words, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    error = read(tmp_path / "out" / "release.json")["int8"]
    assert 0.001 < error["relative_error"] < 0.05
    assert error["same_token"] > 0.9
    sizes = [(tmp_path / "out" / name / "model.safetensors").stat().st_size for name in (".", "int8")]
    assert sizes[1] < 0.8 * sizes[0]
    config = read(tmp_path / "out" / "int8" / "config.json")
    assert (config["quantization_config"]["quant_method"], config["rope_theta"]) == ("torchao", 1.5e6)
    assert (
        f"logits differ by {100 * error['relative_error']:.1f} %"
        in (tmp_path / "out" / "README.md").read_text()
    )
