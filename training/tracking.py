"""Weights & Biases, made from the records of `metrics.jsonl`: one wandb run over all kills and resumes, each step once.

In: records of `metrics.jsonl`. Out: a wandb run whose files are in `run_dir/wandb`. Never prompts, never blocks for
long, never ends a training run: what goes wrong here is one printed line. wandb is imported only when it is used.

How a resumed run stays whole (wandb 0.31, read in its source and tried):

- wandb drops a step that is not after its last one, and wandb-core keeps up to 32 KB of records in memory. So a killed
  run lacks its latest records, and may hold others that are later than the checkpoint it goes on from. `metrics.jsonl`
  has all of them and a resume cuts it to the checkpoint: a tracker is given those records and sends what wandb lacks.
- Offline, wandb cannot go on with a run: each attempt writes a file of its own, and `wandb sync` of a second file with
  the same id replaces what the first one gave. So the newest file is the whole run from its first record on, and takes
  the place of the earlier offline files of that id. Its steps and values are those of `metrics.jsonl`.
- Online, `resume="allow"` goes on after the server's last step. Records that the server lacks are sent. Replayed steps
  that it has are not: it keeps their first value. (`resume_from`, which rewinds on the server, is a preview that most
  accounts and all self-managed servers lack.)

To look into an offline run: `wandb leet inspect --json run_dir/wandb/offline-run-*`.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.config import WandbConfig, one_line

INIT_TIMEOUT_SECONDS = 30  # a node without internet waits this long, once, and goes on offline
FINISH_TIMEOUT_SECONDS = 60  # what is not uploaded by then stays on disk for `wandb sync`


class WandbTracker:
    """One wandb run; `log` takes the records of `metrics.jsonl` as they are written."""

    def __init__(
        self,
        config: WandbConfig,
        run_name: str,
        run_dir: str | Path,
        resolved_config: Mapping[str, Any],
        run_id: str | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Start or continue a wandb run.

        run_id: the id a checkpoint holds; None starts a new run. history: the records of `metrics.jsonl` up to that
        checkpoint, in order; those that wandb lacks are sent at once. Mode `online` gives way to the environment
        variable WANDB_MODE=offline or disabled, and becomes offline without a login or a connection.
        """
        self._directory = Path(run_dir).resolve()
        self._run: Any = None
        self._run_id = run_id
        self._next_step = 0
        # Records go through a thread of their own: a service that hangs does not stop training.
        self._records: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="wandb", daemon=True)
        mode = config.mode
        if mode == "online" and os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            mode = os.environ["WANDB_MODE"]
        if mode == "disabled":
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere when it is missing
            if mode == "online":
                mode = self._start_online(config, run_name, resolved_config)
            if mode == "offline":
                self._start(config, "offline", run_name, resolved_config)
                _say(f'wandb: run {self.run_id} is recorded offline; upload it with "wandb sync {self._run_folder}"')
        except Exception as error:
            self._give_up(error)
            return
        self._sender.start()
        for record in history:
            self.log(record)
        self._remove_superseded_files()

    @property
    def run_id(self) -> str | None:
        """The id of the wandb run, for the checkpoint; the id given, or None, when wandb is not in use."""
        return self._run_id

    def log(self, record: Mapping[str, float]) -> None:
        """Send one record (`step`, `tokens` and its values, same keys), some time later.

        A step that wandb has already is left out.
        """
        if self._run is not None:
            self._records.put(dict(record))

    def finish(self, exit_code: int = 0) -> None:
        """End the wandb run (`exit_code` other than 0 marks it failed). May be called more than once."""
        if self._run is None:
            return
        self._records.put(None)
        self._sender.join(FINISH_TIMEOUT_SECONDS)
        run, self._run = self._run, None
        if self._sender.is_alive():
            _say("wandb: it does not answer; what it lacks is in metrics.jsonl, and the next start sends it")
        elif run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def _send(self) -> None:
        """In the thread: records, in order, until None comes."""
        while (record := self._records.get()) is not None:
            run, step = self._run, int(record["step"])
            if run is None or step < self._next_step:
                continue
            self._next_step = step + 1
            try:
                run.log(record, step=step, commit=True)
            except Exception as error:
                self._give_up(error)

    def _start_online(self, config: WandbConfig, run_name: str, resolved_config: Mapping[str, Any]) -> str:
        """Start online and return "online", or say why not in one line and return "offline"."""
        import wandb

        try:
            if not wandb.login(prompt=False):
                _say('wandb: not logged in, so offline; log in with "wandb login" or set WANDB_API_KEY')
                return "offline"
            self._start(config, "online", run_name, resolved_config)
        except Exception as error:
            _say(f"wandb: cannot go online ({one_line(error)}), so offline")
            return "offline"
        self._next_step = self._run.starting_step
        _say(f"wandb: {self._run.url}")
        return "online"

    def _start(self, config: WandbConfig, mode: str, run_name: str, resolved_config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            id=self._run_id,
            resume="allow" if mode == "online" else None,  # offline knows no resuming
            reinit="finish_previous",  # a job of a multirun that ended badly left its run open
            name=run_name,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            dir=self._directory,
            config=dict(resolved_config),
            settings=wandb.Settings(
                silent=True, init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS
            ),
        )
        self._run_id = self._run.id
        for axis in ("step", "tokens"):
            self._run.define_metric(axis, hidden=True)  # to choose as an axis, without a chart of their own

    @property
    def _run_folder(self) -> Path:
        return Path(self._run.dir).parent  # wandb's `dir` is the folder `files` in it

    def _remove_superseded_files(self) -> None:
        if self._run is None:
            return
        for file in self._directory.glob(f"wandb/offline-run-*-{self._run_id}/*.wandb"):
            if file.parent != self._run_folder:
                file.unlink()

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _say(f"wandb: {one_line(error)}; the run goes on without wandb, its records are in metrics.jsonl")


def previous_run_id(run_dir: str | Path) -> str | None:
    """The id of the newest wandb run in a run directory: that of an attempt that ended before its first checkpoint."""
    folders = sorted(Path(run_dir).glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
    return re.sub(r"^(offline-)?run-\d+_\d+-", "", folders[-1].name) if folders else None


def _say(text: str) -> None:
    with suppress(OSError):  # a log on a full disk is no reason to end a run
        print(text, flush=True)
