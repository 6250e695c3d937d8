"""Progress on stderr: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_display(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, one line for each tenth elsewhere; call what it gives with the fraction done and a text."""
    if not sys.stderr.isatty():
        told = -1

        def line(done: float, text: str) -> None:
            nonlocal told
            if int(10 * done) > told:
                told = int(10 * done)
                print(f"{title}: {done:4.0%}  {text}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start", total=1.0)
        yield lambda done, text: bar.update(task, completed=done, description=text)
