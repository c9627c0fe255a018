"""The dataset card: the Hub's library reads its metadata back, and its numbers are the ledger's."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard, constants
from huggingface_hub.repocard import metadata_load

from smol_post import data_card

PAIR: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "2+3? ```json"}],
    "chosen": [{"role": "assistant", "content": "<think>\nsum\n</think>\n5", "weight": None}],
    "rejected": [{"role": "assistant", "content": "6" * 5000}],
    "chat_template_kwargs": {"enable_thinking": True},
    "source": "sums",
}
ABOUT: dict[str, Any] = {
    "name": "sums: pairs #1",
    "stage": "pairs",
    "file": "rows.jsonl",
    "recipe": {
        "stage": "pairs",
        "note": "see https://ann:pw@host/x",
        "decontaminate": {"n": 13, "suites": ["evals.yaml"], "paths": []},
    },
    "teachers": {
        "strong": {"model": "Qwen/Qwen3-32B", "temperature": 0.6, "extra_body": {}},
        "weak": {"checkpoint": "../sft|old", "temperature": 1.0},
    },
    "sources": {"sums": {"path": "org/sums", "revision": "abc123"}, "more": None},
    "ledger": {
        "rows": 1234,
        "kept": 1234,
        "rejected": {"unfinished": 17, "new_reason": 2},
        "sources": {"sums": {"kept": 1234, "unfinished": 17, "new_reason": 2}},
        "tokens": {"kept": 98765, "all": 100000},
        "contaminated": {"evals.yaml: turns": 3},
        "length_gap": {"chosen_mean": 50.25, "rejected_mean": 9.5, "chosen_longer": 0.91, "auc": 0.93},
    },
    "warnings": ["length alone tells chosen from rejected"],
    "versions": {"smol_post": "0.1.0"},
    "example": PAIR,
}


def test_the_card_is_one_that_the_hubs_library_reads_back(tmp_path: Path) -> None:
    path = data_card.write(tmp_path, ABOUT)
    card = DatasetCard.load(path)
    assert card.data.to_dict() == metadata_load(path)
    assert card.data.to_dict() == {
        "pretty_name": "sums: pairs #1",
        "task_categories": ["text-generation"],
        "size_categories": ["1K<n<10K"],
        "tags": ["synthetic", "conversational", "pairs"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "rows.jsonl"}]}],
    }
    assert yaml.safe_load(card.data.to_yaml()) == card.data.to_dict()
    assert card.text.count("\n# ") + card.text.startswith("# ") == 1


def test_the_folder_of_a_card_loads_as_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "ledger.jsonl").write_text('{"verdict": "kept"}\n')
    data_card.write(tmp_path, ABOUT)
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[0]["source"] == "sums"
    assert len(loaded) == 1


def test_the_numbers_of_the_ledger_stand_in_the_card(tmp_path: Path) -> None:
    said = data_card.write(tmp_path, ABOUT).read_text()
    for part in (
        "1,234 rows, 98,765 tokens of answers",
        "| strong | Qwen/Qwen3-32B | temperature 0.6 |",
        "| weak | ../sft&#124;old | temperature 1.0 |",
        "| sums | path org/sums, revision abc123 | 1,253 and 1,234 |",
        "| unfinished | 17 | cut, or a thought that never closes |",
        "| new_reason | 2 |  |",
        "share 13 words in a row",
        "| evals.yaml: turns | 3 |",
        "50.2 tokens in the mean, rejected ones 9.5",
        "in 91% of pairs",
        "AUC of 0.93",
        "**Warning:** length alone tells chosen from rejected.",
        "licences of the sources",
        "smol_post 0.1.0",
    ):
        assert part in said, part
    assert "ann:pw" not in said


def test_the_example_is_the_row_with_long_texts_cut(tmp_path: Path) -> None:
    said = data_card.write(tmp_path, ABOUT).read_text()
    shown = json.loads(said.split("```json\n")[1].split("\n```")[0])
    wanted = copy.deepcopy(PAIR)
    del wanted["chosen"][0]["weight"]
    wanted["rejected"][0]["content"] = "6" * 600 + " ..."
    assert shown == wanted


def test_the_card_says_who_wrote_the_answers(tmp_path: Path) -> None:
    assert "none by a person" in data_card.write(tmp_path, ABOUT).read_text()
    teachers = {"weak": ABOUT["teachers"]["weak"]}
    said = data_card.write(tmp_path, ABOUT | {"teachers": teachers}).read_text()
    assert "chosen ones are those of the sources" in said
    assert "none by a person" not in said


def test_reasons_of_pairs_say_of_which_answer_they_are(tmp_path: Path) -> None:
    ledger = ABOUT["ledger"] | {"rejected": {"rejected_wrong_mode": 3, "both_right": 2}}
    said = data_card.write(tmp_path, ABOUT | {"ledger": ledger}).read_text()
    assert "| rejected_wrong_mode | 3 | of the rejected answer: no thought in thinking mode" in said
    assert "| both_right | 2 | the rejected answer is right as well |" in said


def test_a_run_without_decontamination_says_so(tmp_path: Path) -> None:
    recipe = ABOUT["recipe"] | {"decontaminate": None}
    ledger = ABOUT["ledger"] | {"length_gap": None, "rejected": {}}
    said = data_card.write(tmp_path, ABOUT | {"recipe": recipe, "ledger": ledger, "warnings": []}).read_text()
    assert "Nothing was held against evaluation suites" in said
    assert "## Lengths" not in said
    assert "Warning" not in said


@pytest.mark.parametrize("status", [200, 400])
def test_the_card_is_what_the_hub_is_asked_to_validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The Hub's own rules are not at hand: a server here answers in its place."""
    asked: list[Any] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        card = DatasetCard.load(data_card.write(tmp_path, ABOUT))
        if status == 200:
            card.validate()
        else:
            with pytest.raises(ValueError):  # noqa: PT011
                card.validate()
    finally:
        server.shutdown()
        server.server_close()
    ((path, body),) = asked
    assert path == "/api/validate-yaml"
    assert body == {"repoType": "dataset", "content": str(card)}
