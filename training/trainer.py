"""The training loop: a checked configuration in, a run directory out.

A run directory stands alone: `config.yaml`, `versions.json`, `metrics.jsonl`, `checkpoints/step-N/`, `curves.png`,
`summary.json`. What a step does depends on (configuration, step) and the weights alone, so a run that was stopped, or
killed, goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import torch
import yaml
from torch import Tensor

from data.documents import MicroBatch
from data.loader import BatchLoader
from data.shards import write_atomically
from eval.perplexity import PerplexityEvaluator
from models.accounting import count_parameters, describe
from models.decoder import Decoder
from models.initialization import initialize
from models.one_rank import keep_gathered
from models.parallelize import parallelize
from training.checkpoint import TrainState, checkpoint_folders, checkpoint_path, load_checkpoint, read_marker
from training.config import Config, RankError, TrainingError, resolved
from training.curves import draw_curves
from training.data import open_stream, validation_folders
from training.distributed import World, distributed_world
from training.evaluation_progress import EvaluationProgress
from training.garbage import GarbageCollection
from training.lock import run_lock
from training.memory_estimate import estimate
from training.metrics import Console, MetricsLog, TrainingClock, format_count, read_metrics
from training.optimizer import build_optimizer, clip, gradient_norm, set_lr
from training.out_of_memory import explain, is_out_of_memory
from training.profiling import StepProfiler
from training.rank_check import check_ranks
from training.restarts import give_up_if_stuck
from training.resume import choose_checkpoint, continue_command, of_one_level
from training.saver import CheckpointSaver
from training.schedule import lr_factor
from training.signals import StopRequest, stop_on_signals
from training.skip import SpikeFilter
from training.startup import Startup
from training.step_metrics import StepMetrics
from training.tracking import WandbTracker, previous_run_id
from training.versions import record_versions
from training.watchdog import Watchdog

NO_DATA = 1000  # above all signals
CHOICE = "the choice of a checkpoint"


def train(config: Config) -> None:
    """Train as `config` says, from scratch or from where its run directory stands.

    `config` has been validated and its data checked (`training.preflight`). Raises ConfigError, before any file is
    made, when the run directory belongs to another configuration or other data; SystemExit(128 + signal) after a
    signal, with a checkpoint.
    """
    training = config.training
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        world = stack.enter_context(distributed_world(training.device, lambda: stop.signal))
        run_dir = Path(config.run.dir).absolute()
        watchdog = Watchdog(world, run_dir, training.hang_factor, training.hang_seconds)
        with watchdog, _explained(config, world):
            if not world.is_main:
                watchdog.mark(CHOICE)  # the main rank comes to it once it has chosen
            # On one rank alone: another could look while a damaged checkpoint is set aside.
            checkpoint = world.from_main(lambda: _take(config, world, stack, watchdog))
            trainer = Trainer(config, world, stop, watchdog, checkpoint)
            stack.push(trainer.end_records)  # after the watch: wandb may take its time
            trainer.fit()
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)


def _take(config: Config, world: World, stack: ExitStack, watchdog: Watchdog) -> Path | None:
    """On the main rank: the run directory, locked until `stack` ends. Returns the checkpoint to go on from."""
    run_dir = Path(config.run.dir)
    choose_checkpoint(config)  # a mistake leaves no file
    stack.enter_context(run_lock(run_dir, config.run.placed_by))
    checkpoint = choose_checkpoint(config, locked=True, watch=watchdog)  # again: nobody else changes it from here on
    step = 0 if checkpoint is None else read_marker(checkpoint).state.step
    if step < config.training.last_step:
        give_up_if_stuck(run_dir, step)
    record_versions(run_dir, world, step)
    watchdog.mark(CHOICE)
    return checkpoint


@contextmanager
def _explained(config: Config, world: World) -> Iterator[None]:
    """Say in a sentence what has ended this rank, where a traceback would help less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RankError(explain(error, config, world)) from error
    except OSError as error:
        raise RankError(
            f"{error.filename or config.run.dir} cannot be used ({error.strerror or error}): make room or give access "
            "there, and the same command continues the last checkpoint, if any."
        ) from error


class Trainer:
    """One run on one process among `world`."""

    def __init__(
        self, config: Config, world: World, stop: StopRequest, watchdog: Watchdog, checkpoint: Path | None
    ) -> None:
        self.startup = Startup()
        self.config, self.world, self.stop, self.watchdog = config, world, stop, watchdog
        self.run_dir = Path(world.broadcast(str(Path(config.run.dir).absolute())))
        self.last_step = config.training.last_step
        self.console = Console(config.training.steps, enabled=world.is_main)
        self.garbage = GarbageCollection()
        self.profiler = StepProfiler(config.logging.profile, self.run_dir, world.rank, world.device, self.console.say)
        self.after_step: list[Callable[[int], None]] = [self.garbage]  # called with steps done
        self._build_data()
        watchdog.mark("the data")
        self.startup.mark("data")
        check_ranks(world, config, self.run_dir, self.stream.fingerprint, self.console.say)
        self._build_model()
        watchdog.mark("the model")
        self.startup.mark("model")
        self._restore(checkpoint)
        self.startup.mark("checkpoint")
        if world.is_main:
            self._open_run_directory()
        self.first_step, self.evaluated = self.state.step + 1, False
        self.lost: str | None = None  # why validation data could not be read
        watchdog.mark("the start", first=True)

    def fit(self) -> None:
        """Train to the last step, or until a signal; leave a checkpoint, curves and a summary."""
        self.garbage.start()
        try:
            self._train()
            with self.clock.paused():
                self._finish()
            self._check_data()  # all ranks wait here: a launcher ends those that still work when others have ended
        finally:
            self.garbage.stop()
            self.loader.close()
            self.saver.close()

    def end_records(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End metrics.jsonl and wandb, whose run has failed when there is an `error`."""
        if self.world.is_main:
            self.tracker.finish(exit_code=int(error is not None))
            self.log.close()

    def _train(self) -> None:
        config, state, watchdog = self.config, self.state, self.watchdog
        self.clock = TrainingClock(state.step, before=state.seconds)
        self.metrics.start(state, self.clock, self.loader, self.spikes)
        if state.unrecorded or (state.step == 0 and config.evaluation.every):
            self._evaluate_and_record(state.unrecorded)
            self.startup.mark("evaluation")
        self.loader.prefetch(state.instances)
        save_due = False
        while state.step < self.last_step and not self._stopping(has_data=self._has_data()):
            with self.profiler.of_step(state.step + 1, self.clock.paused):
                loss, grad_norm, lr = self._step(self.loader.batch(state.instances))
            state.step += 1
            state.instances += config.training.global_batch_size
            state.tokens += config.training.global_batch_size * config.data.sequence_length
            self._finish_record()  # of a step before, now that the device has this one to do
            if state.step == self.first_step:
                self.startup.mark("step")
                self.console.say(self.startup.line())
            for notify in self.after_step:
                notify(state.step)
            self.loader.prefetch(state.instances)
            watchdog.step_done(f"step {state.step}")

            ends = state.step == self.last_step
            evaluates = config.evaluation.every > 0 and (ends or state.step % config.evaluation.every == 0)
            if ends or evaluates or state.step % config.logging.every == 0:
                self.metrics.begin(state, loss, grad_norm, lr)
                if ends or evaluates or self.metrics.at_once:
                    self._finish_record(evaluates)
            save_due |= ends or self.saver.schedule.is_due(state.step)
            # Not while steps are skipped: the weights are in doubt, and an older checkpoint would be deleted for them.
            if save_due and (ends or self._check_skips() == 0):
                self._save()
                save_due = False
            if not ends:
                self._keep_bound()
        self._finish_record()

    def _check_data(self) -> None:
        """Raise, on every rank, when one of them could not read its next batch, or one of an evaluation."""
        failures = [failure for failure in self.world.gather(self.lost or self.loader.failure) if failure]
        if failures:
            where = f"after step {step}, with a checkpoint" if (step := self.state.step) else "before its first step"
            raise TrainingError(f"{failures[0]} The run has stopped {where}: the same command continues it.")

    def _step(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor, float]:
        """One optimizer step. Returns the global mean (cross-entropy, z-loss) [2], the gradient norm, the rate."""
        total = torch.zeros(2, device=self.world.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            # Until the optimizer changes them, weights that stay gathered serve the next micro-batch too.
            freed = not self.stay_gathered if last else self.config.parallel.reshard_after_forward
            self.model.set_reshard_after_backward(freed)  # type: ignore[operator]
            batch = batch.to(self.world.device)
            loss = self.model(batch.inputs, batch.targets, batch.cu_seqlens)
            self.garbage.after_forward()
            (sum(loss) * batch.weight).backward()
            total += torch.stack(loss).detach() * batch.weight
        grad_norm = gradient_norm(self.optimizer)
        clip(self.optimizer, grad_norm, self.config.training.max_grad_norm)
        lr = self.config.optimizer.lr * lr_factor(self.config.schedule, self.state.step, self.config.training.steps)
        set_lr(self.optimizer, lr)
        total = self.world.mean(total)
        # The fused kernel leaves everything as it is where this is 1, as it does for torch.amp's gradient scaler.
        self.optimizer.found_inf = self.spikes.judge(total[0], grad_norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, grad_norm, lr

    def _has_data(self) -> bool:
        ready = self.loader.ready(self.state.instances)
        step = self.state.step + 1
        self.watchdog.mark(f"the data of step {step}", first=step == self.first_step)
        return ready

    def _stopping(self, has_data: bool = True) -> bool:
        """Whether some rank got a signal, which all know from here on, or has no data for what comes next."""
        number = self.world.largest((self.stop.signal or 0) if has_data and self.lost is None else NO_DATA)
        if 0 < number < NO_DATA:
            self.stop.signal = signal.Signals(number)
        return number != 0

    def _evaluate_and_record(self, values: dict[str, float]) -> None:
        """Record the values of this step with its validation; one that is ended is made at the next start."""

        def stopping(failure: str | None) -> bool:
            self.lost = failure
            place = f"a batch of the evaluation at step {self.state.step}"
            self.watchdog.mark(place, first=not self.evaluated)
            return self._stopping()

        with self.clock.paused():
            evaluated: dict[str, float] | None = {}  # a start that makes no evaluations may find one left to make
            if self.config.evaluation.every:
                name = f"evaluation at step {self.state.step}: "
                length = self.config.data.sequence_length
                progress = EvaluationProgress(self.evaluator.size, length, self.console.say, name)
                evaluated = self.evaluator.evaluate(self.model, self.world.device, stopping, progress)
                self.evaluated = True
        self.state.unrecorded = values if evaluated is None else {}
        if evaluated is not None:
            self._record(self.state.step, self.state.tokens, values | evaluated)

    def _finish_record(self, evaluates: bool = False) -> None:
        """Write the record that was begun, if any, with an evaluation or without; waits for the device to be there."""
        if not self.metrics.pending:
            return
        done = self.metrics.finish()
        if evaluates:
            self._evaluate_and_record(done.values)
        else:
            self._record(done.step, done.tokens, done.values)
        if done.longest_skip >= self.config.training.skip_limit:
            self._check_skips()

    def _check_skips(self) -> int:
        """Steps skipped in a row up to this one; raises TrainingError, on all ranks, when too many ever were."""
        skipped = self.spikes.longest
        if skipped < self.config.training.skip_limit:
            return self.spikes.in_a_row
        self.saver.wait()
        saved = f"step {self.saver.saved_step}" if self.saver.saved_step else "none"
        raise TrainingError(
            f"the run diverged: {skipped} steps in a row up to step {self.state.step} were skipped, their loss or "
            f"gradient norm being no number or far too high (last saved: {saved}; skipped steps change no weight). "
            "Look at the data of these steps, or lower optimizer.lr, which checkpoint.allow_changes=[optimizer.lr] "
            "permits; where they are as they should be, raise training.skip_sigmas in the same way."
        )

    def _record(self, step: int, tokens: int, values: dict[str, float]) -> None:
        if not self.world.is_main:
            return
        record = self.log.append(step, tokens, values)
        self.tracker.log(record)
        remaining = self.clock.remaining(self.last_step - step)
        self.console.progress(record, remaining)

    def _keep_bound(self) -> None:
        if self.saver.is_at_bound(self.state.step):
            self._finish_record()
            self.world.synchronize()  # what is queued is work, no pause
            with self.clock.paused():
                self.saver.wait_at_bound(self.state.step, self.clock.stepping)
        if self.saver.schedule.tries_again(self.state.step) and self._check_skips() == 0:
            self._save()
            self._keep_bound()

    def _save(self) -> None:
        self._finish_record()  # a resume makes no record up to its step again
        last = self.stop.signal is not None or self.state.step >= self.last_step
        with self.clock.paused():
            self.state.seconds = self.clock.elapsed
            self.saver.save(self.state, self.clock.stepping, delete_old=self.spikes.in_a_row == 0, last=last)
            self.watchdog.mark(f"the checkpoint of step {self.state.step}")

    def _finish(self) -> None:
        """After the last step of this process: a checkpoint where a signal asked for it, curves, summary."""
        state = self.state
        if self.stop.signal is not None:
            self.console.say(f"{self.stop.signal.name} came: stopping after step {state.step}")
        self.saver.wait()
        if skipped := self.spikes.in_a_row:
            self.console.say(f"warning: the last {skipped} steps were skipped: the weights are those of before them")
        if state.step != self.saver.saved_step:
            self._save()
            if not self.saver.wait():
                saved = self.saver.saved_step
                then = f"continues step {saved}" if saved else "begins again"
                raise TrainingError(
                    f"{checkpoint_path(self.run_dir, state.step)} could not be saved ({self.saver.failure}): make room "
                    f"or give access there, and the same command {then}."
                )
        if not self.world.is_main or self.log.last_step < 0:  # a signal before the first record leaves nothing to show
            return
        first: dict[str, tuple[float, int]] = {}
        last: dict[str, tuple[float, int]] = {}
        for record in read_metrics(self.log.path):
            losses = {key: (value, record["step"]) for key, value in record.items() if key.endswith("/loss")}
            first, last = losses | first, last | losses
        summary = {
            "name": self.config.run.name,
            "steps": self.config.training.steps,
            "stopped_at": state.step,
            "tokens": state.tokens,
            "parameters": count_parameters(self.config.model).total,
            **{key: None if math.isnan(loss) else loss for key, (loss, _) in last.items()},  # JSON has no NaN
        }
        write_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        picture = draw_curves(self.run_dir)
        for key, (loss, step) in last.items():
            start, first_step = first[key]
            self.console.say(f"{key:<34}{start:8.4f} (step {first_step:,}) to {loss:8.4f} (step {step:,})")
        self.console.say(f"run     {self.run_dir} | {state.step:,} of {self.config.training.steps:,} steps")
        self.console.say(f"curves  {picture}")
        if state.step < self.config.training.steps:
            self.console.say(f"to continue: {continue_command(at_stop=state.step >= self.last_step)}")

    def _build_data(self) -> None:
        config, world = self.config, self.world
        self.stream = open_stream(config)
        self.loader = BatchLoader(
            self.stream,
            config.training.global_batch_size,
            config.training.micro_batch_size,
            world.rank,
            world.size,
            document_mask=config.data.document_mask,
            pin_memory=world.device.type == "cuda",
            workers=config.data.workers,
            timeout=config.data.timeout,
        )
        if config.evaluation.every:
            self.evaluator = PerplexityEvaluator(
                validation_folders(config.data),
                config.data.sequence_length,
                instances=config.evaluation.instances,
                micro_batch_size=config.evaluation.micro_batch_size or config.training.micro_batch_size,
                document_mask=config.data.document_mask,
                rank=world.rank,
                world_size=world.size,
                reduce=world.sum,
            )

    def _build_model(self) -> None:
        self.garbage.begin_job()
        config, world = self.config, self.world
        compute_dtype = world.compute_dtype(config.training.precision)
        compile_backend = world.compile_backend(config.parallel.compile)
        if world.is_main:
            compiled = compile_backend is not None
            held = estimate(config, world.size, compute_dtype=compute_dtype, compiled=compiled)
            self.console.say(f"model {config.model.name}\n{describe(config.model, config.data.sequence_length, held)}")
        with torch.device("meta"):
            model = Decoder(config.model)
        self.model = parallelize(
            model,
            world.parameter_mesh(config.parallel.replicate),
            compute_dtype=compute_dtype,
            activation_checkpointing=config.parallel.activation_checkpointing,
            compile_backend=compile_backend,
            attention_backend=config.parallel.attention_backend,
            reshard_after_forward=config.parallel.reshard_after_forward,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        reshard = config.parallel.reshard_after_forward
        self.stay_gathered = not reshard and keep_gathered(self.model, self.optimizer)
        self.spikes = SpikeFilter(config.training.skip_window, config.training.skip_sigmas, world.device)
        self.watchdog.mark("the layout of the model")
        parts = self.model, self.optimizer, self.spikes
        self.saver = CheckpointSaver(self.run_dir, *parts, world, config.checkpoint, self.console.say, self.watchdog)
        self.metrics = StepMetrics(config, world, compute_dtype)

    def _restore(self, checkpoint: Path | None) -> None:
        """Weights, optimizer and state of the checkpoint, or of step 0."""
        config = self.config
        self.last_recorded = -1  # later records are of steps that are done again, or of no run that goes on
        self.records_every = config.logging.every
        torch.manual_seed(config.training.seed)
        if checkpoint is None:
            initialize(self.model, config.training.seed)
            self.state = TrainState()
        else:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizer, self.world, self.spikes, self.watchdog)
            if not of_one_level(self.state, config, self.stream.fingerprint):
                self.spikes.forget()
            if not any(checkpoint.samefile(own) for own in checkpoint_folders(self.run_dir)):  # another run's
                self.state.wandb_run_id, self.state.begun_from = None, str(checkpoint)
            else:  # the record that a signal put off may have been made since, by a start that came to no checkpoint
                self.last_recorded = self.state.step - bool(self.state.unrecorded)
                logging = self.state.config.get("logging", {})
                self.records_every = max(config.logging.every, logging.get("every", 1))
            self.console.say(f"continuing {checkpoint} at step {self.state.step}")
            if self.state.step >= self.last_step:
                self.console.say(f"nothing to do: the run has come to step {self.state.step} already")
        steps = range(self.state.step + 1, self.last_step + 1)
        if steps and (left := [step for step in config.logging.profile.steps if step not in steps]):
            self.console.say(
                f"not profiled: {left} of logging.profile.steps; this start makes {steps[0]} to {steps[-1]}"
            )
        self._say_data()
        self.saver.saved_step = self.saver.schedule.begun = self.state.step
        self.state.data, self.state.tokenizer = self.stream.fingerprint, self.stream.tokenizer["sha256"]
        self.state.sources = [asdict(source) for source in self.stream.sources]
        if steps or self.last_recorded < 0:  # else the run stays that of the steps that it has made
            self.state.config = resolved(config)

    def _say_data(self) -> None:
        """What the whole run takes of each source: what it has taken, and the steps that are left."""
        left = max(0, self.config.training.steps - self.state.step) * self.config.training.global_batch_size
        for source in self.stream.sources:
            taken = (self.state.instances + left) * float(Fraction(source.share))
            self.console.say(
                f"data {source.path} | {format_count(source.tokens)} tokens, {source.instances:,} instances "
                f"| the whole run takes {taken:,.0f} ({taken / source.instances:.2f} epochs)"
            )

    def _open_run_directory(self) -> None:
        """On the main rank: configuration, versions, metrics up to the checkpoint, wandb."""
        config = self.config
        self.run_dir.mkdir(parents=True, exist_ok=True)
        written = self.run_dir / "config.yaml"
        if self.state.step < self.last_step or not written.exists():
            write_atomically(written, yaml.safe_dump(self.state.config, sort_keys=False).encode())
        self.log = MetricsLog(self.run_dir / "metrics.jsonl")
        if self.last_recorded < 0 and self.log.last_step > config.checkpoint.every:
            self.console.say(
                f"warning: {self.run_dir} has records up to step {self.log.last_step} and no checkpoint: the run "
                f"begins again, and they are kept as {self.log.set_aside().name}"
            )
        self.log.rewind(self.last_recorded)
        begun_now = self.log.last_step < 0 and self.state.begun_from is not None  # at a step of another run's
        if not begun_now and self.log.last_step < self.last_recorded - self.records_every:
            self.console.say(
                f"warning: {self.log.path} has no records between step {max(self.log.last_step, 0)} and the "
                f"checkpoint's, {self.state.step}: some were lost"
            )
        self.saver.before_commit = self.log.sync  # a resume makes no record up to its step again
        self.tracker = WandbTracker(
            config.logging.wandb,
            config.run.name,
            self.run_dir,
            self.state.config,
            self.state.wandb_run_id or previous_run_id(self.run_dir),
            read_metrics(self.log.path),
        )
        self.state.wandb_run_id = self.tracker.run_id
