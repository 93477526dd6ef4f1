"""The thread that owns the engine, and the queue and events through which request handlers talk to it.

    handler (asyncio) -- submit, drop, run --> inbox --> engine thread: inbox, step, inbox, step ...
                      <-- job.outputs, event --------------------------'

An Engine is not thread-safe, so only this thread touches it and its model. What a handler wants is done between two
steps; the results of a step reach all handlers with one wake-up of their event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gpt2.engine import Engine
from gpt2.request import Completion, Output
from gpt2.sampling import SamplingParams

Result = TypeVar("Result")


class EngineError(Exception):
    """The engine failed in a step, or has been stopped; the request was lost with it."""


class Job:
    """Some prompts with one set of parameters, as a handler sees them: always the latest, never a backlog."""

    def __init__(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, follow: bool) -> None:
        self.prompts = prompts
        self.params = params
        self.follow = follow  # hear of every step, not only of the end
        self.outputs: list[Sequence[Output]] = [()] * len(prompts)  # of each prompt, as far as they have got
        self.completions: list[Completion | None] = [None] * len(prompts)
        self.error: EngineError | None = None
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()

    @property
    def done(self) -> bool:
        return all(c is not None for c in self.completions)

    async def wait(self) -> None:
        """Return once something is new since the last call; raises EngineError if the engine failed."""
        await self.changed.wait()
        self.changed.clear()
        if self.error:
            raise self.error


class Worker:
    """Runs an engine in a thread of its own, from `start` to `close`. Everything else is for the event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = engine.stats()  # as of the last step
        self.jobs = 0  # that the engine has at hand
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._places: dict[int, tuple[Job, int]] = {}  # request id -> its job, and which of its prompts
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gpt2-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after the current step; unfinished work is abandoned."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    async def submit(self, job: Job) -> None:
        """Queue all prompts of a job; ValueError, with none queued, if one does not fit the model."""
        try:
            await self.run(lambda: self._add(job))
        except asyncio.CancelledError:
            self.drop(job)
            raise

    def drop(self, job: Job) -> None:
        """Nobody waits for this job any more: end whatever of it is unfinished. Harmless at any time."""
        self._inbox.put(lambda: self._end(job))

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, done on the engine's thread between two steps."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def task() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self._stopped:
                        raise EngineError("the engine has stopped")
                    future.set_result(work())
                except Exception as e:
                    future.set_exception(e)
                    if isinstance(e, RuntimeError):  # as PyTorch raises them
                        self._check_device()

        self._inbox.put(task)
        if self._stopped:  # the thread may have looked into the inbox for the last time
            self._empty_inbox()
        return await asyncio.wrap_future(future)

    # -- on the engine's thread

    def _run(self) -> None:
        try:
            while self._attend_to_inbox():
                if self.engine.unfinished:
                    self._step()
                self.stats, self.jobs = self.engine.stats(), len({id(job) for job, _ in self._places.values()})
        except Exception:
            traceback.print_exc(file=sys.stderr)
        finally:
            self._stopped = True
            self._fail(EngineError("the engine has stopped"))
            self._empty_inbox()

    def _attend_to_inbox(self) -> bool:
        """Run the handlers' tasks, waiting for one if there is no other work; False means stop."""
        wait = not self.engine.unfinished
        while True:
            try:
                task = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()
            wait = False

    def _empty_inbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if task := self._inbox.get_nowait():
                    task()

    def _step(self) -> None:
        failure: EngineError | None = None
        try:
            completions = self.engine.step()
        except Exception as e:  # it ended every request; what was finished before comes with the next step
            traceback.print_exc(file=sys.stderr)
            self._check_device()
            failure = EngineError(f"the engine failed: {e}")
            completions = self.engine.step()
        changed: set[Job] = set()
        for completion in completions:
            job, index = self._places.get(completion.request_id, (None, 0))
            if job is None or any(output.finish_reason == "abort" for output in completion.outputs):
                continue  # dropped, or ended by the failure
            del self._places[completion.request_id]
            job.outputs[index] = completion.outputs  # first: whoever finds the job done finds all of them
            job.completions[index] = completion
            if job.follow or job.done:
                changed.add(job)
        for number, (job, index) in self._places.items():
            if job.follow and (outputs := self.engine.progress(number)) is not None:
                job.outputs[index] = outputs
                changed.add(job)
        _wake(changed)
        if failure:
            self._fail(failure)

    def _check_device(self) -> None:
        """Raise, which ends the thread, if the GPU takes no more work from this process.

        That is so after an illegal memory access, but not after running out of memory, say.
        """
        device = self.engine.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _add(self, job: Job) -> None:
        numbers: list[int] = []
        try:
            for prompt in job.prompts:
                numbers.append(self.engine.add(prompt, job.params))
        except ValueError:
            for number in numbers:
                self.engine.abort(number)
            raise
        self._places.update((number, (job, index)) for index, number in enumerate(numbers))

    def _end(self, job: Job) -> None:
        for number in [n for n, (owner, _) in self._places.items() if owner is job]:
            del self._places[number]
            self.engine.abort(number)

    def _fail(self, error: EngineError) -> None:
        jobs = {job for job, _ in self._places.values()}
        self._places.clear()
        for job in jobs:
            job.error = error
        _wake(jobs)


def _wake(jobs: set[Job]) -> None:
    def wake(loop: asyncio.AbstractEventLoop) -> None:
        for job in jobs:
            if job.loop is loop:
                job.changed.set()

    for loop in {job.loop for job in jobs}:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to wake
            loop.call_soon_threadsafe(wake, loop)
