"""Blenders that take turns at what they are given: each in a thread of its own, so that captures run beside the engine's jobs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.batch.blender import Blender, Command
from protocol.errors import KilnError

END_SECONDS = 10.0  # that one which is just starting may hold up the end of all


@dataclass(frozen=True)
class News:
    """Of a task: progress, or its end with either an answer or an error."""

    key: Any  # as the task was given
    fraction: float = 0.0
    text: str = ""
    answer: dict[str, Any] | None = None
    error: KilnError | None = None

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.error is not None


class Blenders:
    """`count` Blenders at most, each started with its first task. One that died is followed by another with the next task.

    find: the Blender to use; called once, with the first task. log: where they print, each with its number in the name.
    """

    def __init__(self, count: int, find: Callable[[], Command], log: Path):
        self.count, self.busy = count, 0  # busy: tasks whose end was not taken yet
        self._find, self._log = find, log
        self._command: Command | None = None
        self._tasks: queue.SimpleQueue[tuple[Any, str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._running: dict[int, Blender] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False

    def check(self) -> Command:
        """The Blender that will be used. Raises KilnError("no-blender")."""
        self._command = self._command or self._find()
        return self._command

    def give(self, key: Any, do: str, **fields: Any) -> None:
        """Has the next free Blender do something (blender.py); `take` tells what came of it. Raises KilnError("no-blender")."""
        self.check()
        self.busy += 1
        self._tasks.put((key, do, fields))
        if len(self._threads) < min(self.count, self.busy):
            number = len(self._threads) + 1
            self._threads.append(threading.Thread(target=self._work, args=(number,), name=f"Blender {number}", daemon=True))
            self._threads[-1].start()

    def take(self, timeout: float = 0.0) -> list[News]:
        """The news since the last call, after at most `timeout` seconds' wait for the first."""
        found: list[News] = []
        try:
            found.append(self._news.get(timeout > 0, timeout))
            while True:
                found.append(self._news.get_nowait())
        except queue.Empty:
            self.busy -= sum(one.ended for one in found)
            return found

    def close(self, now: bool = False) -> None:
        """Ends all of them; `now`: in the middle of what they do, of which nothing more is told. Harmless twice."""
        self._closing = True
        for _ in self._threads:
            self._tasks.put(None)
        if now:
            for blender in list(self._running.values()):
                blender.kill()
        for thread in self._threads:
            thread.join(END_SECONDS if now else None)  # a Blender that stays ends with this process
        self._threads.clear()

    def _work(self, number: int) -> None:
        blender: Blender | None = None
        while (task := self._tasks.get()) is not None and not self._closing:
            key, do, fields = task
            try:
                if blender is None:
                    self._news.put(News(key, 0.0, "starting Blender"))
                    blender = Blender(self._command, self._log.with_stem(f"{self._log.stem}-{number}"))
                    self._running[number] = blender
                if self._closing:  # it was not there yet when the others were ended
                    break
                answer = blender.request(do, lambda fraction, text, key=key: self._news.put(News(key, fraction, text)), **fields)  # type: ignore[misc]
                self._news.put(News(key, 1.0, answer=answer))
            except KilnError as error:
                self._news.put(News(key, error=error))
            except Exception as error:  # a defect costs this task, not the thread that all others wait for
                self._news.put(News(key, error=KilnError("internal", f"{type(error).__name__}: {error}.", "This is a defect of Kiln.")))
            if blender is not None and (blender.restart or not blender.alive):
                blender.close()
                blender = None
                del self._running[number]
        if blender is not None:
            blender.close()
