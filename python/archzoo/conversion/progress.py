"""A progress bar for work that turns out to be long."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

QUIET = 2.0  # seconds without a bar


class Progress:
    """`with Progress("doing", total) as p: ... p.step()`: a bar on the terminal after two seconds of work."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.start = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def step(self) -> None:
        """One of `total` parts is done."""
        self.done += 1
        if self._bar is None and time.monotonic() - self.start > QUIET:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            self._bar = Bar(console=console, transient=True, disable=not console.is_terminal)
            self._task = self._bar.add_task(self.description, total=self.total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
