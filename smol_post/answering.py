"""The phase that fills the journal: servers all at once, then one checkpoint after another, with progress."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from smol_post import asking, runner
from smol_post.asking import Request
from smol_post.journal import Journal
from smol_post.launch import say
from smol_post.refusal import Failure, Refusal, Stopped
from smol_post.scripts import Candidate, Script, Unit
from smol_post.sifting import Sift

if TYPE_CHECKING:
    from smol_post.generate import Work

HOPELESS_AFTER = 10  # requests that a server will not have, with none that it answered
_LEAST_ROUND = 16  # prompts that several teachers are asked before it is looked whether they were enough
_SAY_EVERY = 30.0  # seconds between lines where there is no terminal


class Asking:
    """Whoever answers, each answer is written down at once."""

    def __init__(self, work: "Work", journal: Journal, progress: "Progress") -> None:
        """Nothing is asked yet."""
        self.work, self.journal, self.progress = work, journal, progress
        self._doubtful: list[dict[str, Any]] = []  # failed, before the server answered anything
        self._scout: Sift | None = None
        self._limit: int | None = None  # of units, in this round

    def run(self) -> None:
        """Ask the servers, all at once, then one checkpoint after another; what is known is not asked.

        Only the last of several knows when there are rows enough, so all are asked of some prompts first, and
        of twice as many while they are too few.
        """
        names = [name for name in self.work.teachers if name in self.work.parents]
        passes: list[Callable[[], None]] = [partial(self._local_pass, name) for name in names]
        if self.work.keys:
            passes.insert(0, self._server_pass)
        if self.work.recipe.num_rows is None:
            for one in passes:
                one()
            return
        if len(passes) > 1:
            self._limit = max(_LEAST_ROUND, 2 * self.work.recipe.num_rows)
        while True:
            self._scout = None
            for one in passes[:-1]:
                one()
            self._scout = Sift(self.work.recipe, seen=self.work.seen(), find=self.work.find)
            passes[-1]()
            if self._limit is None or self._scout.enough or self._num_units() < self._limit:
                return
            self._limit *= 2

    def _units(self) -> Iterator[Unit]:
        return islice(self.work.units(), self._limit)

    def _num_units(self) -> int:
        return sum(1 for _ in self._units())

    def _server_pass(self) -> None:
        stopped: list[int] = []

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None

            def stop() -> None:
                stopped.append(1)
                task.cancel()

            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
            await self._serve()

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            if not stopped:
                raise
            raise Stopped from None
        finally:
            runner.interrupt_on_sigterm()

    async def _serve(self) -> None:
        from smol_post.servers import Server

        teachers = self.work.teachers
        servers = {name: Server(name, teachers[name], key) for name, key in self.work.keys.items()}
        room = asyncio.Semaphore(2 * sum(teachers[name].concurrency for name in servers))
        under_way: dict[str, asyncio.Task[Mapping[str, Any]]] = {}
        done: dict[int, tuple[Unit, list[Candidate]]] = {}
        at = 0

        async def fresh(request: Request) -> Mapping[str, Any]:
            line = asking.about(request) | await servers[request.teacher].ask(request)
            self._keep(line, request)
            return line

        async def answer(request: Request, group: asyncio.TaskGroup) -> Mapping[str, Any] | None:
            if request.id in self.journal:
                return self.journal[request.id]
            if request.teacher not in servers:
                return None
            if request.id not in under_way:
                task = under_way[request.id] = group.create_task(fresh(request))
                task.add_done_callback(lambda _: under_way.pop(request.id, None))
            return await under_way[request.id]

        async def one_unit(number: int, unit: Unit, group: asyncio.TaskGroup) -> None:
            nonlocal at
            candidates: list[Candidate] | None = []
            if unit.script:
                candidates = await self._play(unit.script(), partial(answer, group=group))
            if self._scout and candidates is not None:
                done[number] = (unit, candidates)
                while at in done:
                    self._scouted(*done.pop(at))
                    at += 1
            room.release()

        try:
            async with asyncio.TaskGroup() as group:
                for number, unit in enumerate(self._units()):
                    await room.acquire()
                    if self._scout and self._scout.enough:
                        break
                    group.create_task(one_unit(number, unit, group))
        except BaseExceptionGroup as failed:
            raise _first(failed) from None
        finally:
            for server in servers.values():
                await server.close()
        self._flush()

    async def _play(self, script: Script, answer: Callable[[Request], Any]) -> list[Candidate] | None:
        """A script with a server's answers; None where it wants those of a checkpoint, which come later."""
        wave = next(script)
        while True:
            answers = await asyncio.gather(*(answer(one) for one in wave))
            if any(one is None for one in answers):
                return None
            try:
                wave = script.send(answers)
            except StopIteration as end:
                return end.value

    def _scouted(self, unit: Unit, candidates: list[Candidate]) -> None:
        assert self._scout is not None
        if unit.prompt is not None and unit.script is not None:
            self._scout.take(unit.prompt, candidates)

    def _keep(self, line: dict[str, Any], request: Request) -> None:
        """Write an answer down; a failure only once the server has answered something.

        Failure where it will have nothing at all: what is wrong then is no request's own fault, and asking
        again when it is mended must not find the requests done.
        """
        if "failed" in line and not self.journal.num_answered:
            self._doubtful.append(line)
            if len(self._doubtful) >= HOPELESS_AFTER:
                self._flush()
            return
        self.journal.add(line)
        self.progress.add(line, request)
        if self._doubtful:
            self._flush()

    def _flush(self) -> None:
        if self._doubtful and not self.journal.num_answered:
            first = self._doubtful[0]
            raise Failure(
                f"{first['teacher']}: each of {len(self._doubtful)} requests was refused: {first['failed']}; "
                "mend the recipe; nothing was written down of them"
            )
        for line in self._doubtful:
            self.journal.add(line)
        self._doubtful = []

    def _local_pass(self, name: str) -> None:
        """Batches of prompts in order; of a batch that was cut short, what is missing is written."""
        from smol_post.local_teacher import LocalTeacher

        teacher, loaded = self.work.teachers[name], None
        units = self._units()
        while batch := list(islice(units, teacher.batch_size)):
            if self._scout and self._scout.enough:
                return
            scripts_of = {at: unit.script() for at, unit in enumerate(batch) if unit.script}
            waves = {at: next(script) for at, script in scripts_of.items()}
            found: dict[int, list[Candidate]] = {at: [] for at in range(len(batch))}
            while waves:
                every = {one.id: one for wave in waves.values() for one in wave if one.teacher == name}
                todo = list(every.values())
                for start in range(0, len(todo), teacher.batch_size):
                    piece = todo[start : start + teacher.batch_size]
                    if all(one.id in self.journal for one in piece):
                        continue
                    loaded = loaded or LocalTeacher(teacher, self.work.parents[name].folder)
                    for request, answer in zip(piece, loaded.ask(piece), strict=True):
                        if request.id not in self.journal:
                            line = asking.about(request) | answer
                            self.journal.add(line)
                            self.progress.add(line, request)
                ended = []
                for at, wave in waves.items():
                    if any(one.id not in self.journal for one in wave):  # of a checkpoint whose turn comes
                        ended.append(at)
                        continue
                    try:
                        waves[at] = scripts_of[at].send([self.journal[one.id] for one in wave])
                    except StopIteration as end:
                        found[at] = end.value
                        ended.append(at)
                for at in ended:
                    del waves[at]
            if self._scout:
                for at, unit in enumerate(batch):
                    self._scouted(unit, found[at])


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is none, the reasons we know before others."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [failed]
    while todo:
        one = todo.pop(0)
        if isinstance(one, BaseExceptionGroup):
            todo = [*one.exceptions, *todo]
        else:
            flat.append(one)
    return next((one for one in flat if isinstance(one, Failure | Refusal)), flat[0])


class Progress:
    """Rows, tokens and cost of this run so far: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, work: "Work", total: int) -> None:
        """`total`: requests of the whole run, at most."""
        self.teachers = work.teachers
        self.num_requests = self.prompt_tokens = self.tokens = self.failed = 0
        self.cost = 0.0
        self.started = self._said = time.monotonic()
        self._total, self._bar = total, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="row", dynamic_ncols=True, smoothing=0.05)

    def known(self, number: int) -> None:
        """So many were answered before."""
        self._total = max(self._total - number, 0)
        if self._bar is not None:
            self._bar.initial = self._bar.n = number
            self._bar.refresh()

    def add(self, line: Mapping[str, Any], request: Request) -> None:
        """Another one is done."""
        teacher = self.teachers[request.teacher]
        self.num_requests += 1
        self.failed += "failed" in line
        self.prompt_tokens += line.get("prompt_tokens", 0)
        self.tokens += line.get("tokens", 0)
        self.cost += line.get("prompt_tokens", 0) * teacher.price_prompt / 1e6
        self.cost += line.get("tokens", 0) * teacher.price_completion / 1e6
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said > _SAY_EVERY:
            self._said = time.monotonic()
            passed = self._said - self.started
            left = passed / self.num_requests * max(0, self._total - self.num_requests)
            pace = f"{self.num_requests / passed:.2f} rows/s, {self._rates()}, {left:,.0f} s to go"
            say(f"{self.num_requests:,} of {self._total:,}: {pace}")

    def _rates(self) -> str:
        rate = self.tokens / max(1e-9, time.monotonic() - self.started)
        return f"{rate:,.0f} tokens/s, cost {self.cost:,.2f}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
