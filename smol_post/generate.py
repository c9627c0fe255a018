"""`smol-post generate`: prompts -> a teacher's answers -> rows that the mixtures read.

    smol-post generate traces --config recipes/smollm2-135m/traces.yaml

    sources --prompts--> requests --ASK--> answers.jsonl --SIFT--> rows, ledger, card --> manifest.json

Asking only adds to the journal, so a run that was killed goes on where it stood. Sifting is a function of
journal and recipe: other filters sift anew and ask nothing. Both play the same scripts over the same prompts.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from smol_post import (
    asking,
    chat,
    constraints,
    data_card,
    disk,
    inputs,
    judging,
    loading,
    locks,
    manifest,
    runner,
    scripts,
    sifting,
)
from smol_post.answering import Asking, Progress
from smol_post.asking import Prompt, Request
from smol_post.config import Source
from smol_post.generate_config import GENERATIONS, Generation, PairsRecipe, TurnsRecipe
from smol_post.journal import JOURNAL, Journal
from smol_post.launch import say
from smol_post.messages import Messages
from smol_post.plan import Job, Parent, check_names, default_run_root, resolve_parent
from smol_post.refusal import Failure, Refusal, did_you_mean
from smol_post.runner import EXIT_OK, refuse
from smol_post.scripts import Candidate, Script, Unit
from smol_post.sifting import Sift
from smol_post.strict import local_path

_ABOUT = (
    "Ask a teacher, and keep what passes: SFT rows (traces), preference pairs, conversations (turns).",
    "RUN_DIR/<recipe's name> gets answers.jsonl, answer by answer; at the end rows.jsonl or rows.parquet for "
    "a mixture, ledger.jsonl and ledger.json (what was left out, and why) and a dataset card. Killed "
    "anywhere, the same command goes on; with other filters or checks it sifts again and asks nothing.",
)


class Work:
    """A recipe made ready: its teachers found, its sources pinned, its judges built."""

    def __init__(self, recipe: Generation, job: Job) -> None:
        """Refusal where a checkpoint, source, key or library is not there; nothing is asked."""
        self.recipe, self.job = recipe, job
        self.folder = job.recipe_file.parent
        self.teachers = recipe.teachers()
        self.parents: dict[str, Parent] = {}
        self.keys: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            if teacher.checkpoint is not None:
                self.parents[name] = resolve_parent(job, teacher.checkpoint)
            else:
                _require_openai(job.recipe_file)
                self.keys[name] = asking.key_of(teacher, where=job.recipe_file)
        from smol_post import sources

        self.sources: list[tuple[Source, Any]] = [sources.pin(one, self.folder) for one in recipe.sources]
        self.suites = self._suites()
        self._check_kinds()

    def _suites(self) -> Any:
        """What finds the suite that a text is in, an index of n-grams; None where the recipe names none."""
        if self.recipe.decontaminate is None:
            return None
        from smol_post import overlap

        return overlap.Suites(self.recipe.decontaminate, self.folder)

    def _check_kinds(self) -> None:
        if isinstance(self.recipe, TurnsRecipe) and self.recipe.turns.kinds is not None:
            try:
                constraints.check_kinds(self.recipe.turns.kinds)
            except (ValueError, Refusal) as error:
                raise Refusal(f"{self.job.recipe_file}: turns: {error}") from None
        if any(check.kind == "constraints" for check in self.recipe.checks.values()):
            constraints.check_kinds(constraints.KINDS)  # so that lm-eval is there

    def find(self, text: str) -> str | None:
        """The suite that a text is in, if any."""
        return self.suites.find(text) if self.suites else None

    def seen(self) -> Any:
        """What remembers texts, from none on; None where copies are kept."""
        if self.recipe.deduplicate is None:
            return None
        from smol_post import overlap

        return overlap.Seen(self.recipe.deduplicate)

    def fingerprint(self) -> str:
        """What decides the outcome, as one digest: recipe, data, checkpoints, version, suites."""
        return manifest.digest_tree(
            [
                inputs.fingerprint(self.job, list(self.parents.values())),
                [pinned for _, pinned in self.sources],
                self._suites_digest(),
            ]
        )

    def _suites_digest(self) -> Any:
        one = self.recipe.decontaminate
        found = [local_path(path, self.folder) for path in ([*one.suites, *one.paths] if one else [])]
        for suite in found[: len(one.suites) if one else 0]:
            inner: Any = loading.load_recipe(suite)
            found += [Path(path) for path in inner.files()]
        return [manifest.digest_file(path) for path in found]

    def num_requests(self, journal: Journal) -> tuple[int, int]:
        """How many requests there are, at most, and how many of them are answered.

        Refusal where a row cannot be asked, before anything is.
        """
        turns = self.recipe.turns.num_turns if isinstance(self.recipe, TurnsRecipe) else 1
        samples = self.recipe.num_samples if turns > 1 else 1
        total = answered = num_rows = 0
        for unit in self.units():
            num_rows += 1
            if unit.script is None:
                continue
            script = unit.script()
            wave = next(script)
            total += len(wave) * turns * samples
            answered += sum(one.id in journal for one in wave)
            with suppress(StopIteration):
                while all(one.id in journal for one in wave):
                    wave = script.send([journal[one.id] for one in wave])
                    answered += sum(one.id in journal for one in wave)
        if not num_rows:
            raise Refusal(f"{self.job.recipe_file}: sources: found no row in any of them, wanted prompts")
        return total, answered

    @property
    def own_mode(self) -> bool:
        """Whether rows are asked in their own mode, since their own answers are chosen."""
        return isinstance(self.recipe, PairsRecipe) and self.recipe.strong is None

    def ask(self, teacher: str, prompt: Prompt, sample: int, *, messages: Messages | None = None) -> Request:
        """A request of one of the teachers."""
        known = self.teachers[teacher]
        model = self.parents[teacher].digest if known.checkpoint is not None else str(known.model)
        return asking.request(known, teacher, prompt, sample, model=model, messages=messages)

    def count(self) -> Callable[[str], int]:
        """Tokens of a text, by the weak checkpoint's tokenizer; of a server's, one a four bytes."""
        if "weak" not in self.parents:
            return lambda text: len(text.encode("utf-8", "replace")) // 4 + 1
        from smol_post import vocabulary

        tokenizer = vocabulary.load_tokenizer(self.parents["weak"].folder)
        return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1  # pyright: ignore

    def script(self) -> Callable[[Prompt], Script]:
        """What this kind of recipe asks of a prompt."""
        if isinstance(self.recipe, PairsRecipe):
            count = self.count() if self.own_mode else len
            return lambda prompt: scripts.pairs(self.recipe, prompt, self.ask, count)  # pyright: ignore
        if isinstance(self.recipe, TurnsRecipe):
            return lambda prompt: scripts.conversations(self.recipe, prompt, self.ask)  # pyright: ignore
        return lambda prompt: scripts.traces(self.recipe, prompt, self.ask)

    def units(self) -> Iterator[Unit]:
        """Every prompt in every mode, in the order of sources, rows and modes; the same at every call."""
        from smol_post import sources

        own_mode = self.own_mode
        script = self.script()
        for source, _ in self.sources:
            check = self.recipe.checks.get(source.name)
            if check and source.path:  # columns that no training reads
                extra = {name: name for name in check.columns() if name not in source.columns}
                source = source.model_copy(update={"columns": source.columns | extra})
            for raw in sources.read_rows(source, folder=self.folder):
                where = f"source '{source.name}': row {raw.number}"
                try:
                    row = sources.parse_row(raw.content, columns=source.columns)
                    found = list(asking.prompts(self.recipe, source.name, raw.number, row, own_mode=own_mode))
                    if check and self.recipe.on_bad_rows == "skip":
                        judging.make_check(check, row)
                except (ValueError, Refusal) as error:
                    if self.recipe.on_bad_rows == "refuse":
                        raise Refusal(f"{where}: {error}; mend the row, or set on_bad_rows: skip") from None
                    yield Unit(source.name, raw.number, None, "bad_row")
                    continue
                for mode, prompt in found:
                    reason = self._why_not(prompt) if prompt else "other_mode"
                    made = partial(script, prompt) if prompt and not reason else None
                    yield Unit(source.name, raw.number, mode, reason, prompt, made)

    def _why_not(self, prompt: Prompt) -> str | None:
        if isinstance(self.recipe, TurnsRecipe):
            if chat.mode_of(prompt.messages, {}) is not None:
                return "fixed_mode"
            if prompt.messages[-1]["role"] != "user":
                return "no_question"
        if self.own_mode and prompt.own is None:
            return "no_answer"
        if reason := asking.unaskable(prompt, self.teachers):
            return reason
        return "contaminated" if self.find(sifting.said(prompt)) else None


def play(script: Script, look_up: Callable[[str], Mapping[str, Any]]) -> list[Candidate]:
    """A script with answers that are there; KeyError where one is not."""
    wave = next(script)
    while True:
        try:
            wave = script.send([look_up(one.id) for one in wave])
        except StopIteration as end:
            return end.value


def _require_openai(where: Path) -> None:
    from importlib.util import find_spec

    if find_spec("openai") is None:
        raise Refusal(f"{where}: base_url: no openai here; pip install 'smol_post[generate]'")


def generate(argv: list[str]) -> int:
    """Make data by a teacher: traces, pairs or turns."""
    kinds = list(GENERATIONS)
    kind = argv[0] if argv and not argv[0].startswith("-") else None
    program = f"smol-post generate {kind if kind in kinds else '|'.join(kinds)}"
    runner.interrupt_on_sigterm()
    try:
        made = runner.parser(program, stage=None)
        made.description, made.epilog = _ABOUT
        arguments, pairs = runner.parse(made, argv[kind is not None :])
        if kind not in kinds:
            found = f" {kind}" if kind else ""
            hint = did_you_mean(kind, kinds) if kind else ""
            raise Refusal(f"generate{found}: wanted one of {', '.join(kinds)}{hint}")
        if arguments.recipe is None:
            raise Refusal(f"no recipe given; type: {program} --config recipes/smollm3/{kind}.yaml")
        path = Path(arguments.recipe)
        recipe: Any = loading.load_recipe(path, arguments=pairs)
        if recipe.stage != kind:
            raise Refusal(f"{path}: stage: found {recipe.stage}, wanted {kind}")
        check_names(recipe, path)
        root = Path(arguments.run_dir) if arguments.run_dir else default_run_root(path.parent)
        out = root / path.stem
        checkpoints = [one.checkpoint for one in recipe.teachers().values() if one.checkpoint]
        return make(recipe, Job(out.name, recipe, path, out, checkpoints))
    except Refusal as refusal:
        return refuse(refusal)
    except Failure as failure:
        return runner.fail(failure)
    except KeyboardInterrupt as stop:
        say("generate: interrupted; what was answered is kept, the same command goes on", error=True)
        return runner.interrupted(stop)


def make(recipe: Generation, job: Job) -> int:
    """Ask what is not answered yet, sift all of it, write the manifest; nothing where all is as it was."""
    work, out = Work(recipe, job), job.run_dir
    print_id = work.fingerprint()
    _check_place(out, recipe)
    if manifest.is_whole(out) and _as_it_was(out, print_id):
        say(f"{job.name}: whole already, kept: {out}")
        return EXIT_OK
    locks.check(out, what="a generation")
    total, answered = work.num_requests(Journal(out))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locks.take(out, what="a generation")
    except OSError as error:
        raise Refusal(f"{out}: cannot be made ({error.strerror}); choose another --run-dir") from None
    with lock, disk.watched(out):
        started = time.monotonic()
        (out / manifest.MANIFEST).unlink(missing_ok=True)
        journal = Journal(out).open()
        whom = ", ".join(str(one.base_url or one.checkpoint) for one in work.teachers.values())
        say(f"{job.name}: {whom}: {total:,} requests at most, {answered:,} of them answered before")
        progress = Progress(work, total)
        progress.known(answered)
        try:
            Asking(work, journal, progress).run()
        finally:
            progress.close()
            journal.close()
        summary = _sift(work, journal, out)
        _finish(work, out, print_id, summary, progress, time.monotonic() - started)
        (out / locks.LOCK).unlink()
    return EXIT_OK


def _check_place(out: Path, recipe: Generation) -> None:
    """Refusal where the folder holds anything but what this kind of recipe makes."""
    ours = {JOURNAL, locks.LOCK, manifest.MANIFEST, sifting.LEDGER, sifting.COUNTS, data_card.NAME}
    found = {path.name for path in out.iterdir()} if out.is_dir() else {"a file"} if out.exists() else set()
    alien = {
        name for name in found - ours if not name.startswith(f"{sifting.ROWS}.") and not name.endswith(".tmp")
    }
    made = manifest.read_manifest(out)["stage"] if manifest.MANIFEST in found and not alien else recipe.stage  # pyright: ignore
    if alien or made not in GENERATIONS:
        raise Refusal(f"{out}: exists and is no folder of ours; choose another --run-dir or remove it")
    if made != recipe.stage:  # pyright: ignore
        raise Refusal(f"{out}: holds {made}; choose another --run-dir or remove it")


def _as_it_was(out: Path, print_id: str) -> bool:
    old = manifest.read_manifest(out)
    return old["fingerprint"] == print_id and all(
        (out / name).is_file() and manifest.digest_file(out / name) == digest
        for name, digest in (old.get("made") or {"": ""}).items()
    )


def _sift(work: Work, journal: Journal, out: Path) -> dict[str, Any]:
    """Write rows, ledger and card; what `ledger.json` says."""
    rows = sifting.Rows(out, work.recipe.format, work.recipe.stage)  # pyright: ignore
    part = out / f"{sifting.LEDGER}.tmp"
    with part.open("w", encoding="utf-8") as ledger:
        sift = Sift(
            work.recipe,
            seen=work.seen(),
            find=work.find,
            write=rows.write,
            note=lambda entry: ledger.write(json.dumps(entry) + "\n"),
        )
        for unit in work.units():
            if sift.enough:
                break
            if unit.script is None:
                sift.skip(unit)
            elif unit.prompt is not None:
                sift.take(unit.prompt, play(unit.script(), journal.__getitem__))
    path = rows.finish()
    for other in out.glob(f"{sifting.ROWS}.*"):
        if other != path:
            other.unlink()
    manifest.sync(part)
    part.replace(out / sifting.LEDGER)
    summary = sift.summary()
    manifest.write_json(out / sifting.COUNTS, summary)
    recipe = work.recipe.model_dump()
    warning = sifting.length_warning(summary["length_gap"])
    data_card.write(
        out,
        {
            "name": work.job.name,
            "stage": recipe["stage"],
            "file": path.name,
            "recipe": recipe,
            "sources": {one.name: _origin(one, pinned) for one, pinned in work.sources},
            "ledger": summary,
            "warnings": [warning] if warning else [],
            "versions": manifest.versions(),
            "example": sift.example,
            "teachers": {name: _about(work, name) for name in work.teachers},
        },
    )
    return summary


def _origin(source: Source, pinned: Any) -> dict[str, Any]:
    """Where the prompts of a source come from, for the card."""
    known = {"path": source.path, "config": source.config, "split": source.split}
    return known | {
        "generator": source.generator,
        "revision": pinned if isinstance(pinned, str) else None,
        "digest": ", ".join(pinned) if isinstance(pinned, list) and len(pinned) == 1 else None,
    }


def _about(work: Work, name: str) -> dict[str, Any]:
    """A teacher for the card: which it is and how it is asked."""
    found = work.teachers[name].model_dump(exclude_none=True, exclude={"batch_size", "date_string"})
    return found | ({"digest": work.parents[name].digest} if name in work.parents else {})


def _finish(
    work: Work, out: Path, print_id: str, summary: dict[str, Any], progress: Progress, seconds: float
) -> None:
    """Write the card, and the manifest last; say how it went."""
    recipe, job = work.recipe, work.job
    made = [
        path
        for path in sorted(out.iterdir())
        if path.name.startswith((f"{sifting.ROWS}.", "ledger.", data_card.NAME))
    ]
    files = manifest.content_files(out)
    parents = [{"path": one.path, "digest": one.digest, "stage": one.stage} for one in work.parents.values()]
    manifest.write_manifest(
        out,
        {
            "schema": manifest.SCHEMA,
            "run": job.name,
            "stage": recipe.stage,  # pyright: ignore
            "recipe_file": str(job.recipe_file),
            "origin": inputs.origin(job),
            "recipe": recipe.model_dump(),
            "fingerprint": print_id,
            "parents": parents,
            "inputs": inputs.collect(job, {one.path: one.digest for one in work.parents.values()}),
            "data": {source.name: pinned for source, pinned in work.sources},
            "metrics": summary,
            "versions": manifest.versions(),
            "seed": recipe.seed,
            "seconds": round(seconds, 1),
            "finished": manifest.now(),
            "files": files,
            "made": {path.name: manifest.digest_file(path) for path in made},
            "digest": manifest.content_digest(files),
        },
    )
    rejected = ", ".join(f"{number:,} {reason}" for reason, number in summary["rejected"].items())
    asked = f"{progress.prompt_tokens:,} tokens in, {progress.tokens:,} out, cost {progress.cost:,.2f}"
    say(
        f"{job.name}: {summary['rows']:,} rows of {summary['kept']:,} kept; left out: {rejected or 'none'}; "
        f"asked {progress.num_requests:,} now, {progress.failed:,} failed, {asked}, {seconds:,.0f} s: {out}"
    )
    if gap := summary["length_gap"]:
        say(
            f"{job.name}: length: chosen {gap['chosen_mean']:.1f} tokens (median {gap['chosen_median']:g}), "
            f"rejected {gap['rejected_mean']:.1f} (median {gap['rejected_median']:g}), chosen longer in "
            f"{gap['chosen_longer']:.0%}, AUC {gap['auc']:.2f}"
        )
    for warning in (sifting.advice(summary), sifting.length_warning(gap)):
        if warning:
            say(f"{job.name}: {warning}", error=True)
