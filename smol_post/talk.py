"""`smol-post chat RUN`: a conversation in the terminal, in both modes, with tools.

    line --command or message--> messages --template, in the mode of this turn--> tokens --generate, streamed
    --> turn --tool_calls--> results, if a person says yes --> next turn, ... --> line

Every turn renders the whole conversation anew; what was said before stays as it was said.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smol_post import commands, manifest, messages, tool_calls, toolbox
from smol_post.chat import mode_of
from smol_post.messages import END_THINK, THINK
from smol_post.refusal import Refusal, did_you_mean
from smol_post.runner import EXIT_OK, Parser, refuse
from smol_post.tool_calls import Call

SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # the model card of SmolLM3-3B
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DIM, PLAIN = "\033[2m", "\033[0m"
HELP = """\
/think, /no_think   the mode of the turns that follow
/tools              the tools on offer
/system [TEXT]      show or set the system message
/save FILE          write the conversation as a row that a mixture reads (.jsonl, .json)
/load [FILE]        take up a saved conversation; without FILE the last one
/retry              ask the last message again
/reset              forget the conversation, but for the system message
/help, /quit        this; the end, as Ctrl-D
Ctrl-C stops an answer. A line that begins with a space is a message, whatever it says."""


def main(argv: list[str]) -> int:
    """Talk with a checkpoint until the input ends."""
    parser = Parser(prog="smol-post chat", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "model", metavar="RUN", help="a whole run, any checkpoint or released folder, or a Hub id[@revision]"
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of tools, called by <tool_call>"
    )
    parser.add_argument("--python-tools", type=Path, metavar="FILE", help="the same, called in Python")
    parser.add_argument("--yes", action="store_true", help="run commands of tools without asking")
    parser.add_argument("--max-tool-rounds", type=int, default=5, metavar="N", help="of one answer (5)")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of a turn (as many as there is room)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="(the checkpoint's own, else 0.6)")
    parser.add_argument("--top-p", type=float, metavar="P", help="(the checkpoint's own, else 0.95)")
    parser.add_argument("--greedy", action="store_true", help="the most likely token, always")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (another each time)")
    try:
        arguments = parser.parse_args(argv)
        _check(arguments)
        xml, python = (
            toolbox.load(path, python=path is arguments.python_tools)
            if path
            else toolbox.Toolbox([], {}, set())
            for path in (arguments.tools, arguments.python_tools)
        )
        folder = commands.find_model(arguments.model)
        Talk(folder, arguments, xml, python).listen()
    except Refusal as refusal:
        return refuse(refusal)
    return EXIT_OK


def _check(arguments: argparse.Namespace) -> None:
    """Refusal for numbers that make no sense, or go with no other."""
    limits = {"max_new_tokens": (1, 2**31), "max_tool_rounds": (0, 10_000), "seed": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise Refusal(f"--{name.replace('_', '-')}: found {value}, wanted {low} to {high}")
    if arguments.temperature is not None and not 0 < arguments.temperature <= 100:
        raise Refusal(f"--temperature: found {arguments.temperature}, wanted a number above 0; or --greedy")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise Refusal(f"--top-p: found {arguments.top_p}, wanted a share above 0, up to 1")
    if arguments.greedy and (arguments.temperature or arguments.top_p or arguments.seed is not None):
        raise Refusal("--greedy: takes no --temperature, --top-p or --seed; leave one out")


def state_folder() -> Path:
    """Where lines typed and the last conversation are kept, for this user alone."""
    root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "smol_post"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


class Talk:
    """A conversation with a model. Its notes go to standard error, what the model says to standard output."""

    def __init__(
        self, folder: Path, arguments: argparse.Namespace, xml: toolbox.Toolbox, python: toolbox.Toolbox
    ) -> None:
        """Load the checkpoint; Refusal where it has no chat template, or none with a place for the tools."""
        import torch

        from smol_post import model, vocabulary

        self.tokenizer = vocabulary.load_tokenizer(folder)
        self.template = self.tokenizer.chat_template
        if not isinstance(self.template, str):
            raise Refusal(f"{folder}: its tokenizer has no chat template, so it does not chat; train it to")
        self.has_modes = "enable_thinking" in self.template
        self.asked, self.at_terminal = arguments, sys.stdin.isatty()
        self.keeps = self.at_terminal  # lines typed and the last conversation
        self.mode = "think" if self.has_modes else "text"
        self.commands = xml.commands | python.commands
        self.variables: dict[str, Any] = messages.clean_variables(
            {"tools": xml.tools, "python_tools": python.tools}
        )
        if twice := xml.names & python.names:
            raise Refusal(
                f"{arguments.python_tools}: the name '{twice.pop()}' stands twice: --tools has it, too"
            )
        self._offer()
        self.messages: messages.Messages = []
        self.modes: list[str] = []  # that each message was said in
        self.pending = ""  # the message that was taken back, for /retry
        self.saved: set[Path] = set()
        special = {one.content for one in self.tokenizer.added_tokens_decoder.values() if one.special}
        self.reserved = re.compile("|".join(map(re.escape, sorted(special | {*messages.CONTROL_TOKENS}))))
        self.shows_special = bool(special & {THINK, END_THINK, "<tool_call>", "</tool_call>"})
        self.set_system(arguments.system)
        self.lm = model.load_model(
            folder,
            attn_implementation="sdpa",
            dtype=getattr(model.load_config(folder), "dtype", None) or torch.float32,
        ).eval()
        self._prepare(folder)

    def _offer(self) -> None:
        """Hold the tools against the template; Refusal where it has no place for them."""
        try:
            self.tools = tool_calls.offered(self.variables)
            self.shown = tool_calls.given(str(self.template), self.variables)
        except ValueError as error:
            raise Refusal(f"tools: {error}") from None

    def _prepare(self, folder: Path) -> None:
        """Where it runs and how it samples: by its own generation config, and what was asked instead."""
        import torch
        from transformers import GenerationConfig

        if torch.accelerator.is_available():
            self.lm.to(torch.accelerator.current_accelerator())  # pyright: ignore[reportArgumentType]
        if self.asked.seed is not None:
            torch.manual_seed(self.asked.seed)
        path = folder / "generation_config.json"
        own = manifest.read_json(path, remedy="mend the checkpoint") if path.is_file() else {}
        how = {key: own[key] for key in SAMPLING_KEYS if own.get(key) is not None} or dict(SAMPLING)
        given = {"temperature": self.asked.temperature, "top_p": self.asked.top_p}
        how |= {key: value for key, value in given.items() if value is not None}
        ids = self.tokenizer.get_vocab()
        ends = [own.get("eos_token_id"), self.tokenizer.eos_token_id, ids.get(messages.END_OF_TURN)]
        flat = [one for end in ends for one in (end if isinstance(end, list) else [end])]
        self.ends = sorted({one for one in flat if isinstance(one, int)})
        greedy = self.asked.greedy or how.get("temperature") == 0
        self.lm.generation_config = GenerationConfig(
            do_sample=not greedy,
            eos_token_id=self.ends or None,
            pad_token_id=(self.ends or [0])[0],
            **({} if greedy else {"top_k": 0} | how),
        )
        self.context = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None) or 2**31

    # lines

    def listen(self) -> None:
        """Take line after line until the input ends; what is wrong with one is said, and no more."""
        if self.at_terminal:
            self._remember_lines()
            note(f"{self.asked.model}: {self.mode}; /help tells more")
        while True:
            try:
                line = self.read(f"{self.mode}> ")
            except KeyboardInterrupt:
                if not self.at_terminal:
                    raise
                print()
                continue
            try:
                if line is None or not self.obey(line):
                    return
            except Refusal as refusal:
                note(str(refusal))
            except KeyboardInterrupt:
                note("stopped; the message is taken back, /retry asks it again")

    def read(self, prompt: str) -> str | None:
        """A line without its end; None at the end of the input."""
        try:
            if self.at_terminal:
                return input(prompt)
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            note(f"the line is no UTF-8 ({error.reason}) and is passed over")
            return ""

    def _remember_lines(self) -> None:
        """Lines of earlier chats by the arrow keys, and this one's for later."""
        import atexit
        import readline

        try:
            path = state_folder() / "chat_history"
            path.touch(mode=0o600)
            readline.read_history_file(path)
        except OSError as error:
            self.keeps = False
            note(f"nothing is kept of this chat: {error}")
            return
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, path)

    def obey(self, line: str) -> bool:
        """Do what a line asks; False where that is to end. Refusal where it cannot be done."""
        word, _, rest = line.partition(" ")
        if not line.strip():
            return True
        if not re.fullmatch(r"/\w+", word):
            self.ask(line.strip())
            return True
        known = {
            "/think": lambda: self.set_mode("think"),
            "/no_think": lambda: self.set_mode("no_think"),
            "/tools": self.show_tools,
            "/system": lambda: self.show_system(rest.strip()),
            "/save": lambda: self.save(rest.strip()),
            "/load": lambda: self.load(rest.strip()),
            "/retry": self.retry,
            "/reset": lambda: self.set_system(self.system()),
            "/help": lambda: note(HELP),
            "/quit": lambda: None,
        }
        if word not in known:
            raise Refusal(f"{word}: no such command{did_you_mean(word, list(known))}")
        known[word]()
        return word != "/quit"

    # commands

    def set_mode(self, mode: str) -> None:
        """The mode of the turns that follow."""
        if not self.has_modes:
            raise Refusal(f"/{mode}: this model's chat template knows no modes; it answers in the one it has")
        self.mode = mode

    def system(self) -> str:
        """The system message, without the flag of a mode; "" if there is none."""
        first = self.messages[:1]
        return str(first[0].get("content", "")) if first and first[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Begin anew with this system message; the flag of a mode in it sets the mode."""
        self.check_text(text)
        text = self._take_flag(text)
        self.messages = [{"role": "system", "content": text}] if text else []
        self.modes = [""] * len(self.messages)

    def _take_flag(self, system: str) -> str:
        """The text without the flag of a mode, which becomes the mode: there it would win over /think."""
        if not self.has_modes:
            return system
        try:
            self.mode = mode_of([{"role": "system", "content": system}], {}) or self.mode
        except ValueError as error:
            raise Refusal(str(error)) from None
        return re.sub(r"(?<!\S)/(no_)?think(?!\S)\s*", "", system).strip()

    def show_system(self, text: str) -> None:
        """Show the system message, or put another in its place; the conversation stays."""
        if not text:
            note(self.system() or "no system message")
            return
        kept, modes = self.messages[bool(self.system()) :], self.modes[bool(self.system()) :]
        self.set_system(text)
        self.messages += kept
        self.modes += modes

    def show_tools(self) -> None:
        """A line for every tool: what it takes, and what runs it."""
        for tool in self.tools.values():
            words = self.commands[tool.name].words if tool.name in self.commands else ["asks you"]
            takes = ", ".join(tool.parameters.get("properties", {}))
            note(f"{tool.name}({takes}): {' '.join(words)}{' (Python)' if tool.python else ''}")
        if not self.tools:
            note("no tools; give them with --tools FILE or --python-tools FILE")

    @property
    def last_mode(self) -> str:
        """The mode of the last turn."""
        return next(filter(None, reversed(self.modes)), self.mode)

    def row(self) -> dict[str, Any]:
        """The conversation as an SFT row in the mode of its last turn; turns of the other have weight 0."""
        said = [
            one | ({"weight": 0} if one["role"] == "assistant" and mode != self.last_mode else {})
            for one, mode in zip(self.messages, self.modes, strict=True)
        ]
        flag = {"enable_thinking": self.last_mode == "think"} if self.has_modes else {}
        return {"messages": said, "chat_template_kwargs": flag | self.variables}

    def save(self, name: str) -> None:
        """Write the conversation, and say so where no mixture would take it."""
        path = Path(os.path.expanduser(name))
        if path.suffix not in (".json", ".jsonl"):
            raise Refusal(f"/save {name}: wanted a file that ends in .jsonl or .json")
        if path.exists() and path.resolve() not in self.saved:
            raise Refusal(f"/save {name}: exists and is not of this chat; give another name")
        if not self.messages:
            raise Refusal("/save: nothing has been said yet")
        self._write(path)
        self.saved.add(path.resolve())
        note(f"saved {len(self.messages)} messages: {path}")
        if {*self.modes} - {"", self.last_mode}:
            note(f"as a row it is of mode {self.last_mode}; turns in the other have weight 0")

    def _write(self, path: Path) -> None:
        row = self.row()
        text = json.dumps([row] if path.suffix == ".json" else row, ensure_ascii=False)
        try:
            manifest.write_text(path, text + "\n")
        except (OSError, UnicodeEncodeError) as error:
            raise Refusal(f"{path}: cannot be written ({error}); give another name") from None

    def load(self, name: str) -> None:
        """Take up a row where it ends: a call of a tool is made, a question is answered."""
        path = Path(os.path.expanduser(name)) if name else state_folder() / "conversation.jsonl"
        try:
            if not path.is_file():
                raise ValueError("no such file")
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
            if not isinstance(found, dict):
                raise ValueError("wanted one row")
            said, variables = messages.clean_row(found)
            mode = mode_of(said, variables)
            tool_calls.given(str(self.template), variables)
            offered = tool_calls.offered(variables)
            for one in said:
                self.check_text(one.get("content", ""))
        except (OSError, ValueError, RecursionError) as error:
            raise Refusal(f"/load {path}: {error}; give a file that /save has written") from None
        if said[0]["role"] == "system":
            text = self._take_flag(said[0].get("content", ""))
            said = [{"role": "system", "content": text}, *said[1:]] if text else said[1:]
        self.messages, self.pending = said, ""
        self.mode = mode if mode and self.has_modes else self.mode
        other = {"think": "no_think", "no_think": "think"}.get(self.mode, "")
        self.modes = [other if one.pop("weight", 1) == 0 else self.mode for one in said]
        present = (
            {} if offered else {key: one for key, one in self.variables.items() if key in messages.TOOL_KEYS}
        )
        self.variables = present | {key: one for key, one in variables.items() if key != "enable_thinking"}
        self._offer()
        note(f"loaded {len(said)} messages; {self.mode}")
        start = len(said)
        if said and said[-1]["role"] != "system":
            self._follow(start, answer=said[-1]["role"] != "assistant")

    def retry(self) -> None:
        """Take the last message back and ask it again."""
        asked = [
            index for index, one in enumerate(self.messages) if one["role"] == "user" and self.modes[index]
        ]
        if not self.pending and not asked:
            raise Refusal("/retry: nothing has been asked yet")
        text = self.pending
        if not text:
            text = self.messages[asked[-1]]["content"]
            del self.messages[asked[-1] :], self.modes[asked[-1] :]
        self.ask(text)

    # turns

    def ask(self, text: str) -> None:
        """Say something to the model and let it answer; taken back where it cannot."""
        self.check_text(text)
        self.pending, start = text, len(self.messages)
        self._say({"role": "user", "content": text}, self.mode)
        self._follow(start)
        self.pending = ""

    def _say(self, message: dict[str, Any], mode: str) -> None:
        self.messages.append(message)
        self.modes.append(mode)

    def _follow(self, start: int, *, answer: bool = True) -> None:
        """Answer, make the calls of the answer, and so on; else all from `start` on is taken back."""
        try:
            for number in range(self.asked.max_tool_rounds + 1):
                ended = self._answer() if answer or number else True
                calls = self._calls(self.messages[-1]) if ended else []
                if not calls:
                    break
                if number == self.asked.max_tool_rounds:
                    note(f"stopped: {number} rounds of calls; --max-tool-rounds allows more")
                    break
                self._make(calls)
        except BaseException:
            del self.messages[start:], self.modes[start:]
            raise
        if self.keeps:
            self._write(state_folder() / "conversation.jsonl")

    def _answer(self) -> bool:
        """Generate one turn, shown as it comes; whether it ended by itself."""
        import torch

        prompt = self._render(self.messages, add_generation_prompt=True)
        ids: Any = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.context - len(ids)
        if room < 1:
            raise Refusal(
                f"the context is full: the conversation has {len(ids):,} tokens, the model takes "
                f"{self.context:,}; the message is taken back, /reset begins anew"
            )
        most = min(room, self.asked.max_new_tokens or room)
        opened = prompt.rstrip().endswith(THINK)
        with shown(self, opened=opened) as streamer, torch.no_grad():
            prompt_BT = torch.tensor([ids], device=self.lm.device)
            output = self.lm.generate(  # pyright: ignore[reportCallIssue]
                input_ids=prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                max_new_tokens=most,
                streamer=streamer,
            )
        made = output[0, len(ids) :].tolist()
        ended = bool(made) and made[-1] in self.ends
        text = str(
            self.tokenizer.decode(made[: len(made) - ended], skip_special_tokens=not self.shows_special)
        )
        text = f"{THINK}\n{text}" if opened else text
        if not ended:
            why = (
                "--max-new-tokens" if most < room else f"the context is full: {self.context:,} tokens; /reset"
            )
            note(f"cut after {len(made):,} tokens ({why})")
        self._say(self._message(text), self.mode)
        return ended

    def _render(self, said: messages.Messages, *, add_generation_prompt: bool = False) -> str:
        """A conversation as the template writes it in the present mode."""
        from jinja2 import TemplateError

        how: dict[str, Any] = self.shown | {"add_generation_prompt": add_generation_prompt}
        how |= {"enable_thinking": self.mode == "think"} if self.has_modes else {}
        try:
            return str(self.tokenizer.apply_chat_template(said, tokenize=False, **how))
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            raise Refusal(
                f"the chat template refuses the conversation ({error}); /reset begins anew"
            ) from None

    def _message(self, text: str) -> dict[str, Any]:
        """A turn as a message: with its calls as `tool_calls` where the template writes the same of them."""
        message = {"role": "assistant", "content": text}
        made = tool_calls.as_message(text, tool_calls.parse(text)) if self.tools else message
        with contextlib.suppress(Refusal):
            if "tool_calls" in made and text.strip() in self._render([*self.messages, made]):
                return made
        return message

    def _calls(self, message: dict[str, Any]) -> list[Call]:
        """The calls of a turn, checked; none where no tool is on offer."""
        python = any(one.python for one in self.tools.values())
        found = tool_calls.of_message(message, python=python) if self.tools else []
        return [tool_calls.check(one, self.tools) for one in found]

    def _make(self, calls: list[Call]) -> None:
        """Make the calls of a turn in order and tell the model: as tool, or, called in Python, as user."""
        results = [(one.python, self._result(one)) for one in calls]
        for content in [result for python, result in results if not python]:
            self._say({"role": "tool", "content": content}, "")
        if lines := [result for python, result in results if python]:
            self._say({"role": "user", "content": "\n".join(lines)}, "")

    def _result(self, call: Call) -> str:
        """What a call gives: its problem, what the command says, or what the person types."""
        if call.problem:
            note(f"a call that cannot be made: {printable(call.problem)}")
            return self._clean(f"error: {call.problem}")
        written = printable(f"{call.name}({messages.json_text(call.arguments)})")
        command = self.commands.get(call.name)
        if command is None:
            note(f"the model calls {written}")
            said = self.read("result> ")
            return self._clean("error: there is no result" if said is None else said)
        if self.asked.yes:
            note(f"running {written}")
        else:
            note(f"the model calls {written}: run {' '.join(command.words)}?")
            if (self.read("[y/N]> ") or "").strip().lower() not in ("y", "yes"):
                return "error: the call was not allowed"
        result = self._clean(toolbox.run(command, call.arguments))
        note(f"result: {printable(messages.short(result))}")
        return result

    def _clean(self, result: str) -> str:
        """A result, unless it holds what the tokenizer would take for the end of the turn or the like."""
        return _WITHHELD if self.reserved.search(result) else result

    def check_text(self, text: str) -> None:
        """Refusal for text with a special token in it, or that cannot be encoded."""
        if found := self.reserved.search(text):
            raise Refusal(f"the text holds the control token {found[0]}, encoded as one; take it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refusal("the text is not UTF-8; type it again") from None


_WITHHELD = "error: the result holds a control token and is withheld"


@contextlib.contextmanager
def shown(talk: Talk, *, opened: bool) -> Iterator[Any]:
    """A streamer that writes to standard output as tokens come, thoughts dimmed where a person reads."""
    from transformers import TextStreamer

    colours = sys.stdout.isatty()

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            for piece in re.split("(</?think>)", text):
                before = DIM if colours and piece == THINK else ""
                after = PLAIN if colours and piece == END_THINK else ""
                print(before + (printable(piece) if colours else piece) + after, end="", flush=True)

    print(DIM if colours and opened else "", end="")
    try:
        yield Streamer(talk.tokenizer, skip_prompt=True, skip_special_tokens=not talk.shows_special)
    finally:
        print(PLAIN if colours else "", flush=True)


def printable(text: str) -> str:
    r"""Text that does nothing to a terminal: no control or direction marks, which could draw another text.

    >>> printable("a\x1b[2Jb\n"), printable("\u202eevil")
    ('a\\x1b[2Jb\n', '\\u202eevil')
    """
    return "".join(
        one.encode("unicode_escape").decode()
        if (unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t")
        or unicodedata.bidirectional(one) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        else one
        for one in text
    )


def note(text: str) -> None:
    """A line to the person, which is no part of the answer."""
    print(text, file=sys.stderr, flush=True)
