"""A whole preparation: every split of a source tokenized into one shards directory, safe to kill and to repeat.

In: a source, a tokenizer request, an output folder. Out: the shards directory described in `data.shards`, each split
with a folder for each part:

    SPLIT/00000/00000.bin ... manifest.json     a finished part: it is kept, whatever happens to the others
    SPLIT/00000/skipped.txt                     with on_error=skip: what was broken, by file and line
    SPLIT/manifest.json                         all parts are finished: the split is one dataset

A part depends on nothing but its own text and the settings (and, where duplicates are looked for, on which of its
documents repeat others), so parts can be made in any order, by any number of processes on any number of machines, again
and again, with the same bytes. Output made with other settings is refused, never mixed and never overwritten. After a
file of an unfinished split was repaired, the parts that do not hold it are kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from data.duplicates import HashPart, find_repeats, repeats_path
from data.filters import Duplicate, build_filters
from data.progress import progress_bar
from data.shards import (
    DTYPES,
    MANIFEST_NAME,
    DataError,
    Manifest,
    ShardFile,
    counted,
    dtype_for,
    parse_manifest,
    read_manifest,
    verify_checksums,
    write_manifest,
)
from data.sources import Part, Source, Split, TokenFile
from data.tokenize import TextTokenizer, load_tokenizer
from data.tokenized_parts import ON_ERROR, TokenizePart, undamaged, writing
from data.tokenizer_choice import (
    TokenizerRequest,
    check_fits,
    check_same_tokenizer,
    has_tokenizer,
    trained_tokenizer,
    write_tokenizer,
)
from data.workers import Job, run_jobs

SMALL = 10_000_000  # bytes of the source that one process prepares about as fast as several are started
DUPLICATES_NAME = "duplicates"  # folder inside a split while its duplicates are looked for
SPLITS = ("train", "validation/*", "*/train", "*/validation/*")  # where splits lie below an output


@dataclass
class PrepareOptions:
    """How the work is done. What changes the result is among the settings of a split, what does not is not."""

    tokens_per_file: int = 2**27
    dtype: str | None = None  # of the ids; None: the narrowest
    filters: list[dict[str, Any]] = field(default_factory=list)  # as `data.filters.build_filters` takes them
    on_error: str = "stop"  # or "skip"
    workers: int | None = None  # processes; None: one for each core
    task: int = 0  # this is the `task`-th of `tasks` commands, each of which makes its share of the parts
    tasks: int = 1

    def __post_init__(self) -> None:
        if self.tokens_per_file < 1:
            raise DataError(f"tokens_per_file={self.tokens_per_file} cannot be used: use a positive integer.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DataError(f"dtype={self.dtype} is unknown: choose {', '.join(DTYPES)}, or null for the narrowest.")
        if self.on_error not in ON_ERROR:
            raise DataError(f"on_error={self.on_error} is unknown: choose {' or '.join(ON_ERROR)}.")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"workers={self.workers} cannot be used: use at least 1, or null for one a core.")
        if not 0 <= self.task < self.tasks:
            raise DataError(f"task={self.task} of tasks={self.tasks} does not exist: count tasks from 0.")
        build_filters(self.filters)

    @property
    def finds_duplicates(self) -> bool:
        return any(isinstance(one, Duplicate) for _, one in build_filters(self.filters))


class WaitingForTasks(Exception):
    """This command did all it can; other tasks of the same preparation have to end first. Says what then to do."""


@dataclass
class _PlannedSplit:
    """An unfinished split, cut in parts."""

    split: Split
    folder: Path
    parts: Sequence[Part] | Sequence[TokenFile]
    settings: dict[str, Any]
    manifests: dict[int, Manifest] = field(default_factory=dict)  # of the finished parts

    def part_folder(self, index: int) -> Path:
        return self.folder / f"{index:05d}"

    @property
    def part_settings(self) -> dict[str, Any]:
        """Settings of the split that each of its parts depends on."""
        source = {key: value for key, value in self.settings["source"].items() if key != "files"}
        return self.settings | {"source": source}

    def hashes_path(self, index: int) -> Path:
        """Where the hashes of the documents of a part are: named by its text, so those of another are not taken."""
        return self.folder / DUPLICATES_NAME / f"{self._digest([self.parts[index].identity])}.npy"

    @property
    def repeats_folder(self) -> Path:
        """Where the repeats in the whole text of this split are."""
        return self.folder / DUPLICATES_NAME / self._digest([part.identity for part in self.parts])

    def _digest(self, identities: list[list[Any]]) -> str:
        content = json.dumps([self.part_settings["source"], identities], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def prepare(source: Source, request: TokenizerRequest, output: Path, options: PrepareOptions) -> dict[str, Manifest]:
    """Prepare every split of `source`; returns the manifests by split name (`train`, `validation/DOMAIN`).

    A split is declared finished when all its parts are, validation first and `train` last, so a directory with
    `train/manifest.json` is whole. With `options.tasks` > 1 only this task's parts are made and no split is declared:
    a command without tasks does that in the end, and raises nothing but what is wrong. Raises `DataError` before any
    work when `output` holds splits with other settings, and for broken input during it, and `WaitingForTasks`.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"output={output} is a file: name a folder.")
    source.check_output(output)
    splits = source.splits()
    tokenizer = None if request.trained else load_tokenizer(request.spec, request.eos_token)
    check_fits(request.vocab_size if tokenizer is None else tokenizer.vocab_size, request, options.dtype)
    settings = {split.name: _settings(split, request, tokenizer, options) for split in splits}
    finished = _finished(output, settings)
    for name in finished if options.tasks == 1 else ():  # tasks would all read everything; the last command does
        print(f"{name}: finished before, checking its checksums", flush=True)
        finished[name] = verify_checksums(output / name)
        _remove_duplicates(output / name)
    unfinished = [split for split in splits if split.name not in finished]
    if unfinished or not has_tokenizer(output, finished):
        if tokenizer is None:
            if options.tasks > 1:
                raise DataError(
                    "tokenizer=train cannot be shared out to tasks: train it by a command without tasks first."
                )
            tokenizer = trained_tokenizer(splits, request, options.on_error)
        check_same_tokenizer(tokenizer, finished, output)
        if options.tasks == 1:  # tasks would write it all at once; the command that ends the preparation does
            with writing(output):
                write_tokenizer(tokenizer, splits, output)
    if unfinished:
        assert tokenizer is not None
        planned = [_plan(split, output, settings[split.name], tokenizer, options) for split in unfinished]
        _make_parts(planned, tokenizer, options)
        if options.tasks > 1:
            missing = sum(len(plan.parts) - len(plan.manifests) for plan in planned)
            raise WaitingForTasks(
                f"task {options.task} of {options.tasks} is done, of all parts {missing} are not: when all tasks are "
                "done, give the command once more without task and tasks."
            )
        for plan in planned:
            with writing(plan.folder):
                finished[plan.split.name] = _join(plan, tokenizer, options)
    return {split.name: finished[split.name] for split in splits}


def summary(manifest: Manifest) -> str:
    """A token dataset in a few words, with what was left out of it and why."""
    lines = [
        f"{counted(manifest.documents, 'document')}, {manifest.tokens:,} tokens, "
        f"{manifest.bytes / 1e6:,.1f} MB of text ({manifest.bytes_per_token:.2f} bytes a token)"
    ]
    lines += [f"    left out: {count:,} ({reason})" for reason, count in manifest.filtered.items()]
    lines += [f"    skipped as broken: {count:,} ({kind})" for kind, count in manifest.broken.items()]
    return "\n".join(lines)


def _settings(
    split: Split, request: TokenizerRequest, tokenizer: TextTokenizer | None, options: PrepareOptions
) -> dict[str, Any]:
    """What decides the content of a split. `on_error` does not: with it stop, a part has nothing broken or is none."""
    if tokenizer is None:
        chosen: dict[str, Any] = {"trained_vocab_size": request.vocab_size}
    else:
        chosen = {"sha256": tokenizer.identity["sha256"], "eos_token": tokenizer.eos_token}
    return {
        "source": split.settings,
        "tokenizer": chosen,
        "tokens_per_file": options.tokens_per_file,
        "dtype": options.dtype,
        "filters": options.filters,
    }


def _finished(output: Path, settings: dict[str, dict[str, Any]]) -> dict[str, Manifest]:
    """Manifests of the splits that are done, all of which must have been asked for with the same settings."""
    found: dict[str, Manifest] = {}
    folders = sorted({folder for pattern in SPLITS for folder in output.glob(pattern) if folder.is_dir()})
    for folder in folders:
        name = folder.relative_to(output).as_posix()
        if not (folder / MANIFEST_NAME).exists():
            if name in settings:
                continue
            raise DataError(
                f"output={output} holds an unfinished {name}, which this source does not have: remove {folder}, or "
                "choose another output."
            )
        manifest = read_manifest(folder)
        if name not in settings:
            raise DataError(
                f"output={output} holds a finished {name} which this source does not have: remove {output}, or choose "
                "another output."
            )
        _check_same_settings(manifest.preparation, settings[name], f"a finished {name}", output)
        found[name] = manifest
    return found


def _check_same_settings(made: dict[str, Any], asked: dict[str, Any], what: str, output: Path) -> None:
    keys = [key for key in asked if made.get(key) != asked[key]]
    if not keys:
        return
    difference, remedy = f"made with {' and '.join(map(_other, keys))}", ""
    before, now = (settings.get("source", {}).get("revision") for settings in (made, asked))
    if before != now and before and now:
        difference += f" (revision {before}, now {now})"
        remedy = f"add source.revision={before} to go on with that text, "
    raise DataError(f"output={output} holds {what} {difference}: {remedy}remove {output}, or choose another output.")


def _other(key: str) -> str:
    return f"other {key}" if key == "filters" else f"another {key}"


def _plan(
    split: Split, output: Path, settings: dict[str, Any], tokenizer: TextTokenizer, options: PrepareOptions
) -> _PlannedSplit:
    """The parts of a split, and which of them are finished, undamaged and made of the same text.

    All must have the same settings. That some have another text happens when a file is repaired, and they are made
    again; when all have, the source is another one. A task reads only the parts of its share for their checksums.
    """
    plan = _PlannedSplit(split, output / split.name, split.parts(), settings)
    changed = damaged = 0
    for folder in sorted(plan.folder.glob("[0-9]*/")):
        if not (path := folder / MANIFEST_NAME).exists():
            continue
        manifest, index = parse_manifest(path.read_bytes(), path), int(folder.name)
        _check_same_settings(manifest.preparation, plan.part_settings, f"a part of an unfinished {split.name}", output)
        check_same_tokenizer(tokenizer, {split.name: manifest}, output)
        if index >= len(plan.parts) or manifest.preparation.get("part") != plan.parts[index].identity:
            changed += 1
        elif index % options.tasks == options.task and not undamaged(folder):
            damaged += 1
        else:
            plan.manifests[index] = manifest
    if changed and not damaged and not plan.manifests:
        raise DataError(
            f"output={output} holds an unfinished {split.name} whose finished parts are all of other files, or of "
            f"files that have changed: remove {plan.folder}, or choose another output."
        )
    if changed:
        print(f"{split.name}: {changed} of the finished parts hold files that have changed: made again", flush=True)
    return plan


def _make_parts(planned: list[_PlannedSplit], tokenizer: TextTokenizer, options: PrepareOptions) -> None:
    """Make the parts of this task that are not there yet."""
    if options.filters and any(isinstance(part, TokenFile) for plan in planned for part in plan.parts):
        raise DataError("filters cannot be used with source=token_files, whose documents are taken as they are.")
    if options.finds_duplicates:
        _find_duplicates(planned, tokenizer, options)
    places = [
        (plan, index)
        for plan in planned
        for index in range(len(plan.parts))
        if index not in plan.manifests and index % options.tasks == options.task
    ]
    work = sum(plan.parts[index].size or SMALL for plan, index in places)
    processes, threads = _processes_and_threads(options, len(places), work)
    jobs = [_tokenize_job(plan, index, threads, tokenizer, options) for plan, index in places]
    done = sum(plan.parts[index].size or 0 for plan in planned for index in plan.manifests)
    if kept := sum(len(plan.manifests) for plan in planned):
        every = sum(len(plan.parts) for plan in planned)
        print(f"{kept} of {every} parts were finished before and are kept", flush=True)
    for index, manifest in _run(jobs, "tokenizing", planned, done, processes, threads, tokenizer, options.tasks):
        plan, part_index = places[index]
        plan.manifests[part_index] = manifest


def _tokenize_job(
    plan: _PlannedSplit, index: int, threads: int, tokenizer: TextTokenizer, options: PrepareOptions
) -> TokenizePart:
    repeats = repeats_path(plan.repeats_folder, index) if options.finds_duplicates else None
    return TokenizePart(
        part=plan.parts[index],
        folder=plan.part_folder(index),
        dtype=options.dtype or dtype_for(tokenizer.vocab_size),
        tokens_per_file=options.tokens_per_file,
        preparation=plan.part_settings | {"part": plan.parts[index].identity, "repeats": _digest_of(repeats)},
        filters=options.filters,
        repeats=repeats,
        on_error=options.on_error,
        threads=threads,
    )


def _find_duplicates(planned: list[_PlannedSplit], tokenizer: TextTokenizer, options: PrepareOptions) -> None:
    """Hash the parts of this task, and, once all parts are hashed, find what each has to leave out.

    Finished parts that have left out something else, as a file of another part was repaired since, are made again.
    """
    jobs: list[Job] = []
    for plan in planned:
        with writing(plan.folder):
            (plan.folder / DUPLICATES_NAME).mkdir(parents=True, exist_ok=True)
        for index, part in enumerate(plan.parts):
            path = plan.hashes_path(index)
            if index % options.tasks == options.task and not path.exists():
                jobs.append(HashPart(cast(Part, part), path))  # token files have no filters
    processes, threads = _processes_and_threads(options, len(jobs), SMALL)
    _run(jobs, "looking for duplicates", planned, 0, processes, threads, tokenizer, options.tasks)
    for plan in planned:
        hashes = [plan.hashes_path(index) for index in range(len(plan.parts))]
        missing = sum(not path.exists() for path in hashes)
        if missing:
            raise WaitingForTasks(
                f"task {options.task} of {options.tasks} has hashed its parts, other tasks {missing} parts of "
                f"{plan.split.name} not yet: give the same command again when they have."
            )
        find_repeats(hashes, plan.repeats_folder)
        for index, manifest in list(plan.manifests.items()):
            if manifest.preparation["repeats"] != _digest_of(repeats_path(plan.repeats_folder, index)):
                del plan.manifests[index]


def _digest_of(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _remove_duplicates(split: Path) -> None:
    shutil.rmtree(split / DUPLICATES_NAME, ignore_errors=True)


def _run(
    jobs: Sequence[Job],
    label: str,
    planned: list[_PlannedSplit],
    done: int,
    processes: int,
    threads: int,
    tokenizer: TextTokenizer,
    tasks: int,
) -> list[tuple[int, Any]]:
    """Run `jobs` behind a progress bar over the whole source; returns (index, result) as they ended."""
    if not jobs:
        return []
    sizes = [part.size for plan in planned for part in plan.parts]
    total = None if None in sizes or tasks > 1 else sum(size or 0 for size in sizes)
    with progress_bar(label, total, planned[0].split.unit) as bar:
        bar.update(done)
        tokens = Counter[str]()

        def report(read: int, made: int) -> None:
            tokens["made"] += made
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{tokens['made'] / seconds / 1e6:.2f} M tokens/s", refresh=False)
            bar.update(read)

        make = functools.partial(TextTokenizer, tokenizer.content, tokenizer.name, tokenizer.eos_token)
        return list(run_jobs(jobs, make, processes=processes, threads=threads, report=report))


def _processes_and_threads(options: PrepareOptions, jobs: int, work: int) -> tuple[int, int]:
    """How many processes `jobs` jobs run in, and how many threads encode in each; little work is not spread out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = options.workers or (cores if work >= SMALL else 1)
    processes = max(1, min(wanted, jobs))
    return processes, max(1, cores // processes)


def _join(plan: _PlannedSplit, tokenizer: TextTokenizer, options: PrepareOptions) -> Manifest:
    """Declare a split finished, all of whose parts are: its manifest lists the files of theirs."""
    manifests = [plan.manifests[index] for index in range(len(plan.parts))]
    filtered: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    files = []
    for index, manifest in enumerate(manifests):
        filtered.update(manifest.filtered)
        broken.update(manifest.broken)
        name = plan.part_folder(index).name
        files += [ShardFile(f"{name}/{file.name}", file.tokens, file.bytes, file.sha256) for file in manifest.files]
    joined = Manifest(
        dtype=options.dtype or dtype_for(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.identity,
        eos_id=tokenizer.eos_id,
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
        files=files,
        preparation=plan.settings,
        filtered=dict(sorted(filtered.items())),
        broken=dict(sorted(broken.items())),
    )
    if not joined.tokens:
        left = "; ".join(f"{count:,} {reason}" for reason, count in (filtered + broken).items())
        raise DataError(
            f"no document is left for {plan.folder} ({left or 'the source has no text'}): look at the text that it is "
            "made of, at source.text_field and at filters."
        )
    if not joined.documents:  # token files alone: every text ends with an EOS
        raise DataError(
            f"no document ends in the {counted(joined.tokens, 'token')} of {plan.folder}: none of its files holds "
            f"{tokenizer.eos_token} (id {tokenizer.eos_id}), so name the tokenizer, eos_token and dtype they were made "
            "with."
        )
    for folder in plan.folder.glob("[0-9]*/"):  # left by an attempt that cut the source in more parts and finished none
        if int(folder.name) >= len(plan.parts):
            shutil.rmtree(folder)
    write_manifest(plan.folder, joined)
    _remove_duplicates(plan.folder)
    print(f"{plan.split.name}: {summary(joined)}", flush=True)
    return joined
