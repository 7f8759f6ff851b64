"""Jobs spread over processes, with progress, an end to all of them when one fails, and none left when the parent dies.

In: jobs that pickle. Out: their results as they come. A worker is told its jobs one by one through a pipe and reports
through it; when its parent is gone, killed or not, the pipe is closed and the worker ends at its next report.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol, cast

from data.interruption import signals_blocked
from data.shards import DataError
from data.tokenize import TextTokenizer


class Job(Protocol):
    """Something to do once in any process."""

    def run(self, tokenizer: TextTokenizer, report: Callable[[int, int], None]) -> Any: ...


def run_jobs(
    jobs: Sequence[Job],
    tokenizer: Callable[[], TextTokenizer],
    *,
    processes: int,
    threads: int,
    report: Callable[[int, int], None],
) -> Iterator[tuple[int, Any]]:
    """Run all jobs in `processes` processes of `threads` encoding threads; yields (index, result) as they end.

    `tokenizer` makes the tokenizer once in each process. One process is this one, whose threads are as many as it has
    cores. The first error of a job is raised here and stops all others.
    """
    if processes == 1:
        made = tokenizer()
        for index, job in enumerate(jobs):
            yield index, job.run(made, report)
        return
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for _ in range(min(processes, len(jobs))):
            with signals_blocked():  # the parent alone hears of Ctrl-C or a scheduler's signal, and ends its workers
                here, there = context.Pipe()
                workers[here] = context.Process(target=_work, args=(there, tokenizer, threads), daemon=True)
                workers[here].start()
                there.close()  # the worker holds the only other end, so its death is seen here
        waiting = iter(enumerate(jobs))
        for pipe in list(workers):
            pipe.send(next(waiting))
        while workers:
            for ready in multiprocessing.connection.wait(list(workers)):
                pipe = cast(Connection, ready)
                try:
                    kind, *values = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    workers[pipe].join()
                    raise DataError(
                        f"a worker process ended with status {workers[pipe].exitcode} (killed for memory?): give the "
                        "same command again, with fewer workers=..."
                    ) from error
                if kind == "progress":
                    report(*values)
                elif kind == "error":
                    raise values[0]
                else:
                    yield values[0], values[1]
                    task = next(waiting, None)
                    pipe.send(task)
                    if task is None:
                        workers.pop(pipe).join()
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _work(pipe: multiprocessing.connection.Connection, tokenizer: Callable[[], TextTokenizer], threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by `tokenizers` when it encodes for the first time
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    try:
        made = tokenizer()
        while (task := pipe.recv()) is not None:
            index, job = task
            try:
                result = job.run(made, lambda read, tokens: pipe.send(("progress", read, tokens)))
            except DataError as error:
                pipe.send(("error", error))
            except ConnectionError:
                raise
            except Exception:
                pipe.send(("error", RuntimeError(traceback.format_exc())))
            else:
                pipe.send(("done", index, result))
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent is gone: nobody waits for a message
