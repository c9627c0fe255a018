"""A full disk stops a run in one line and leaves what was whole; with room, the same command goes on."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from smol_post import manifest

pytestmark = pytest.mark.slow
Chain = tuple[Path, Path]
InSmall = Callable[..., tuple[list[int], str]]
MEMORY = "unshare --user --map-root-user --mount"


@pytest.fixture
def in_small(tmp_path: Path, environment: dict[str, str]) -> InSmall:
    """Run a script in a namespace where `$DISK` is a small disk in memory; (exit codes, output)."""
    if subprocess.run([*MEMORY.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk in memory")
    disk = tmp_path / "disk"
    disk.mkdir()

    def call(script: str, *, megabytes: int) -> tuple[list[int], str]:
        codes = tmp_path / "codes"
        codes.write_text("")
        whole = f'mount -t tmpfs -o size={megabytes}m disk "$DISK"\n{FILL}{script}'
        done = subprocess.run(
            [*MEMORY.split(), "bash", "-uc", whole],
            env=environment | {"DISK": str(disk), "CODES": str(codes)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [int(code) for code in codes.read_text().split()], done.stdout + done.stderr

    return call


# fill: leave so many free KiB; await: until a file is there; code: write down how the last command ended.
FILL = r"""
fill() {
    free=$(df --output=avail -k "$DISK" | tail -1)
    dd if=/dev/zero of="$DISK/ballast" bs=1K count=$((free - $1)) status=none
}
await() { for ((n = 0; n < 6000; n++)); do [[ -e $1 ]] && break; sleep 0.01; done; }
code() { echo $? >> "$CODES"; }
"""


def one_line(output: str) -> str:
    """The line that says why, of the first of two commands."""
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert "the disk is full" in line
    assert "make room and give the same command again" in line
    return line


def test_a_disk_that_fills_up_before_a_save_keeps_the_checkpoints_and_the_rerun_ends_the_same(
    chain: Chain, in_small: InSmall, tmp_path: Path
) -> None:
    recipe, root = chain
    sft = f'smol-post sft "{recipe}/sft.yaml" num_steps=40 trainer.save_strategy=steps trainer.save_steps=8'
    codes, output = in_small(
        f"""
        cp -r "{root}/mid" "$DISK/"
        {{ {sft} --run-dir "$DISK"; code; }} & await "$DISK/sft/checkpoints/checkpoint-8/whole.json"
        fill 100
        wait
        cp -r "$DISK/sft" "{tmp_path}/full"
        rm "$DISK/ballast"
        {sft} --run-dir "$DISK"; code
        cp -r "$DISK/sft" "{tmp_path}/sft"
        mkdir "{tmp_path}/straight"; cp -r "{root}/mid" "{tmp_path}/straight/"
        {sft} --run-dir "{tmp_path}/straight"; code
        """,
        megabytes=60,
    )
    assert codes == [1, 0, 0], output
    assert "disk/sft: the disk is full" in one_line(output)
    left = sorted((tmp_path / "full" / "checkpoints").glob("checkpoint-*"))
    assert left
    assert [manifest.broken(one) for one in left] == [[]] * len(left)
    assert json.loads((tmp_path / "full" / "state.json").read_text())["status"] == "failed"
    made, straight = (manifest.verify(tmp_path / name) for name in ("sft", "straight/sft"))
    assert made["metrics"]["resumed_from_step"] >= 8
    assert made["digest"] == straight["digest"]


def test_a_disk_that_fills_up_while_data_are_prepared_leaves_no_half_of_them(
    chain: Chain, in_small: InSmall, tmp_path: Path
) -> None:
    recipe, root = chain
    sft = f'smol-post sft "{recipe}/sft.yaml" --run-dir "$DISK"'
    codes, output = in_small(
        f"""
        cp -r "{root}/mid" "$DISK/"
        fill 28
        {sft}; code
        cp -r "$DISK/cache" "{tmp_path}/cache"
        rm "$DISK/ballast"
        {sft}; code
        cp "$DISK/sft/manifest.json" "{tmp_path}/"
        """,
        megabytes=30,
    )
    assert codes == [1, 0], output
    assert "disk/cache/documents: the disk is full" in one_line(output)
    assert [path.suffix for path in (tmp_path / "cache" / "documents").iterdir()] == [".lock"]
    assert manifest.read_manifest(tmp_path)["digest"] == manifest.read_manifest(root / "sft")["digest"]


def test_a_disk_that_fills_up_in_evals_or_report_leaves_the_old_ones(
    chain: Chain, in_small: InSmall, tmp_path: Path
) -> None:
    recipe, root = chain
    kept = "{base,long_context_1,mid,sft,apo_seed0,apo_seed1,merge,report.html,report.md,metrics.json}"
    codes, output = in_small(
        f"""
        cp -r "{root}"/{kept} "$DISK/"
        cp "$DISK/report.html" "{tmp_path}/before.html"
        fill 8
        smol-post evals "{recipe}" --run-dir "$DISK" num_threads=4; code
        rm "$DISK/ballast"
        smol-post evals "{recipe}" --run-dir "$DISK"; code
        fill 8
        smol-post report "{recipe}" --run-dir "$DISK" 2> "{tmp_path}/report"; code
        cp "$DISK/report.html" "{tmp_path}/after.html"
        ls -A "$DISK" > "{tmp_path}/left"
        rm "$DISK/ballast"
        smol-post report "{recipe}" --run-dir "$DISK"; code
        """,
        megabytes=30,
    )
    assert codes == [1, 0, 1, 0], output
    assert "disk/evals: the disk is full" in one_line(output)
    assert "disk: the disk is full" in one_line((tmp_path / "report").read_text())
    assert (tmp_path / "after.html").read_bytes() == (tmp_path / "before.html").read_bytes()
    assert ".tmp" not in (tmp_path / "left").read_text()
