"""Train a model: `python train.py model=moda_tiny data.path=SHARDS`; more with `--help` and in docs/configuration.md.

In: `configs/` and the command line. Out: a run directory for each job. Exit status: 0; 2 for a mistake of the user, in
one sentence before any file is made, and for a network between ranks that fails; 1 for a run that failed (in a sweep
the others still run); 75 when a rank died, stood still or never came (start it again); 128 + signal after a signal,
with a checkpoint.
"""

import gc
import os
import sys
import time
import traceback
from contextlib import suppress

if __name__ == "__main__":
    # Nothing of what is imported is garbage, and the collector would go through it all, again and again: a quarter of
    # the time that imports take. The training loop has it collect at chosen moments, and turns it on again.
    gc.disable()
# Waiting OpenMP threads sleep instead of spinning: on a CPU that is shared with others a run is ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from omegaconf import DictConfig

from data.shards import DataError
from models.config import ConfigError
from training.compose import Job, job_config, plan
from training.config import LostRankError, TrainingError
from training.environment import environment_warnings
from training.preflight import checked, on_gpu

# One voice a host, since shards and GPUs are the host's own: rank 0, and the first rank of other hosts.
SPEAKS = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def main(arguments: list[str]) -> int:
    """Run one command and return the exit status."""
    jobs: list[Job] | None = None
    try:
        planned = plan(arguments)
        with suppress(OSError):  # a log on a full disk
            print(planned.text, end="", flush=True)
        if planned.jobs and among_others():
            from training.rendezvous import presence

            presence()  # the others wait for as long as they hear of it
        jobs = [checked(job, say) for job in planned.jobs]  # all of them, before the first starts
        warn(jobs)
        if planned.hydra_arguments is None:
            return train_all(jobs) if jobs else 0
        sys.argv[1:] = planned.hydra_arguments
        launched()
        return 0
    except (ConfigError, DataError, TrainingError) as error:
        say(f"error: {error}")
        if jobs is None and among_others():
            tell_others(str(error))
        else:
            time.sleep(0 if SPEAKS else 2)  # torchrun stops all ranks when one ends: let the one that speaks be heard
        if isinstance(error, LostRankError):
            return 75
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        say("interrupted: the same command continues the last checkpoint, if any")
        return 130


def warn(jobs: list[Job]) -> None:
    """Lines for what is allowed, and probably not meant."""
    found = [text for job in jobs for text in job.config.warnings()]
    if any(on_gpu(job.config) for job in jobs):
        found += environment_warnings()
    for warning in dict.fromkeys(found):
        say(f"warning: {warning}")


def train_all(jobs: list[Job]) -> int:
    """Train one job after the other. Returns the exit status; what fails in a single job is raised."""
    # They import torch, which takes seconds: mistakes are answered before.
    from training.resume import choose_checkpoint
    from training.trainer import train

    if len(jobs) == 1:
        train(jobs[0].config)
        return 0
    for job in jobs:  # what cannot be continued is known before the first starts
        try:
            choose_checkpoint(job.config)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{error} (job {job.label})") from error
    failed = []
    for number, job in enumerate(jobs):
        say(f"job {number} of {len(jobs)}: {job.label} -> {job.config.run.dir}")
        try:
            train(job.config)
        except Exception as error:
            failed.append(f"{number} ({job.label})")
            explained = isinstance(error, ConfigError | DataError | TrainingError)
            say(f"error: {error}") if explained else traceback.print_exc()
    say(f"error: {len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}" if failed else f"{len(jobs)} jobs done")
    return 1 if failed else 0


def say(text: str) -> None:
    """A line for the user, once a host."""
    if SPEAKS:
        with suppress(OSError):  # a log on a full disk changes no exit status
            print(text, file=sys.stderr, flush=True)


def among_others() -> bool:
    """Whether this is one of several ranks, which will meet."""
    return "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def tell_others(sentence: str) -> None:
    """Let the other ranks end with the `sentence` for which this one cannot start, instead of waiting for it."""
    from training.rendezvous import presence

    try:
        told = presence().refuse(sentence)
    except ConfigError:  # the environment does not say where they are
        told = False
    if not told and not SPEAKS:
        with suppress(OSError):
            print(f"error: {sentence}", file=sys.stderr, flush=True)  # for want of a rank that would


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def launched(composed: DictConfig) -> None:
    """One job, in the process where a launcher of Hydra (joblib, submitit) has started it."""
    job = checked(Job(job_config(composed)))
    warn([job])  # of the host that the launcher has chosen
    train_all([job])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
