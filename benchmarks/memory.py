"""What `smol-post plan` predicts of memory, beside what training needs (`training_memory`): 135M parameters.

python -m benchmarks.run training_memory      10 to 20 minutes, up to 8 GB
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import Call, Numbers, Result

REPO = Path(__file__).parents[1]
# name -> stage, tokens of a pack (of a micro-batch of pairs), checkpointing
SETTINGS: dict[str, tuple[str, int, bool]] = {
    "sft_1024": ("sft", 1024, False),
    "sft_1024_checkpointed": ("sft", 1024, True),
    "sft_4096": ("sft", 4096, False),
    "sft_4096_checkpointed": ("sft", 4096, True),
    "apo_2048": ("apo", 2048, False),
    "apo_2048_checkpointed": ("apo", 2048, True),
}
# SmolLM2-135M (its config.json) with a tokenizer of few words: rows of the embedding are what counts.
SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
_MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from smol_post import vocabulary
torch.manual_seed(0)
folder, sizes = sys.argv[1], json.loads(sys.argv[2])
LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(folder)
vocabulary.tiny_tokenizer(vocab_size=768, seed=0, date_string="01 July 2025").save_pretrained(folder)
"""
# What a stage has done before it loads weights; then its resident memory.
_START = """
import sys
from pathlib import Path
import psutil
from smol_post import runner, sft, apo, model, training, vocabulary
vocabulary.load_tokenizer(Path(sys.argv[1]))
print(psutil.Process().memory_info().rss)
"""


def training_memory(
    work: Path,
    *,
    call: Call,
    repetitions: int = 1,
    sizes: dict[str, Any] | None = None,
    settings: dict[str, tuple[str, int, bool]] | None = None,
    verify: str = "off",
) -> Result:
    """Two steps of the real commands at every setting; growth of resident memory above start-up."""
    parent = work / "parent"
    _python("-c", _MAKE, str(parent), json.dumps(sizes or SIZES))
    start = float(_python("-c", _START, str(parent)))
    samples: dict[str, list[Numbers]] = {}
    for name, (stage, num_tokens, checkpointed) in (settings or SETTINGS).items():
        folder = _recipe(work / name, parent, stage, num_tokens, checkpointed=checkpointed, verify=verify)
        samples[name] = [_measured(folder, stage, start) for _ in range(repetitions)]
    found = {name: each[0] for name, each in samples.items()}
    errors = {name: one["predicted_bytes"] / one["growth_bytes"] - 1 for name, one in found.items()}
    worst = max(map(abs, errors.values()))
    return Result(
        peer={f"{name}_gib": one["predicted_bytes"] / 2**30 for name, one in found.items()},
        ours={f"{name}_gib": one["growth_bytes"] / 2**30 for name, one in found.items()},
        ratio=0.15 / max(worst, 1e-9),
        bar=1.0,
        promises={"predicted within 15 %": worst <= 0.15},
        repetitions=repetitions,
        compared=(
            "peer is what `smol-post plan --json` says of the run (memory_gib.total), ours what the run "
            "needed: the last memory_bytes of its train_log.jsonl (ru_maxrss) less start_bytes, what a "
            "process has resident that has imported what the stage does and loaded the tokenizer. Two steps, "
            f"one process, two threads, float32, verify: {verify}. The ratio is 15 % over the largest "
            "deviation."
        ),
        samples=samples,
        extra={"start_bytes": start, "errors": errors},
    )


def _python(*words: str) -> str:
    """Run Python on the code under test; what it prints. RuntimeError where it fails."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{words[:2]}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return done.stdout


def _recipe(
    folder: Path, parent: Path, stage: str, num_tokens: int, *, checkpointed: bool, verify: str
) -> Path:
    """A pipeline of one run in `folder`."""
    folder.mkdir(parents=True)
    common = {"num_steps": 2, "num_threads": 2, "chat_template": "smol_post", "verify": verify}
    trainer = {"learning_rate": 0.001, "activation_checkpointing": checkpointed, "logging_steps": 1}
    source = {"name": "rows", "num_rows": max(300, num_tokens // 2), "seed": 1}
    if stage == "sft":
        sizes = {"max_tokens": num_tokens, "global_batch_size": 1}
        source["generator"] = "dual_mode_chats"
    else:
        sizes = {"max_tokens": 256, "global_batch_size": 32, "micro_batch_tokens": num_tokens}
        source["generator"] = "preference_pairs"
    recipe = {"stage": stage, **sizes, **common, "sources": [source], "trainer": trainer}
    run = {"name": "run", "stage": stage, "recipe": f"{stage}.yaml", "parents": [str(parent)]}
    for name, tree in ((f"{stage}.yaml", recipe), ("pipeline.yaml", {"runs": [run]})):
        (folder / name).write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return folder


def _measured(folder: Path, stage: str, start: float) -> Numbers:
    runs = folder / "runs"
    place = [str(folder), "--run-dir", str(runs)]
    _python(str(REPO / "smol_post" / f"{stage}.py"), *place)
    lines = (runs / "run" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    (planned,) = json.loads(_python("-m", "smol_post", "plan", *place, "--json"))["runs"]
    return {
        "growth_bytes": json.loads(lines[-1])["memory_bytes"] - start,
        "predicted_bytes": planned["memory_gib"]["total"] * 2**30,
    }
