"""What checkpoints cost, and whether a killed run goes on: `python scripts/benchmark_checkpoints.py --data SHARDS
--out DIR [--gpus 2] [--every 100] [--cost-only]`.

In: token shards. First a run of train.py on all GPUs, three times `--every` steps with `checkpoint.every` set to that:
how long training waits for each checkpoint, and its throughput from the second on, when saves begin as early as writes
need, against that before the first. Then a run of the same configuration that is killed (SIGKILL of all ranks), which
fails where more than `checkpoint.every` steps are lost, and is continued on each number of GPUs of `--resume-on`, one
after the other; its losses against those of the first run. More ranks than there are GPUs share them. Out:
`checkpoints.json` and the logs in DIR, the result as Markdown.
Checkpoints (three at most at a time) go to a temporary folder in `--scratch`, and are deleted.

    --cost-only       without the run that is killed
    --from FILE       shows an earlier `checkpoints.json`
    --docs            writes the section of docs/benchmarks.md
    --set KEY=VALUE   an override of train.py for all runs
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from data.shards import write_atomically
from scripts import console
from scripts.page_section import PageSection
from scripts.training_benchmark.process import StepsFailed, check_device, kill, killed_on_error, reason
from scripts.training_benchmark.tables import machine
from training.checkpoint import find_checkpoints, read_marker
from training.metrics import Record, read_metrics
from training.versions import environment

SECTION, PAGE = PageSection("checkpoints", "scripts/benchmark_checkpoints.py"), ROOT / "docs" / "benchmarks.md"
WARMUP = 20  # steps at the most that are left out at the start
AFTER = 20  # steps that are compared after a resume
TIMEOUT = 900  # seconds that a run may take
# A rank that shares its GPU: NCCL takes it for one of another host, and wants a network between them.
SHARED = """gpus=(${{CUDA_VISIBLE_DEVICES//,/ }}); [ ${{#gpus[@]}} -gt 0 ] || gpus=({gpus})
export CUDA_VISIBLE_DEVICES=${{gpus[LOCAL_RANK % ${{#gpus[@]}}]}} NCCL_HOSTID=host-$LOCAL_RANK NCCL_SOCKET_IFNAME=lo
LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 exec "$@" """
SAVED = re.compile(r"checkpoint \S+step-(\d+) \| ([\d,.]+) MB in ([\d.]+) s, training waited(?: ([\d.]+) s)?")


def main(arguments: list[str] | None = None) -> int:
    """Measure or show. Returns the exit status: 0; 1 when a run failed; 2 for what cannot be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        if options.docs:
            SECTION.check(PAGE)
        if options.results:
            results = read(options.results)
        else:
            results = run(options, shlex.join(["python", "scripts/benchmark_checkpoints.py", *arguments]))
    except StepsFailed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(results))
    if options.docs:
        SECTION.replace(PAGE, render(results))
        print(f"written: {PAGE}")
    return 0


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Both measurements. Raises ValueError for options that cannot be used, StepsFailed when a run fails."""
    if options.data is None or options.out is None:
        raise ValueError("--data SHARDS and --out DIR are needed for a measurement: give both, or --from FILE to show.")
    if not (options.data / "train" / "manifest.json").is_file():
        raise ValueError(f"--data {options.data} holds no token shards: prepare some with scripts/prepare_data.py.")
    if options.every < 2 * AFTER:
        raise ValueError(f"--every {options.every} leaves too few steps to compare: use at least {2 * AFTER}.")
    check_device(options.set)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "command": command,
        "environment": environment(device),
        "shape": f"`{options.model}`, {options.gpus} ranks × micro-batch {options.micro_batch} × {options.time} tokens,"
        f" {options.batch} instances a step",
        "every": options.every,
    }
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.scratch) as folder:
        whole = Runs(options, Path(folder) / "whole")
        output = whole.finish(
            options.gpus, f"checkpoint.every={options.every}", f"training.stop_at={3 * options.every}"
        )
        undisturbed = read_metrics(whole.run_dir / "metrics.jsonl")
        results |= cost(undisturbed, output, options.every)
        shutil.rmtree(whole.run_dir)  # its checkpoints
        if not options.cost_only:
            results |= kill_and_resume(options, Path(folder) / "killed", undisturbed)
    write_atomically(options.out / "checkpoints.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def read(path: Path) -> dict[str, Any]:
    """Results of an earlier measurement. Raises ValueError, in one sentence, for a file that holds none."""
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        render(results)  # which looks at everything that is shown
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--from {path} holds no results of this benchmark ({error!r}): give a checkpoints.json "
            "that it has written."
        ) from None
    return results


def kill_and_resume(options: argparse.Namespace, run_dir: Path, undisturbed: list[Record]) -> dict[str, Any]:
    """What is lost of a run that is killed, and how its losses go on from those of `undisturbed`."""
    broken = Runs(options, run_dir)
    # More often, so that there is one soon; the interval changes no loss.
    results: dict[str, Any] = broken.kill(options.gpus, AFTER)
    before = read_metrics(broken.run_dir / "metrics.jsonl")
    results |= {"apart_before": largest(undisturbed, before), "gpus": torch.cuda.device_count(), "resumed": []}
    for ranks in options.resume_on:
        step = read_marker(find_checkpoints(broken.run_dir)[-1]).state.step
        last = min(step + AFTER, 3 * options.every)
        broken.finish(ranks, f"checkpoint.every={options.every}", f"training.stop_at={last}")
        records = [r for r in read_metrics(broken.run_dir / "metrics.jsonl") if r["step"] > step]
        apart = largest(undisturbed, records)
        results["resumed"].append({"ranks": ranks, "from": step, "to": last, "apart": apart})
        say(f"resumed on {ranks}: losses of steps {step + 1} to {last} differ by {apart:.2e} at most")
    return results


class Runs:
    """Starts of train.py in one run directory."""

    def __init__(self, options: argparse.Namespace, run_dir: Path) -> None:
        self.options, self.run_dir = options, run_dir
        self.starts = 0

    def finish(self, ranks: int, *overrides: str) -> str:
        """A start that comes to its end. Returns what it printed; raises StepsFailed."""
        process, log = self._start(ranks, overrides)
        begin = told = time.monotonic()
        with killed_on_error(process):
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    say(f"  step {self._step()}")
                if time.monotonic() - begin > TIMEOUT:
                    kill(process)
        output = log.read_text(errors="replace")
        if process.returncode:
            raise StepsFailed(f"{reason(output, process.returncode)} (all of it: {log})", output)
        return output

    def kill(self, ranks: int, every: int) -> dict[str, int]:
        """A start that is killed some steps after its first checkpoint. Returns the steps it reached and lost.

        Raises StepsFailed where it comes to no checkpoint, or loses more than `every` steps.
        """
        process, log = self._start(ranks, (f"checkpoint.every={every}",))
        begin, first = time.monotonic(), None
        with killed_on_error(process):
            while first is None or self._step() < first + 5:
                time.sleep(0.05)
                if process.poll() is not None or time.monotonic() - begin > TIMEOUT:
                    output = log.read_text(errors="replace")
                    raise StepsFailed(f"no checkpoint to kill it after: {reason(output, 0)} (all of it: {log})", output)
                if first is None and find_checkpoints(self.run_dir):
                    first = self._step()
        kill(process)
        reached = self._step()
        saved = read_marker(find_checkpoints(self.run_dir)[-1]).state.step
        lost = reached - saved
        say(f"killed after step {reached}, newest checkpoint of step {saved}: {lost} steps lost, of {every} at most")
        if lost > every:
            output = log.read_text(errors="replace")
            raise StepsFailed(f"a kill lost {lost} steps, and checkpoint.every={every} allows {every} ({log})", output)
        return {"killed_at": reached, "lost": lost, "may_lose": every}

    def _start(self, ranks: int, overrides: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], Path]:
        options = self.options
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, str(ROOT / "train.py")]
        if ranks > (gpus := torch.cuda.device_count()) > 0:
            sharing = SHARED.format(gpus=" ".join(map(str, range(gpus))))
            command = [*torchrun, "--no-python", "bash", "-c", sharing, "bash", *command]
        elif ranks > 1:
            command = [*torchrun, *command[1:]]
        command += [
            f"model={options.model}",
            f"data.path={options.data.resolve()}",
            f"data.sequence_length={options.time}",
            f"training.micro_batch_size={min(options.micro_batch, options.batch // ranks)}",
            f"training.global_batch_size={options.batch}",
            "training.steps=1000",
            "schedule.warmup_steps=100",
            "evaluation.every=0",
            "checkpoint.keep=1",
            "logging.every=1",
            "logging.wandb.mode=disabled",
            f"run.dir={self.run_dir}",
            *options.set,
            *overrides,
        ]
        self.starts += 1
        log = options.out / f"{self.run_dir.name}-{self.starts}.log"
        say(f"{self.run_dir.name}, start {self.starts}: {ranks} rank(s), {' '.join(overrides)}")
        with open(log, "wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT), log

    def _step(self) -> int:
        """The last recorded step."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        return json.loads(lines[-1])["step"] if lines else 0


def cost(records: list[Record], output: str, every: int) -> dict[str, Any]:
    """What checkpoints cost that may be `every` steps apart, from the records of all steps and what the run printed.

    Raises StepsFailed where there are too few.
    """
    elapsed = {record["step"]: record["time/elapsed_seconds"] for record in records}
    seconds = {step: elapsed[step] - elapsed[step - 1] for step in elapsed if step - 1 in elapsed}
    found = SAVED.findall(output)
    at = [int(step) for step, *_ in found]
    if len(at) < 3:
        raise StepsFailed(f"{len(at)} checkpoints were written, and 3 are needed: look at the log for warnings", output)
    if len(at) > 3 and at[-1] - at[-2] < at[-2] - at[-3]:
        at.pop()  # that of the last step comes before its time
    # A record is written before the checkpoint of its step: the step after it has the wait.
    without = [seconds[step] for step in range(min(WARMUP, every // 2) + 1, at[0] + 1)]
    with_them = [seconds[step] for step in range(at[1] + 1, at[-1] + 1)]
    saved = []
    for step, megabytes, wrote, waited in found:
        after = seconds.get(int(step) + 1)
        saved.append(
            {
                "step": int(step),
                "bytes": float(megabytes.replace(",", "")) * 1e6,
                "write_seconds": float(wrote),
                "staging_seconds": float(waited) if waited else None,  # None: training waited for the write
                "stall_seconds": after - median(without) if after is not None else None,
            }
        )
    rates = {"without_seconds": mean(without), "with_seconds": mean(with_them)}
    return {"saved": saved, **rates, "ratio": rates["without_seconds"] / rates["with_seconds"]}


def largest(undisturbed: list[Record], records: list[Record]) -> float:
    """Largest absolute difference of the losses of the same steps; NaN where a loss is."""
    losses = {record["step"]: record["train/loss"] for record in undisturbed}
    differences = [abs(losses[record["step"]] - record["train/loss"]) for record in records]
    return max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)


def render(results: dict[str, Any]) -> str:
    """The results as Markdown."""

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f} s"

    def shared(ranks: int) -> str:
        gpus = results.get("gpus", 0)  # absent in older files
        return f", on {gpus} GPUs" if ranks > gpus > 0 else ""

    rows = [
        f"| {row['step']} | {row['bytes'] / 1e9:.2f} GB | {seconds(row['staging_seconds'])} | "
        f"{seconds(row['stall_seconds'])} | {seconds(row['write_seconds'])} |"
        for row in results["saved"]
    ]
    every = results["every"]
    parts = [
        f"    {results['command']}",
        machine(results["environment"]),
        f"{results['shape']}. Throughput with `checkpoint.every={every}` is {results['ratio']:.4f} of that "
        f"without ({results['with_seconds']:.3f} s and {results['without_seconds']:.3f} s a step).",
        "| checkpoint of step | size | training waited | next step longer by | write, checks |\n"
        "|---|---|---|---|---|\n" + "\n".join(rows),
    ]
    if "killed_at" not in results:
        return "\n\n".join(parts)
    resumed = [
        f"| {row['ranks']}{shared(row['ranks'])} | {row['from']} | {row['from'] + 1}–{row['to']} | {row['apart']:.1e} |"
        for row in results["resumed"]
    ]
    lost = f"{results['lost']} steps"
    if "may_lose" in results:  # not in older files
        lost += f", of {results['may_lose']} at most,"
    parts += [
        f"Killed (SIGKILL of all ranks) after step {results['killed_at']}: {lost} were made again. "
        f"Until then its losses and those of the undisturbed run differed by {results['apart_before']:.1e} at most.",
        "| resumed on ranks | from step | steps compared | largest difference of the loss |\n|---|---|---|---|\n"
        + "\n".join(resumed),
    ]
    return "\n\n".join(parts)


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What checkpoints cost, and whether a killed run goes on.")
    parser.add_argument("--data", type=Path, help="token shards, as scripts/prepare_data.py writes them")
    parser.add_argument("--out", type=Path, help="folder for checkpoints.json and logs")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, on a local disk (default: the system's)")
    parser.add_argument("--model", default="moda_700m", help="option of train.py")
    parser.add_argument("--gpus", type=int, default=2, help="ranks of the undisturbed and of the killed run")
    parser.add_argument("--resume-on", type=int, nargs="+", default=[1, 4], help="ranks, one after the other")
    parser.add_argument(
        "--every", type=int, default=100, help="steps between checkpoints; the run makes three times so many"
    )
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="instances of a step, on any number of ranks")
    parser.add_argument("--time", type=int, default=2048, help="tokens of an instance")
    parser.add_argument("--cost-only", action="store_true", help="without the run that is killed")
    parser.add_argument("--set", action="append", default=[], help="an override of train.py for all runs")
    parser.add_argument("--from", dest="results", type=Path, help="show these results, measure nothing")
    parser.add_argument("--docs", action="store_true", help="write the section of docs/benchmarks.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    console.run(main)
