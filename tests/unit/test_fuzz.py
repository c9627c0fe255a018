"""Whatever a recipe or a row holds, it works or is refused in one printable line; `make fuzz` asks longer."""

import copy
import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smol_post import chat, loading, sources
from smol_post.config import Source
from smol_post.documents import Encoder
from smol_post.plan import check_names, make_plan
from smol_post.refusal import Refusal

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # of `make fuzz`; else a few, always the same
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))
RECIPES = [path for path in FILES if path.read_text().startswith("stage:") or "\nstage:" in path.read_text()]
FOLDERS = [path.parent for path in FILES if path.name == "pipeline.yaml"]
ODD = [
    *(
        "",
        " ",
        "1e-6",
        "yes",
        "off",
        "a\nb",
        "\x00",
        "\ud800",
        "\u2028",
        "~nobody/x",
        "../..",
        "/dev/null",
        "=",
    ),
    *("a" * 300, "${x}", "{{ x }}", "<|im_end|>", None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, 0.0),
    *(-0.5, 1e-300, 1e308, float("nan"), float("inf"), [], {}, [[]], {"": 1}, [None], {"a": {"b": [1]}}),
    {1: 2},
]
SNIPPETS = [
    *(
        ": ",
        "- ",
        "\n",
        "\n  ",
        "\t",
        "&a ",
        "*a",
        "<<: *a\n",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "|\n",
        ">-\n",
        "? ",
    ),
    *(
        "!!python/name:os.system ",
        "!!int ",
        "!!float ",
        "!!bool ",
        "!!timestamp ",
        "!!set ",
        "!!omap ",
        "!!binary ",
    ),
    *("%YAML 1.1\n", "---\n", "...\n", "\ufeff", "\x85", "\x07", "2025-13-01", "0x", "0b", "1:2:3", "12e9"),
    *(".inf", ".nan", "~", "=", "@", "stage: sft\n", "trainer: ", "sources: ", "a: "),
]
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
value = st.recursive(
    odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def is_line(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) < 2000


@contextmanager
def in_a_line() -> Iterator[None]:
    """Nothing but a Refusal may be raised within, of one printable line."""
    said = "fine"
    try:
        yield
    except Refusal as refusal:
        said = str(refusal)
    assert is_line(said)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node of a tree but its root."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [one for key, node in inner for one in [(*path, key), *places(node, (*path, key))]]


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with one to three nodes taken out, replaced, doubled, wrapped, or given a neighbour."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not (known := places(tree)):
            break
        *way, key = draw(st.sampled_from(known))
        node = tree
        for step in way:
            node = node[step]
        how = draw(st.sampled_from(["delete", "replace", "wrap", "key", "move", "value"]))
        if how == "delete":
            del node[key]
        elif how == "wrap":
            node[key] = draw(st.sampled_from([[node[key]], {"a": node[key]}, str(node[key])]))
        elif how == "move" and isinstance(node, dict):
            node[draw(st.sampled_from([f"{key}s", str(key).upper(), f" {key}"]))] = node.pop(key)
        elif how == "key" and isinstance(node, dict):
            node[draw(st.text(max_size=5))] = copy.deepcopy(draw(value))
        else:
            node[key] = copy.deepcopy(draw(value if how == "value" else odd))
    return tree


def loads(path: Path, text: str, arguments: list[str] | None = None) -> None:
    """The property of the recipe loader."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    with in_a_line():
        check_names(loading.load_recipe(path, arguments=arguments), path)


@cache
def tree_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(data=st.data())
def test_a_recipe_with_odd_keys_and_values_loads_or_is_refused_in_a_line(place: Path, data: Any) -> None:
    tree = data.draw(changed(tree_of(data.draw(st.sampled_from(RECIPES)))))
    loads(place / "r.yaml", yaml.safe_dump(tree, allow_unicode=data.draw(st.booleans())))


@fuzz
@given(data=st.data())
def test_a_recipe_with_odd_text_loads_or_is_refused_in_a_line(place: Path, data: Any) -> None:
    text = data.draw(st.sampled_from(RECIPES)).read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 30))
        between = data.draw(st.sampled_from([*SNIPPETS, text[at : at + 40], ""]) | st.text(max_size=5))
        text = text[:at] + between + text[at + length :]
    loads(place / "r.yaml", text)


@fuzz
@given(parts=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=6), max_size=40))
def test_any_text_is_a_recipe_or_is_refused_in_a_line(place: Path, parts: list[str]) -> None:
    loads(place / "r.yaml", "".join(parts))


@fuzz
@given(data=st.data())
def test_any_override_holds_or_is_refused_in_a_line(place: Path, data: Any) -> None:
    path = data.draw(st.sampled_from(RECIPES))
    known = [".".join(map(str, one)) for one in places(tree_of(path))]
    key = data.draw(
        st.sampled_from([*known, "peft", "sources.9", "trainer.beta", "..", ""]) | st.text(max_size=9)
    )
    end = data.draw(st.text(max_size=12) | st.sampled_from(SNIPPETS) | odd.map(repr))
    loads(place / "r.yaml", path.read_text(), [f"{key}={end}"])


@fuzz
@given(data=st.data())
def test_a_pipeline_with_odd_keys_and_values_is_planned_or_refused_in_a_line(place: Path, data: Any) -> None:
    folder = data.draw(st.sampled_from(FOLDERS))
    tree = data.draw(changed(tree_of(folder / "pipeline.yaml")))
    for path in [*place.glob("*.yaml"), *place.glob("*.jsonl")]:
        path.unlink()
    for path in (one for one in FILES if one.parent == folder):
        (place / path.name).write_bytes(path.read_bytes())
    (place / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    with in_a_line():
        make_plan(place, run_root=None, arguments=[])


CALL = {"name": "calc", "arguments": {"sum": "2+3"}}
CHATS: list[Any] = [
    {"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}],
     "enable_thinking": False},
    {"messages": [{"role": "system", "content": "Be brief. /think"}, {"role": "user", "content": "2+3?"},
                  {"role": "assistant", "content": "<think>\n2+3=5\n</think>\n5"},
                  {"role": "user", "content": "And 4?"},
                  {"role": "assistant", "reasoning_content": "9", "content": "9"}],
     "chat_template_kwargs": {"custom_instructions": "End with a dot."}},
    {"messages": [{"role": "user", "content": "2+3?"},
                  {"role": "assistant", "content": "",
                   "tool_calls": [{"type": "function", "function": CALL}]},
                  {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5"}],
     "chat_template_kwargs": {"enable_thinking": False, "xml_tools": [{"name": "calc"}],
                              "python_tools": ["def calc(sum: str) -> int: ..."]}},
    {"messages": [{"role": "user", "content": "2+3?"},
                  {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{\"x\": 1}"}]}],
     "enable_thinking": True,
     "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'},
    {"text": "2+3=5"},
    {"prompt": "2+3?", "completion": "5"},
]  # fmt: skip
PAIRS: list[Any] = [
    {"prompt": "2+3?", "chosen": "5", "rejected": "6", "enable_thinking": False},
    {"chosen": CHATS[0]["messages"],
     "rejected": [CHATS[0]["messages"][0], {"role": "assistant", "content": "6"}], "enable_thinking": True},
    {"prompt": CHATS[2]["messages"][:3], "chosen": [{"role": "assistant", "content": "5"}],
     "rejected": [{"role": "assistant", "tool_calls": [CALL]}],
     "chat_template_kwargs": {"enable_thinking": False, "xml_tools": [{"name": "calc"}]}},
]  # fmt: skip


def encodes(row: Any, tokenizer: Any, data: Any, *, pairs: bool) -> None:
    """The property of the encoder: among good rows, a row becomes documents or is named with a reason."""
    loss_on = "assistant" if pairs else data.draw(st.sampled_from(["assistant", "completion", "all"]))
    template = chat.load_template(data.draw(st.sampled_from(chat.TEMPLATE_NAMES)))
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template,
        date_string="01 July 2025",
        text_end="<|endoftext|>",
        loss_on=loss_on,
        mode=data.draw(st.sampled_from([None, "think"])),
        columns={},
        max_row_characters=10_000,
        pairs=pairs,
    )
    text = json.dumps(row)  # a table's row, too, has keys that are text
    content = json.loads(text) if data.draw(st.booleans()) else text.encode()
    good = (PAIRS if pairs else CHATS)[0]
    made = encoder.encode([sources.Raw(1, good, 0.5), sources.Raw(2, content, 1.0)], check=True)
    assert {*made.records["row"].tolist(), *(number for number, _ in made.bad_rows)} == {1, 2}
    assert len(made.tokens) == made.records["length"].sum()
    for _, reason in made.bad_rows:
        assert is_line(str(Refusal(reason)))


@fuzz
@given(data=st.data())
def test_an_odd_chat_or_text_becomes_a_document_or_is_a_bad_row(tokenizer: Any, data: Any) -> None:
    encodes(data.draw(changed(data.draw(st.sampled_from(CHATS)))), tokenizer, data, pairs=False)


@fuzz
@given(data=st.data())
def test_an_odd_pair_becomes_two_documents_or_is_a_bad_row(tokenizer: Any, data: Any) -> None:
    encodes(data.draw(changed(data.draw(st.sampled_from(PAIRS)))), tokenizer, data, pairs=True)


@cache
def whole(name: str) -> bytes:
    """A good file of rows."""
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        stream = io.BytesIO()
        pq.write_table(pa.table({"text": ["one", "two"], "enable_thinking": [True, None]}), stream)
        return stream.getvalue()
    text = json.dumps(CHATS) if ".jsonl" not in name else "\n".join(map(json.dumps, CHATS))
    return gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()


@fuzz
@given(data=st.data())
def test_a_damaged_file_of_rows_is_read_or_refused_in_a_line(place: Path, data: Any) -> None:
    name = data.draw(st.sampled_from(["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz", "r.parquet"]))
    content = whole(name)
    for _ in range(data.draw(st.integers(0, 3))):
        at, length = data.draw(st.integers(0, len(content))), data.draw(st.sampled_from([0, 1, 9, 10**6]))
        between = data.draw(st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b"\xff", b"\n", b"NaN"]))
        content = content[:at] + between + content[at + length :]
    (place / name).write_bytes(content)
    source = Source(name="s", path=name, keep_fraction=data.draw(st.sampled_from([1.0, 0.5])))
    with in_a_line():
        for span in [None, *sources.spans(source, folder=place, num_shards=2)]:
            for raw in sources.read_rows(source, folder=place, span=span):
                with suppress(ValueError, RecursionError):
                    sources.parse_row(raw.content, columns={})
