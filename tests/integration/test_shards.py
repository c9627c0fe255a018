"""Preparation in shards by the real command: killed and taken up again, queued with Slurm, trained on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from smol_post import manifest, preparation, runner

pytestmark = pytest.mark.slow


def prepared(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What `smol-post prepare` prints; it runs in this process, which has its imports."""
    code = preparation.prepare([*map(str, words)])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return path


def stores(run_root: Path) -> dict[str, Any]:
    """What lies in the caches, however many files hold the tokens; what is there, by address."""
    found: dict[str, Any] = {}
    for store in (run_root / "cache" / "documents").glob("*/"):
        ledger = json.loads((store / "ledger.json").read_text()) | {"seconds": 0}
        tokens = b"".join(path.read_bytes() for path in sorted(store.glob("tokens*.bin")))
        found[store.name] = (ledger, tokens, (store / "documents.bin").read_bytes())
    for packs in (run_root / "cache" / "packs").glob("*/"):
        found[packs.name] = [path.read_bytes() for path in sorted(packs.glob("*.arrow"))]
    return found


def test_a_run_prepared_in_shards_trains_the_same_weights(
    recipe_folder: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sources, one with bad rows and a part of it kept, by two processes."""
    rows = [{"text": f"row {number} " * (number % 7 + 3)} if number % 11 else {"text": 5}
            for number in range(400)]  # fmt: skip
    (recipe_folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [
        {"name": "needles", "generator": "needles", "num_rows": 100, "seed": 1},
        {"name": "mine", "path": "rows.jsonl", "keep_fraction": 0.7},
    ]
    recipe = edited(recipe_folder / "base.yaml", sources=sources, on_bad_rows="skip", num_steps=3)
    words = [recipe, "--run", "base", "--shards", "3", "--workers", "2", "--json"]
    told = prepared(capsys, *words, "--run-dir", tmp_path / "sharded")
    assert json.loads(told)["num_skipped_rows"] > 0
    found = []
    for root in (tmp_path / "whole", tmp_path / "sharded"):
        words = [str(recipe_folder), "--run-dir", str(root)]
        assert runner.stage_command("base", words, program="smol-post base", separate=False) == 0
        found.append(manifest.read_manifest(root / "base")["files"]["model.safetensors"])
    assert found[0] == found[1]
    assert stores(tmp_path / "whole") == stores(tmp_path / "sharded")
    assert len(list(tmp_path.glob("sharded/cache/documents/*/tokens-00002.bin"))) == 2


def test_a_killed_worker_ends_the_command_and_the_same_command_makes_the_rest(
    recipe_folder: Path, tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{"name": "needles", "generator": "needles", "num_rows": 4000, "seed": 1}]
    recipe = edited(recipe_folder / "base.yaml", sources=sources, max_tokens=512)
    words = [str(recipe), "--run", "base", "--run-dir", str(tmp_path / "runs"), "--shards", "4"]
    process = subprocess.Popen([sys.executable, "-m", "smol_post", "prepare", *words], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    whole: list[Path] = []
    while not whole and process.poll() is None:
        time.sleep(0.02)
        whole = [path.parent for path in (tmp_path / "runs").glob("cache/shards/*/0*/whole.json")]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error.startswith(
        "failed: a process that tokenised a shard died (out of memory?); what is whole is"
    )
    assert "Traceback" not in error
    parts = sorted(path.parent for path in (tmp_path / "runs").glob("cache/shards/*/0*/whole.json"))
    assert 0 < len(parts) < 4
    written = {part.name: (part / "tokens.bin").stat() for part in parts}
    prepared(capsys, *words)
    (store,) = (tmp_path / "runs" / "cache" / "documents").glob("*/")
    for name, stat in written.items():
        now = (store / f"tokens-{name}.bin").stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    prepared(capsys, *words[:-2], "--run-dir", tmp_path / "whole")
    assert stores(tmp_path / "runs") == stores(tmp_path / "whole")


SBATCH = """#!/bin/bash
id=$(($(ls $QUEUE | wc -l) + 1))
cp "${@: -1}" $QUEUE/$id.sh
echo Submitted batch job $id
"""


def test_shards_are_jobs_of_slurm_and_the_same_command_joins_them(
    recipe_folder: Path,
    tmp_path: Path,
    environment: dict[str, str],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cluster of one machine: sbatch queues, the test runs what the scheduler would, one task fails."""
    tokenizer.save_pretrained(tmp_path / "parent")
    runs = [{"name": "apo", "stage": "apo", "recipe": "apo.yaml", "parents": [str(tmp_path / "parent")]}]
    (recipe_folder / "pipeline.yaml").write_text(yaml.safe_dump({"runs": runs}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "queue").mkdir()
    tools = {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',  # srun -l -n 1 program ...
        "scontrol": "#!/bin/bash\necho localhost\n",
    }
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{environment['PATH']}")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    words = [recipe_folder / "apo.yaml", "--run-dir", tmp_path / "runs", "--shards", "2"]
    slurm = ["--executor", "slurm", "--partition", "cpu", "--time", "01:00:00", "--memory", "3"]
    slurm += ["--workers", "9"]

    def scheduled(number: int, task: int) -> None:
        """Run one task of the job of this number, as the scheduler would."""
        script = tmp_path / "queue" / f"{number}.sh"
        given = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost"}
        done = subprocess.run(["bash", script], env={**os.environ, **given}, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    told = prepared(capsys, *words, *slurm)
    assert told.splitlines()[-1].startswith("when these jobs are done, give the same command again")
    script = (tmp_path / "queue" / "1.sh").read_text()
    for line in ("partition=cpu", "time=01:00:00", "mem-per-cpu=3G", "array=0-1%9", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "--qos" not in script
    scheduled(1, 0)
    assert "with Slurm" in prepared(capsys, *words, *slurm)
    assert "--array=0-0%9\n" in (tmp_path / "queue" / "3.sh").read_text()  # 2: datatrove's sum of statistics
    scheduled(3, 0)
    assert prepared(capsys, *words, *slurm).startswith("apo (apo): 40 documents in 40 pairs")
    assert len(list((tmp_path / "queue").iterdir())) == 4
    prepared(capsys, *words[:-2], "--run-dir", tmp_path / "whole")
    assert stores(tmp_path / "runs") == stores(tmp_path / "whole")
