"""A teacher behind an OpenAI-compatible server: bounded concurrency, rate limits, retries, giving up.

    connection errors, time-outs, 408, 409, 425, 429, 5xx   again, after 1, 2, 4 ... 60 s, or Retry-After
    401, 404, a 403 before any answer                       no use: the whole run ends, in one line
    other 4xx                                               of one request: its answer is that it failed

Nothing but failures for `give_up_seconds` ends the run as well; what was answered is in the journal.
"""

import asyncio
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from smol_post.asking import Request, called, with_thought
from smol_post.generate_config import Teacher
from smol_post.launch import say
from smol_post.refusal import Failure

RETRIED = (408, 409, 425, 429)
HOPELESS = (401, 404)
CUT = ("length", "content_filter", "abort", "error")  # finish reasons; the last two are vLLM's
LONGEST_WAIT = 60.0
_SAY_EVERY = 30.0  # seconds between lines about a server that fails
_FEW_TRIES = 4  # that a single request has, whatever becomes of the others


class Server:
    """One teacher; to be used within one event loop."""

    def __init__(self, name: str, teacher: Teacher, key: str) -> None:
        """Make the client; nothing is sent."""
        from openai import AsyncOpenAI

        self.name, self.teacher, self._key = name, teacher, key
        self._client = AsyncOpenAI(
            base_url=teacher.base_url, api_key=key, organization="", project="", max_retries=0,
            timeout=teacher.timeout_seconds,
        )  # fmt: skip
        self._slots = asyncio.Semaphore(teacher.concurrency)
        self._failing_since: float | None = None
        self._answered_at = 0.0
        self._said, self._not_before, self._next_slot = 0.0, 0.0, 0.0
        self._level, self._level_at = 0.0, time.monotonic()  # tokens of the last minute, leaking away
        self._mean = (0, 0)  # answers, and their tokens

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.close()

    async def ask(self, request: Request) -> dict[str, Any]:
        """The answer to one request, or {"failed": why} where the server will not have it.

        Raises Failure where no request has a chance, or none had for `give_up_seconds`.
        """
        import openai

        async with self._slots:
            first: float | None = None
            tries = 0
            while True:
                guess = await self._turn(request)
                start, wait = time.monotonic(), 0.0
                try:
                    async with asyncio.timeout(self.teacher.timeout_seconds):
                        made = await self._client.chat.completions.create(
                            model=request.body["model"],
                            messages=request.body["messages"],
                            extra_body={
                                key: one
                                for key, one in request.body.items()
                                if key not in ("model", "messages")
                            },
                        )
                    answer = read(made, request.prompt.mode)
                except openai.APIStatusError as error:
                    status, reason = (
                        error.status_code,
                        f"status {error.status_code}: {self._plain(said(error))}",
                    )
                    if status in HOPELESS or (
                        status == 403 and not self._answered_at
                    ):  # later: of one request
                        raise Failure(f"{self._where()}: {reason}; mend model, address or key") from None
                    if status < 500 and status not in RETRIED:
                        self._failing_since, self._answered_at = None, time.monotonic()  # it speaks
                        return {"failed": reason}
                    wait = retry_after(error.response.headers)
                except TimeoutError:
                    reason = f"no answer in timeout_seconds ({self.teacher.timeout_seconds:g})"
                except (openai.APIError, ValueError) as error:
                    reason = self._plain(f"{error} {error.__cause__ or ''}")
                else:
                    self._failing_since, self._answered_at = None, time.monotonic()
                    used = answer["tokens"] + answer["prompt_tokens"]
                    self._level += used - guess
                    self._mean = (self._mean[0] + 1, self._mean[1] + used)
                    return answer | {"seconds": round(time.monotonic() - start, 2)}
                self._level -= guess
                tries += 1
                first = first or time.monotonic()
                failed = await self._wait(reason, wait, tries=tries, first=first)
                if failed:
                    return {"failed": failed}

    async def _wait(self, reason: str, wait: float, *, tries: int, first: float) -> str | None:
        """Wait for the next try; why there is to be none for this request; Failure where for no request."""
        now, patience = time.monotonic(), self.teacher.give_up_seconds
        self._failing_since = self._failing_since or now
        backoff = min(self.teacher.backoff_seconds * 2 ** (tries - 1), LONGEST_WAIT) * random.uniform(0.75, 1)
        left = self._failing_since + patience - now
        if left <= 0 or wait > left:
            asked = f"; it asks to wait {wait:.0f} s" if wait else ""
            raise Failure(
                f"{self._where()}: nothing but failures for {patience - left:.0f} s ({reason}){asked}; "
                "what was answered is kept, the same command goes on from there"
            )
        if self._answered_at > first and now - first > patience and tries >= _FEW_TRIES:
            return f"given up after {tries} tries, while others were answered: {reason}"
        if wait:  # said to one, meant for all
            self._not_before = max(self._not_before, now + wait)
        if now - self._said > _SAY_EVERY:
            self._said = now
            say(f"{self._where()}: {reason}; trying again, for {left:.0f} s more at most", error=True)
        await asyncio.sleep(max(wait, min(backoff, left)))
        return None

    async def _turn(self, request: Request) -> float:
        """Wait for this request's turn under the limits; the tokens that it was taken to use."""
        guess = 0.0
        if (rate := self.teacher.requests_per_minute) is not None:
            slot = max(time.monotonic(), self._next_slot)
            self._next_slot = slot + 60 / rate
            await asyncio.sleep(slot - time.monotonic())
        if (rate := self.teacher.tokens_per_minute) is not None:
            number, total = self._mean
            guess = total / number if number else float(request.body["max_tokens"])
            while True:
                now = time.monotonic()
                self._level = max(0.0, self._level - (now - self._level_at) * rate / 60)
                self._level_at = now
                if self._level == 0 or self._level + guess <= rate:
                    break
                await asyncio.sleep(min(1.0, self._level * 60 / rate))
            self._level += guess
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)
        return guess

    def _where(self) -> str:
        return f"{self.name}: {self.teacher.model} at {self.teacher.base_url}"

    def _plain(self, text: str) -> str:
        """A reason in one line, without the key."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key != "none" else text)[:400]


def said(error: Any) -> str:
    """What a server said with a status; its whole body where that has no message for the client to find."""
    return error.message if " - " in error.message or not error.body else f"{error.message} - {error.body}"


def read(made: Any, mode: str) -> dict[str, Any]:
    """What a chat completion says; ValueError where it is none.

    A server that counts no tokens is taken to use one a four bytes.
    """
    choices = getattr(made, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise ValueError(f"found no chat completion: {str(made)[:100]}")
    message, finish = choices[0].message, choices[0].finish_reason
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    content = message.content or ""
    calls = [
        (one.function.name, one.function.arguments)
        for one in message.tool_calls or []
        if one.type == "function"
    ]
    text = "\n".join(filter(None, [content.strip(), called(calls)]))
    text = with_thought(text, thought if isinstance(thought, str) else None, mode)
    usage = made.usage
    return {
        "text": text,
        "ended": finish not in CUT,
        "tokens": usage.completion_tokens if usage else len(text.encode("utf-8", "replace")) // 4 + 1,
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "finish": finish,
    }


def retry_after(headers: Any) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 where there is none.

    >>> retry_after({"retry-after": "3"}), retry_after({}), retry_after({"retry-after": "soon"})
    (3.0, 0.0, 0.0)
    """
    text = headers.get("retry-after") or ""
    try:
        return max(0.0, min(float(text), 1e6))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
