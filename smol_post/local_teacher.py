"""A teacher that is a checkpoint: answers in batches, by transformers, in this process."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smol_post import model, scoring, vocabulary
from smol_post.asking import Request, with_thought
from smol_post.generate_config import Teacher
from smol_post.refusal import Refusal

_OPENED = re.compile(r"<think>\s*\Z")  # what a template may write before the model thinks


class LocalTeacher:
    """A loaded checkpoint, in float32, on the GPU where there is one."""

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        """Load tokenizer and weights; Refusal where they cannot be had or know no chats."""
        self.teacher = teacher
        self.tokenizer = vocabulary.load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise Refusal(
                f"{folder}: its tokenizer has no chat template; take a checkpoint from mid-training on"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.lm = model.load_model(folder, attn_implementation="sdpa").eval().to(device)  # pyright: ignore

    def ask(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """The answers to a batch; drawn from a seed of its own: the same batch is answered alike."""
        found: dict[int, dict[str, Any]] = {}
        for mode in ("think", "no_think"):
            rows = [at for at, one in enumerate(requests) if one.prompt.mode == mode]
            for at, answer in zip(rows, self._of_mode([requests[at] for at in rows], mode), strict=True):
                found[at] = answer
        return [found[at] for at in range(len(requests))]

    def _of_mode(self, requests: list[Request], mode: str) -> list[dict[str, Any]]:
        if not requests:
            return []
        texts = [self._render(one) for one in requests]
        encoded: Any = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        body = requests[0].body
        longest = max(map(len, encoded))
        room = getattr(self.lm.config, "max_position_embeddings", None) or longest + body["max_tokens"]
        fits = [at for at, ids in enumerate(encoded) if len(ids) < room]
        said = scoring.generate(
            self.lm,
            self.tokenizer,
            [encoded[at] for at in fits],
            max_new_tokens=min(body["max_tokens"], room - max((len(encoded[at]) for at in fits), default=0)),
            batch_size=len(fits) or 1,
            temperature=body["temperature"] or None,
            top_p=body["top_p"],
            seed=int(requests[0].id[:8], 16),
        )
        answers = dict(zip(fits, said, strict=True))
        found, special = [], self.tokenizer.all_special_tokens
        for at, ids in enumerate(encoded):
            if at not in answers:
                found.append({"failed": f"its prompt has {len(ids)} tokens, the checkpoint takes {room}"})
                continue
            text, ended = answers[at]
            if wrote := next((one for one in special if one in text), None):
                found.append({"failed": f"it wrote the special token {wrote}, which no mixture takes"})
                continue
            number: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            text = ("<think>" if _OPENED.search(texts[at]) else "") + text
            found.append(
                {
                    "text": with_thought(text, None, mode),
                    "ended": ended,
                    "tokens": len(number) + ended,
                    "prompt_tokens": len(ids),
                    "finish": "stop" if ended else "length",
                }
            )
        return found

    def _render(self, request: Request) -> str:
        variables = dict(request.body["variables"])
        template = str(self.tokenizer.chat_template)
        if "xml_tools" in variables and "xml_tools" not in template:
            variables["tools"] = [*variables.get("tools", []), *variables.pop("xml_tools")]
        if "tools" in variables:
            variables["tools"] = [json.loads(one) for one in variables["tools"]]
        variables.setdefault("date_string", request.body["date_string"])
        return str(scoring.render(self.tokenizer, request.body["messages"], tokenize=False, **variables))
