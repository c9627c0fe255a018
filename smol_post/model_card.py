"""The card of a released model, from what its chain recorded and what was measured: README.md of a release.

Numbers are those of manifests and evals, with their standard errors; what was not measured, or of another
checkpoint, is not said. A license stands there if the person who releases gave one.
"""

from pathlib import Path
from typing import Any

from smol_post import inputs, manifest
from smol_post.lineage import Node
from smol_post.points import Point, metric_names
from smol_post.report import (
    DASH,
    PLUS_MINUS,
    Cell,
    Table,
    chain_table,
    gates_table,
    ledger_table,
    number,
    to_markdown,
)
from smol_post.strict import is_local, local_path

TITLES = {
    "base": "a small base model from nothing",
    "long_context": "long-context extension",
    "mid": "reasoning mid-training",
    "sft": "dual-mode supervised fine-tuning",
    "apo": "anchored preference optimisation",
    "merge": "merge",
}


def render(
    points: list[Point], tree: dict[str, Node], config: dict[str, Any], about: dict[str, Any], *, name: str
) -> str:
    """README.md: metadata that the Hub reads, then the card.

    points: the chain in order, the released run last. config: its config.json. about: of the release.
    """
    import jinja2
    from huggingface_hub import ModelCardData

    *_, point = points
    folder = tree["."].folder
    file = folder / "chat_template.jinja" if folder else Path()
    template = file.read_text("utf-8") if file.is_file() else ""
    parents = hub_parents(tree)
    datasets = sorted({one["path"] for _, one in _sources(points) if _on_hub(one)})
    modes = "enable_thinking" in template
    data = ModelCardData(
        base_model=parents[0] if len(parents) == 1 else parents or None,
        datasets=datasets or None,
        library_name="transformers",
        license=about["options"]["license"],
        pipeline_tag="text-generation",
        tags=["smol_post", *(["conversational"] * bool(template)), *(["reasoning"] * modes)],
    )
    folders = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    rules = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = jinja2.Environment(loader=folders, autoescape=False, **rules).get_template("model_card.md.jinja")
    return made.render(
        metadata=data.to_yaml(),
        name=name,
        config=config,
        about=about,
        point=point,
        parents=parents,
        local=[one.folder.name for one in tree.values() if one.folder and not one.manifest],
        modes=modes,
        chats=bool(template),
        tools="xml_tools" in template,
        tables={
            "chain": to_markdown(chain_table(points)),
            "stages": to_markdown(stage_table(points)),
            "sources": to_markdown(source_table(points, tree)),
            "modes": to_markdown(ledger_table(points, "mode")),
            "metrics": to_markdown(measured_table(point)) if not point.note else "",
            "gates": to_markdown(gates_table([point])) if point.gated else "",
        },
        merges=[sentence for one in points if (sentence := merge_sentence(one))],
        only_generated=all(one.get("generator") for _, one in _sources(points)),
        yarn_metrics=[one for one in metric_names([point]) if one.endswith("_yarn")],
        number=number,
    )


def hub_parents(tree: dict[str, Node]) -> list[str]:
    """`org/name` of the Hub's checkpoints that a run comes from, each once."""
    found = [node.name.partition("@")[0] for node in tree.values() if node.folder is None]
    return list(dict.fromkeys(found))


def _sources(points: list[Point]) -> list[tuple[Point, dict[str, Any]]]:
    recipes = [(point, point.manifest.get("recipe") or {}) for point in points]
    return [(point, one) for point, recipe in recipes for one in recipe.get("sources") or []]


def _on_hub(source: dict[str, Any]) -> bool:
    return bool(source.get("path")) and not is_local(source["path"])


def stage_table(points: list[Point]) -> Table:
    """How each run was trained: the few numbers that decide it."""
    columns = ["run", "stage", "updates", "tokens seen", "tokens a row", "rows an update", "learning rate",
               "besides"]  # fmt: skip
    rows = []
    for point in points:
        recipe, metrics = point.manifest.get("recipe") or {}, point.manifest.get("metrics") or {}
        trainer = recipe.get("trainer") or {}
        values = [metrics.get("num_steps"), metrics.get("num_tokens_seen"), recipe.get("max_tokens"),
                  recipe.get("global_batch_size"), trainer.get("learning_rate")]  # fmt: skip
        cells = [
            Cell(point.name),
            Cell(TITLES.get(point.stage, point.stage)),
            *map(Cell, map(number, values)),
        ]
        rows.append([*cells, Cell(", ".join(_besides(recipe)) or DASH)])
    return Table(columns, rows, num_text_columns=2)


def _besides(recipe: dict[str, Any]) -> list[str]:
    trainer, adapter = recipe.get("trainer") or {}, recipe.get("peft") or {}
    loss = trainer.get("loss_type")
    found = {
        "RoPE theta": recipe.get("rope_theta"),
        "loss": "+".join(loss) if isinstance(loss, list) else loss,
        "beta": trainer.get("beta"),
        "LoRA rank": adapter.get("r"),
        "packing": recipe.get("packing"),
        "loss on": recipe.get("loss_on"),
    }
    return [f"{name} {one if isinstance(one, str) else f'{one:g}'}" for name, one in found.items() if one]


def source_table(points: list[Point], tree: dict[str, Node]) -> Table:
    """Where the data of each run came from, who wrote it if `generate` made it, and how much there was."""
    rows, shown = [], ""
    folders = {"." if point is points[-1] else f"../{point.name}": point.name for point in points}
    folders = {name: tree[key].folder for key, name in folders.items() if key in tree}
    for point, source in _sources(points):
        revision = (point.counts().get("revisions") or {}).get(source["name"])
        counts = (point.counts().get("by_source") or {}).get(source["name"]) or {}
        values = map(counts.get, ("num_documents", "num_tokens", "num_trained_tokens"))
        label = "" if point.name == shown else point.name
        origin = _origin(source, revision) + _teachers(point, source, folders.get(point.name))
        rows.append([Cell(label), Cell(source["name"]), Cell(origin),
                     *map(Cell, map(number, values))])  # fmt: skip
        shown = point.name
    return Table(["run", "source", "from", "rows", "tokens", "trained tokens"], rows, num_text_columns=3)


def _origin(source: dict[str, Any], revision: Any) -> str:
    if source.get("generator"):
        return f"generated by program: {source['generator']}, seed {source.get('seed')}"
    place = [str(source["path"]), source.get("config"), source.get("split")]
    if not _on_hub(source):
        place = [f"local file {Path(source['path']).name}"]
    fraction = source.get("keep_fraction")
    text = " ".join(str(one) for one in place if one)
    text += f" at {str(revision)[:12]}" if isinstance(revision, str) else ""
    return text + (f", {fraction:g} of it" if fraction not in (None, 1) else "")


def _teachers(point: Point, source: dict[str, Any], run_dir: Path | None) -> str:
    """`, answers of Qwen/Qwen3-32B`, where the rows are still those that a generation beside them made.

    Of a teacher on this disk the folder's name alone.
    """
    if run_dir is None or not source.get("path") or _on_hub(source):
        return ""
    path = local_path(source["path"], inputs.located(run_dir, point.manifest, "recipe").parent)
    made = manifest.read_manifest(path.parent) if manifest.is_whole(path.parent) else {}
    trained = (point.manifest.get("inputs") or {}).get("files", {}).get(f"sources.{source['name']}")
    if trained is None or (made.get("made") or {}).get(path.name) != trained:
        return ""
    asked = [made["recipe"].get(key) or {} for key in ("teacher", "strong", "weak")]
    names = [str(one.get("model") or one.get("checkpoint")) for one in asked if one]
    return f", answers of {' and '.join(Path(one).name if is_local(one) else one for one in names)}"


def merge_sentence(point: Point) -> str:
    """`merge: 0.9 of the average of apo_seed0 and apo_seed1, 0.1 of long_context_1`; "" for no merge."""
    weights = (point.manifest.get("metrics") or {}).get("weights")
    if point.stage != "merge" or not weights:
        return ""
    *soup, last = point.parents
    of_soup = f"the average of {' and '.join(soup)}" if len(soup) > 1 else soup[0]
    return f"{point.name}: {weights[0]:g} of {of_soup}, {weights[1]:g} of {last}"


def measured_table(point: Point) -> Table:
    """Every metric of a checkpoint with its standard error and the number of questions."""
    rows = []
    for name in metric_names([point]):
        value, error = point.metric(name), point.metric(name, "stderr")
        text = "" if error is None else f"{PLUS_MINUS} {number(error)}"
        rows.append([Cell(name), Cell(number(value), text), Cell(number(point.metric(name, "num")))])
    return Table(["metric", "value", "questions"], rows)
