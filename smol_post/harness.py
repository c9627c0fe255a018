"""Standard benchmarks: tasks of EleutherAI's lm-eval on a loaded checkpoint, in the modes asked.

    base      the text of the task as it is
    no_think  a chat with enable_thinking false
    think     a chat with enable_thinking true; only what follows the thought is scored

Metrics have lm-eval's names, task, metric and filter if it has a name, then the mode: `boolq_acc_base`,
`gsm8k_exact_match_strict-match_think`. Values and standard errors are lm-eval's too; num counts documents.
It has no error of a single document, nor of some tasks' own means: stderr is None there.
"""

import contextlib
import copy
import difflib
import functools
import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from smol_post import hub, scoring
from smol_post.evals_config import Harness
from smol_post.messages import END_THINK, THINK
from smol_post.refusal import Refusal, did_you_mean
from smol_post.scoring import TEMPLATE_ERRORS

try:
    import lm_eval
    import nltk
    from lm_eval.models import huggingface
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise Refusal(f"harness: lm-eval cannot be imported ({error}); pip install 'smol_post[eval]'") from None

HFLM: Any = huggingface.HFLM  # its decorators hide its type, and that of simple_evaluate
simple_evaluate: Any = lm_eval.simple_evaluate
Metrics = dict[str, dict[str, float | None]]  # name -> {"value", "stderr", "num"}, as of `scoring`
_manager = functools.cache(TaskManager)
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of we asked for, or refuse below


class Checkpoint(HFLM):
    """lm-eval's view of a model: chats by its own template, answers without thoughts, no text cut unasked.

    `chat_template_args` has enable_thinking in a chat, and is empty in mode base.
    """

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        """A chat as text. Where the template refuses, lm-eval's own would leave the system message out."""
        ends = {"add_generation_prompt": add_generation_prompt}
        how = {**ends, "continue_final_message": not add_generation_prompt, **self.chat_template_args}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)
        except TEMPLATE_ERRORS as error:
            raise Refusal(f"harness: the chat template takes no such chat ({error}); ask mode base") from None

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the task's stop strings, which stop nothing inside a thought."""
        asked = []
        for request in requests:
            prompt, how = request.args
            room = normalize_gen_kwargs(how, self.max_gen_toks).get("max_gen_toks", self.max_gen_toks)
            self._refuse_cut(len(self.tok_encode(prompt)) + room, f"{request.task_name}: prompt and answer")
            asked.append(copy.copy(request))
            if self.chat_template_args.get("enable_thinking"):
                asked[-1].arguments = (prompt, {**how, "until": []})
        texts = super().generate_until(asked, disable_tqdm)
        if not self.chat_template_args:
            return texts
        for index, request in enumerate(requests):
            prompt, how = request.args
            text = scoring.answer(texts[index], opened=prompt.rstrip().endswith(THINK))
            texts[index] = postprocess_generated_text(text, stop=how.get("until"), think_end_token=None)
        return texts

    def _loglikelihood_tokens(self, requests: Any, *rest: Any, **how: Any) -> Any:
        for (text, _), context_ids, choice_ids in requests:
            self._refuse_cut(len(context_ids) + len(choice_ids) - 1, f"{text[:30]!r}... and a choice")
        return super()._loglikelihood_tokens(requests, *rest, **how)

    def _refuse_cut(self, num_tokens: int, what: str) -> None:
        if num_tokens > self.max_length:
            raise Refusal(
                f"harness: {what} may take {num_tokens:,} tokens, the model has {self.max_length:,}; "
                "lower max_new_tokens or num_fewshot, or leave the task out"
            )


def find(asked: Harness) -> TaskManager:
    """The collection that has the tasks asked for; Refusal where one does not exist.

    lm-eval's own are 14,000, twenty seconds to list: not done where the recipe's folder has all.
    """
    if asked.include_path:
        own = _manager(include_path=asked.include_path, include_defaults=False)
        if set(asked.tasks) <= set(own.all_tasks):
            return own
    every = _manager(include_path=asked.include_path)
    for name in asked.tasks:
        if name not in every.task_index:
            near = difflib.get_close_matches(name, every.all_tasks, n=1)
            hint = did_you_mean(name, near) or "; `lm-eval ls tasks` lists them"
            raise Refusal(f"harness: tasks: lm-eval has no task '{name}'{hint}")
    return every


def load(asked: Harness) -> list[Any]:
    """Tasks and groups, data included; Refusal where data are not to be had or a mode makes no sense."""
    manager, loaded = find(asked), []
    for name in asked.tasks:
        try:
            with hub.refusing(f"harness: data of task {name}"), contextlib.chdir(asked.include_path or "."):
                found = manager.load([name])
        except (ImportError, LookupError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(f"harness: task {name} cannot be loaded ({reason}); mend or remove it") from None
        group = found.get("groups", {}).get(name)
        loaded += [group] if group else found["tasks"].values()
        for leaf, task in found["tasks"].items():
            if problem := _problem(task, asked):
                raise Refusal(f"harness: task {leaf} {problem}")
    return loaded


def _problem(task: Any, asked: Harness) -> str | None:
    if getattr(task, "UNSAFE_CODE", False):
        return "executes code that the model writes, which is not done here; remove it"
    if "ifeval" in task.task_name:
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:  # else found out when all answers are written
            return "counts sentences by nltk's punkt_tab; fetch it: python -m nltk.downloader punkt_tab"
    if "think" in asked.modes and (task.OUTPUT_TYPE != "generate_until" or task.config.gen_prefix):
        begun = f"begins the answer with {task.config.gen_prefix!r}" if task.config.gen_prefix else None
        return f"{begun or f'is of type {task.OUTPUT_TYPE}'}, so nothing is thought; ask base or no_think"
    if asked.num_fewshot and task.config.num_fewshot == 0:
        return "is defined without examples; remove num_fewshot"
    return None


def run(
    lm: PreTrainedModel, tokenizer: Tokenizer, asked: Harness, tasks: list, *, mode: str, date_string: str
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` returns for loaded tasks in one mode, its samples included."""
    how: dict[str, Any] = {"do_sample": False, "temperature": 0.0}
    if asked.temperature is not None:
        how = {"do_sample": True, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
    how |= {"max_gen_toks": asked.max_new_tokens} if asked.max_new_tokens else {}
    chat = {"enable_thinking": mode == "think", "date_string": date_string} if mode != "base" else {}
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    ours = {"tokenizer": tokenizer, "batch_size": asked.batch_size, "chat_template_args": chat}
    return simple_evaluate(
        Checkpoint(lm, backend="causal", **ours),
        tasks=tasks,
        task_manager=find(asked),
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        gen_kwargs=how,
        apply_chat_template=mode != "base",
        **dict.fromkeys(seeds, asked.seed),
    )


def modes(tokenizer: Tokenizer) -> list[str]:
    """How a checkpoint can be asked: as a base; in a chat if it has a template, in both modes if that has."""
    template = str(tokenizer.chat_template or "")
    return ["base", "think", "no_think"][: 1 + bool(template) + ("enable_thinking" in template)]


def evaluate(lm: PreTrainedModel, tokenizer: Tokenizer, asked: Harness, *, date_string: str) -> Metrics:
    """Metrics of one entry of a recipe; modes that a checkpoint lacks are absent."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special & {THINK, END_THINK}:
        raise Refusal(f"harness: {THINK} is a special token here, which decoding leaves out; make it plain")
    tasks, found = load(asked), Metrics()
    for mode in [mode for mode in asked.modes if mode in modes(tokenizer)]:
        found |= _metrics(run(lm, tokenizer, asked, tasks, mode=mode, date_string=date_string), mode)
    return found


def _metrics(found: dict[str, Any], mode: str) -> Metrics:
    """A group with a mean of its own stands for its tasks."""
    metrics = Metrics()
    inside = {task for group in found.get("groups", {}) for task in found["group_subtasks"][group]}
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, comma, by = key.partition(",")
            if comma and isinstance(value, Real) and task not in inside and not metric.endswith("_stderr"):
                error = numbers.get(f"{metric}_stderr,{by}")
                metrics["_".join([task, metric, *([by] if by != "none" else []), mode])] = {
                    "value": round(float(value), 4),
                    "stderr": round(float(error), 4) if isinstance(error, Real) else None,
                    "num": numbers["sample_len"],
                }
    return metrics
