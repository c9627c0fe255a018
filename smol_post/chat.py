"""Chats to token ids: a dataset row and a template in, `input_ids` and which of them are trained out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smol_post.config import local_path
from smol_post.encoding import Intervals, encode
from smol_post.messages import (
    END_OF_TURN,
    REASONING_KEYS,
    TOOL_KEYS,
    Messages,
    Row,
    clean_row,
    clean_variables,
    function_of,
    json_text,
    short,
    split_pair,
)
from smol_post.refusal import Refusal

Mode = Literal["think", "no_think"]
Label = Literal["think", "no_think", "text"]  # text: a row without a mode, of a template that knows none

TEMPLATES = Path(__file__).parent / "templates"
TEMPLATE_NAMES = ("smol_post", "chatml")
_FLAG = re.compile(r"(?<!\S)(/think|/no_think|/system_override)(?!\S)")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A chat as token ids; the tokens of the intervals `trained` carry loss. `text` is what was encoded.

    >>> EncodedRow([5, 6, 7, 8], [(1, 3)], "text", "abcd").train_mask
    [0, 1, 1, 0]
    """

    input_ids: list[int]
    trained: Intervals
    mode: Label
    text: str

    @property
    def train_mask(self) -> list[int]:
        """1 where a token carries loss."""
        mask = [0] * len(self.input_ids)
        for start, stop in self.trained:
            mask[start:stop] = [1] * (stop - start)
        return mask


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference: the prompt up to where the model speaks, and two answers that end with `<|im_end|>`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    mode: Label


class _Chat(NamedTuple):
    """What a template is given of a row; the assistant turns `untrained` had weight 0."""

    messages: Messages
    variables: dict[str, Any]
    mode: Label
    untrained: tuple[int, ...] = ()


class _How(NamedTuple):
    """What rows are rendered with; `mode` is that of rows that name none."""

    template: str
    date_string: str
    mode: Mode | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()
    foreign: tuple[str, ...] = ()  # special tokens of the vocabulary that the template does not write


def load_template(name_or_path: str, *, folder: Path = Path()) -> str:
    """The text of a template: `smol_post`, `chatml`, or a .jinja file, relative to `folder` (the recipe's).

    Raises Refusal where there is no such template.
    """
    ours = name_or_path in TEMPLATE_NAMES
    path = TEMPLATES / f"{name_or_path}.jinja" if ours else local_path(name_or_path, folder)
    if path.suffix == ".jinja" and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}: found bytes that are no UTF-8 ({error}); save it as UTF-8") from None
    known = " or ".join(TEMPLATE_NAMES)
    raise Refusal(
        f"no chat template {name_or_path!r}: wanted {known}, or the path of an existing .jinja file"
    )


def render_chat(row: Row, *, template: str, date_string: str, mode: Mode | None = None) -> str:
    """A dataset row as the text a template makes of it, without a tokenizer; ValueError as `encode_chats`."""
    how = _How(template, date_string, mode)
    return _render([_chat(*clean_row(row), how)], how)[0][0]


def encode_chat(row: Row, tokenizer: Any, **how: Any) -> EncodedRow:
    """Render a row once and encode it, as `encode_chats` does.

    A token is trained where its text lies in a generation span of the template. A span begins where the
    generation prompt ends and closes after `<|im_end|>`; in no_think mode:

        <|im_start|> assistant \\n <think> \\n\\n </think> \\n  5  <|im_end|> \\n
             0           0      0     0      0       0      0   1      1       0
    """
    return encode_chats([row], tokenizer, **how)[0]


def encode_chats(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    loss_on: Literal["assistant", "all"] = "assistant",
    mode: Mode | None = None,
) -> list[EncodedRow]:
    """Every row rendered and encoded, in order, with one call of the tokenizer.

    `template` is a template's text (`load_template`), by default the tokenizer's own. `date_string` pins
    today's date in the metadata, unless the row brings its own. `loss_on="all"` trains every token. `mode`
    is that of rows that name none; a template that knows modes wants one of each row.

    Raises ValueError: what `clean_row` and the template refuse, no mode, text that the template loses, no
    assistant turn, an answer that begins elsewhere than generation would, a token across a span's border.
    A turn of weight 0 is rendered as any other, and carries no loss: it need not be what the mode would give.
    """
    how = _how(tokenizer, template, date_string, mode)
    chats = [_chat(*clean_row(row), how) for row in rows]
    rendered = _render(chats, how)
    if loss_on == "assistant":
        for chat, (text, spans) in zip(chats, rendered, strict=True):
            turns, prompt = _assistant_turns(chat, spans), _generation_prompt(how, chat.mode)
            if chat.untrained:
                kept = [at for at, i in enumerate(turns) if i not in chat.untrained]
                turns, spans[:] = [turns[at] for at in kept], [spans[at] for at in kept]
            for i, (start, _) in zip(turns, spans, strict=True):
                if not text.endswith(prompt, 0, start):
                    raise ValueError(
                        f"messages[{i}] (assistant): the answer begins {short(text[start:])} before "
                        f"generation would: in mode {chat.mode} it begins after {prompt!r}"
                    )
    elif any(chat.untrained for chat in chats):
        raise ValueError("weight: loss_on: all trains every token, the row has turns of weight 0; drop one")
    encoded = encode(rendered, tokenizer)
    return [
        EncodedRow(ids, [(0, len(ids))] if loss_on == "all" else trained, chat.mode, text)
        for chat, (text, _), (ids, trained) in zip(chats, rendered, encoded, strict=True)
    ]


def encode_pair(row: Row, tokenizer: Any, **how: Any) -> EncodedPair:
    """A preference row as ids, as `encode_pairs` makes them.

    The columns are `prompt` (absent, text, messages), `chosen` and `rejected` (text, messages). Where chosen
    and rejected hold the whole conversation, the messages they share are the prompt:

        prompt_ids    <|im_start|> user \\n 2+3? <|im_end|> \\n <|im_start|> assistant \\n
        chosen_ids    5 <|im_end|>
        rejected_ids  6 <|im_end|>
    """
    return encode_pairs([row], tokenizer, **how)[0]


def encode_pairs(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    date_string: str,
    template: str | None = None,
    mode: Mode | None = None,
) -> list[EncodedPair]:
    """Every preference row as ids, in order, with one call of the tokenizer.

    Raises ValueError: as `encode_chats`, no prompt, answers that are equal or are not one assistant turn, or
    an answer that does not continue the generation prompt (in no_think mode: it opens with its own thoughts).
    """
    how = _how(tokenizer, template, date_string, mode)
    chats, answered = [], []  # the prompt of each row; with its chosen answer, with its rejected answer
    for row in rows:
        prompt, *answers = split_pair(row)
        chats.append(_chat(prompt, clean_variables(row), how))
        answered += [chats[-1]._replace(messages=[*prompt, answer]) for answer in answers]
    texts: list[tuple[str, Intervals]] = [(text, []) for text, _ in _render(chats, how, prompt=True)]
    for chat, (text, spans) in zip(answered, _render(answered, how), strict=True):
        texts.append((text, spans[_assistant_turns(chat, spans).index(len(chat.messages) - 1) :]))
    encoded = list(encode(texts, tokenizer))
    answers, end_id = iter(encoded[len(chats) :]), tokenizer.convert_tokens_to_ids(END_OF_TURN)
    pairs = []
    for chat, (prompt_text, _), (prompt_ids, _) in zip(chats, texts, encoded, strict=False):
        both = []
        for name, (ids, [(start, stop)]) in zip(("chosen", "rejected"), islice(answers, 2), strict=True):
            if ids[:start] != prompt_ids:
                opening, end = tokenizer.decode(ids[start : min(stop, start + 8)]), prompt_text[-40:]
                raise ValueError(f"{name} begins {opening!r}, not where the generation prompt {end!r} ends")
            if ids[stop - 1] != end_id:
                raise ValueError(f"{name} does not end with one token {END_OF_TURN}: add it to the tokenizer")
            both.append(ids[start:stop])
        if both[0] == both[1]:
            raise ValueError("chosen and rejected are equal")
        pairs.append(EncodedPair(prompt_ids, both[0], both[1], chat.mode))
    return pairs


def prefix_mask(
    row: Row, tokenizer: Any, *, date_string: str, template: str | None = None, mode: Mode | None = None
) -> list[int]:
    """The train mask of a row found another way: by rendering prefixes, without generation spans.

    Assistant turn i is trained from the end of `messages[:i]` with a generation prompt, to the last
    `<|im_end|>` of `messages[:i + 1]`:

        <|im_start|>user\\n2+3?<|im_end|>\\n<|im_start|>assistant\\n
        <|im_start|>user\\n2+3?<|im_end|>\\n<|im_start|>assistant\\n5<|im_end|>\\n
        trained                                                -----------

    Raises ValueError where the render of a prefix is no prefix of the render.
    """
    how = _how(tokenizer, template, date_string, mode)
    chat = _chat(*clean_row(row), how)

    def render(num_messages: int, prompt: bool = False) -> str:
        return _render([chat._replace(messages=chat.messages[:num_messages])], how, prompt)[0][0]

    whole, turns = render(len(chat.messages)), []
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and i not in chat.untrained:
            before, turn = render(i, prompt=True), render(i + 1)
            turn = turn[: turn.rfind(END_OF_TURN) + len(END_OF_TURN)]
            if not (whole.startswith(before) and whole.startswith(turn)):
                raise ValueError(f"messages[{i}] (assistant): the render up to it is no prefix of the whole")
            turns.append((len(before), len(turn)))
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [int(any(start < right <= end for start, end in turns)) for _, right in encoding["offset_mapping"]]


def check_masks(rows: Iterable[Row], tokenizer: Any, **how: Any) -> None:
    """Holds the masks of `encode_chats` against `prefix_mask`; ValueError at the first token that differs.

    A chat that begins with an answer is passed over: there is no prefix to render before it.
    """
    rows, say = [row for row in rows if row["messages"][0]["role"] != "assistant"], ("not", "trained")
    for row, encoded in zip(rows, encode_chats(rows, tokenizer, **how), strict=True):
        masks = zip(encoded.input_ids, encoded.train_mask, prefix_mask(row, tokenizer, **how), strict=True)
        for i, (token, spans, prefixes) in enumerate(masks):
            if spans != prefixes:
                raise ValueError(
                    f"the template's generation spans and prefix rendering disagree at token {i} "
                    f"({tokenizer.decode(token)!r}): spans say {say[spans]}, prefixes say {say[prefixes]}"
                )


def mode_of(messages: Messages, variables: Mapping[str, Any], declared: Mode | None = None) -> Mode | None:
    """The leading system message's flag, else the row's `enable_thinking`, else what its source declares.

    >>> mode_of([{"role": "system", "content": "Be brief. /no_think"}], {"enable_thinking": True}, "think")
    'no_think'
    >>> mode_of([{"role": "system", "content": "Logs are in /thinking/no_think."}], {}, "think")
    'think'

    Raises ValueError where both flags stand.
    """
    flags = _flags(messages)
    if "/think" in flags and "/no_think" in flags:
        raise ValueError("messages[0] (system): both /think and /no_think; keep one")
    if "/think" in flags or "/no_think" in flags:
        return "think" if "/think" in flags else "no_think"
    if "enable_thinking" in variables:
        return "think" if variables["enable_thinking"] else "no_think"
    return declared


def _flags(messages: Messages) -> list[str]:
    """The words /think, /no_think and /system_override of a leading system message."""
    return _FLAG.findall(messages[0].get("content", "")) if messages[0]["role"] == "system" else []


def _how(tokenizer: Any, template: str | None, date_string: str, mode: Mode | None) -> _How:
    template = template or tokenizer.chat_template
    if not template:
        raise ValueError(
            "the tokenizer has no chat template; set chat_template: smol_post, chatml or a .jinja file"
        )
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    foreign = tuple(one.content for one in added if one.special and one.content not in template)
    return _How(template, date_string, mode, tuple(tokenizer.special_tokens_map.items()), foreign)


@lru_cache(maxsize=4)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _chat(messages: Messages, variables: dict[str, Any], how: _How) -> _Chat:
    """The chat with its mode, which the template is told; ValueError where it wants one and there is none."""
    mode = mode_of(messages, variables, how.mode)
    untrained = tuple(i for i, message in enumerate(messages) if message.pop("weight", 1) == 0)
    if mode is not None:
        return _Chat(messages, {**variables, "enable_thinking": mode == "think"}, mode, untrained)
    if "enable_thinking" in how.template:
        raise ValueError(
            "the row has no mode: give the row enable_thinking, or its system message the flag /think or "
            "/no_think, or set `mode:` of the source"
        )
    return _Chat(messages, variables, "text", untrained)


def _render(chats: Sequence[_Chat], how: _How, prompt: bool = False) -> list[tuple[str, Intervals]]:
    """The text of each chat, nothing lost, and its generation spans in characters; `prompt` to generate from.

    Chats of equal variables are rendered in one call: each call reads the whole template.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    alike: dict[str, list[int]] = {}
    for i, chat in enumerate(chats):
        alike.setdefault(repr(chat.variables), []).append(i)
    rendered: list[Any] = [None] * len(chats)
    for indices in alike.values():
        variables = {"date_string": how.date_string, **chats[indices[0]].variables}
        try:
            texts, spans = render_jinja_template(
                [chats[i].messages for i in indices],
                chat_template=how.template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **{**dict(how.special_tokens), **variables},
            )
        except (
            TemplateError,
            TypeError,
            AttributeError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ValueError(f"the chat template refuses the row: {error}") from None
        for i, text, marked in zip(indices, texts, spans, strict=True):
            _check_kept(chats[i], text)
            if found := _any_of(how.foreign).search(text):
                raise ValueError(f"the text holds the special token {found[0]}, encoded as one: take it out")
            rendered[i] = text, marked
    return rendered


def _check_kept(chat: _Chat, text: str) -> None:
    """ValueError where the template lost a part of the row.

    The parts of a message stand in order: within its turn, if the template heads turns with their roles, else
    after the message before.
    """
    position = 0
    for i, message in enumerate(chat.messages):
        header, end = f"<|im_start|>{message['role']}\n", len(text)
        start = text.find(header, position)
        if start >= 0:
            position, end = start + len(header), text.find(END_OF_TURN, start)
        for part in _parts(message, leading=i == 0):
            part = part.strip()
            found = text.find(part, position, end)
            if found < 0:
                raise ValueError(f"messages[{i}] ({message['role']}): the chat template lost {short(part)}")
            position = found + len(part)
    for key, value in chat.variables.items():
        parts = [value] if key == "custom_instructions" else []
        if key in TOOL_KEYS and "/system_override" not in _flags(chat.messages):
            parts = [
                tool if isinstance(tool, str) else str(function_of(tool).get("name", "")) for tool in value
            ]
        for part in parts:
            if part.strip() not in text:
                raise ValueError(f"{key}: the chat template lost {short(part)}")


def _parts(message: dict[str, Any], *, leading: bool) -> list[str]:
    """What must be in the text of a message: thoughts, content between think tags or flags, tool calls.

    >>> call = {"name": "f", "arguments": {"x": "y"}}
    >>> message = {"role": "assistant", "content": "<think>Hm</think>Look:", "tool_calls": [call]}
    >>> _parts(message, leading=False)
    ['', 'Hm', 'Look:', 'f', '{"x": "y"}']
    """
    parts = [message.get("content", "")]
    if message["role"] == "assistant":
        thoughts = dict.fromkeys(message[key] for key in REASONING_KEYS if key in message)
        parts = [*thoughts, *parts[0].replace("</think>", "<think>").split("<think>")]
    elif leading and message["role"] == "system":
        parts = _FLAG.split(parts[0])[::2]
    for call in message.get("tool_calls", ()):
        name, arguments = function_of(call)["name"], function_of(call).get("arguments") or ""
        parts += [json_text(name)[1:-1], arguments if isinstance(arguments, str) else json_text(arguments)]
    return parts


def _assistant_turns(chat: _Chat, spans: Intervals) -> list[int]:
    """Which messages are trained; ValueError unless there are some, and the template marks each."""
    roles = [message["role"] for message in chat.messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if not turns:
        raise ValueError(f"no assistant turn to train on: the roles are {', '.join(roles)}")
    if len(turns) == len(chat.untrained):
        raise ValueError("no assistant turn to train on: each has weight 0")
    if len(spans) != len(turns):
        found = f"the chat template marks {len(spans)} of {len(turns)} assistant turns"
        raise ValueError(f"{found}: wanted {{% generation %}} around each")
    return turns


@lru_cache(maxsize=32)
def _generation_prompt(how: _How, mode: Label) -> str:
    """What the template writes where the model is to speak: in no_think, with an empty think block."""
    variables = {} if mode == "text" else {"enable_thinking": mode == "think"}
    chats = [_Chat([{"role": "user", "content": "x"}], variables, mode)]
    (without, _), (text, _) = _render(chats, how)[0], _render(chats, how, prompt=True)[0]
    if text == without or not text.startswith(without):
        raise ValueError("the chat template adds nothing to the end of a chat for add_generation_prompt")
    return text[len(without) :]
