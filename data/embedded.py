"""A corpus that exists on any machine without a network: the documentation inside Python and the installed packages.

In: the standard library and the packages that `requirements.txt` brings (read as files, nothing is imported). Out: a
folder in C4's format (gzip JSON lines with `text`, `timestamp`, `url`):

    embedded-train.00000-of-000NN.json.gz ...
    validation/documentation.json.gz   held-out manual pages, package descriptions, text files
    validation/docstrings.json.gz      held-out modules of packages whose other modules are trained on
    validation/library.json.gz         a whole package (fontTools) that training never sees
    corpus.json                        how it was made; written last

The same machine gives the same bytes each time. Prose is kept; code, tables, licences and repeats are dropped. Repeats
are found over the whole corpus, so no paragraph of a validation file, its title included, stands in the training text.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.interruption import signals_blocked
from data.progress import progress_bar
from data.shards import DataError, write_atomically

DOMAINS = ("documentation", "docstrings", "library")
MARKER_NAME = "corpus.json"
# Read in this order until the corpus is large enough; the last holds the most code for its prose.
# fmt: off
PACKAGES = (
    "torch", "numpy", "pandas", "networkx", "matplotlib", "sympy", "huggingface_hub", "datasets", "wandb", "mpmath",
    "fsspec", "PIL", "pyarrow", "jinja2", "click", "triton", "tqdm", "omegaconf", "hydra", "dateutil", "yaml", "httpx",
    "anyio", "packaging", "filelock", "pydantic", "pyparsing", "kiwisolver", "contourpy", "cycler", "tokenizers",
    "safetensors", "multiprocess", "dill", "xxhash", "regex", "requests", "urllib3", "transformers",
)
# fmt: on
HELD_OUT_PACKAGE = "fontTools"
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "testing",
    "_vendor",
    "vendor",
    "vendored",
    "site-packages",
    "__pycache__",
    "idlelib",
}
HELD_OUT_SHARE = {"documentation": 0.3, "docstrings": 0.04}  # of the documents, chosen by a hash of their names
DOCUMENTATION_SHARE = 0.25  # of the corpus at most, so that a small corpus has docstrings too
VALIDATION_SHARE = 0.05  # of `max_megabytes`: the most text a validation domain may have
SHARD_MEGABYTES = 4  # text in one training file
MIN_DOCUMENT_CHARACTERS = 200
SHINGLE_WORDS = 8  # near repeats: more than half of a paragraph's sampled runs of this many words were seen before

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"^\W+$")
_UNWANTED = re.compile(r"copyright|licen[sc]e|warrant|redistribut|all rights reserved|\w@\w+\.\w", re.IGNORECASE)
_MARKUP_LINE = re.compile(r"^\s*(<|\[?!\[|\.\. |:\w+:\s*\S*$|\|.*\|$)")
_PROMPT = re.compile(r"^\s*(>>>|\.\.\. |In \[|Out\[|\$ |% )")
_WORD = re.compile(r"[^\W\d_]+")
# fmt: off
_COMMON = {
    "a", "an", "and", "are", "be", "by", "for", "if", "in", "is", "not", "of", "or", "that", "the", "this", "to",
    "with",
}
# fmt: on


@dataclass
class Document:
    """A text on its way into the corpus."""

    name: str  # where it comes from, the same on every machine with these versions
    kind: str  # documentation, docstrings or library
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def build_corpus(folder: Path, max_megabytes: float) -> None:
    """Write the corpus to `folder`, or keep the one that is there if it was made with the same `max_megabytes`.

    Raises `DataError` when `folder` holds something else, or when this machine has less than 1 MB of usable text.
    """
    if max_megabytes < 1:
        raise DataError(f"source.max_megabytes={max_megabytes} is too little for a corpus: use at least 1.")
    marker = folder / MARKER_NAME
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8"))["max_megabytes"] == max_megabytes:
        return
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise DataError(
            f"{folder} holds other files, so the corpus cannot be written there: choose another source.path."
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "validation").mkdir(parents=True)
    with contextlib.closing(_all_documents()) as found:  # closed early, it ends its processes
        train, validation = _select(found, int(max_megabytes * 1e6))
    size = sum(len(document.text) for document in train)
    if size < 1e6 or not all(validation.values()):
        raise DataError(
            f"only {size / 1e6:.1f} MB of documentation was found in this Python and its packages: install "
            f"requirements.txt in full, or use source=files."
        )
    train.sort(key=lambda document: _hash(document.name))
    shards = max(1, round(size / (SHARD_MEGABYTES * 1e6)))
    for index in range(shards):
        name = f"embedded-train.{index:05d}-of-{shards:05d}.json.gz"
        _write_c4_file(partial / name, train[index::shards])
    for domain, documents in validation.items():
        _write_c4_file(partial / "validation" / f"{domain}.json.gz", documents)
    made = {"max_megabytes": max_megabytes, "python": sys.version.split()[0], "training_characters": size}
    made["characters"] = {domain: sum(len(d.text) for d in documents) for domain, documents in validation.items()}
    write_atomically(partial / MARKER_NAME, (json.dumps(made, indent=1) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _select(documents: Iterable[Document], limit: int) -> tuple[list[Document], dict[str, list[Document]]]:
    """Split documents in training and validation, drop repeats, stop at `limit` characters of training text."""
    repeats = _Repeats()
    train: list[Document] = []
    validation: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}
    room = dict.fromkeys(DOMAINS, int(limit * VALIDATION_SHARE))
    room["train/documentation"] = int(limit * DOCUMENTATION_SHARE)
    room["train"] = limit
    with progress_bar("collecting text", limit, "B") as bar:
        for document in documents:
            if room["train"] <= 0:
                break
            held_out = document.kind == "library" or _hash(document.name) < HELD_OUT_SHARE[document.kind]
            purpose = document.kind if held_out else f"train/{document.kind}"
            if room.get(purpose, limit) <= 0:
                continue
            document.paragraphs = [paragraph for paragraph in document.paragraphs if repeats.is_new(paragraph)]
            size = len(document.text)
            if size < MIN_DOCUMENT_CHARACTERS:
                continue
            if purpose in room:
                room[purpose] -= size
            if held_out:
                validation[document.kind].append(document)
            else:
                train.append(document)
                room["train"] -= size
                bar.update(size)
    return train, validation


class _Repeats:
    """Remembers paragraphs; exact and near repeats of earlier ones are not new."""

    def __init__(self) -> None:
        self._paragraphs: set[str] = set()
        self._shingles: set[str] = set()
        self._sampled: dict[str, bool] = {}

    def is_new(self, paragraph: str) -> bool:
        words = _WORD.findall(paragraph.lower())
        key = " ".join(words)
        if key in self._paragraphs:
            return False
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in self._anchors(words)}
        if shingles and 2 * len(shingles & self._shingles) > len(shingles):
            return False
        self._paragraphs.add(key)
        self._shingles |= shingles
        return True

    def _anchors(self, words: list[str]) -> Iterator[int]:
        """Where sampled runs begin: at a third of all words, chosen by the word itself, so repeats sample alike."""
        for i in range(len(words) - SHINGLE_WORDS + 1):
            word = words[i]
            if word not in self._sampled:
                self._sampled[word] = _hash(word) < 1 / 3
            if self._sampled[word]:
                yield i


def _all_documents() -> Generator[Document, None, None]:
    """Documents of this machine in a fixed order: the held-out package, documentation, then docstrings by package."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    folders = {name: folder for name in [HELD_OUT_PACKAGE, *PACKAGES] if (folder := _package_folder(name)) is not None}
    spawning = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(4, multiprocessing.cpu_count()), spawning, initializer=_end_with_parent)
    try:

        def docstrings(package: str, folder: Path, kind: str) -> Iterator[Document]:
            paths = _files(folder, ".py")
            jobs = [(str(path), f"{package}/{path.relative_to(folder).as_posix()}", kind) for path in paths]
            with signals_blocked():  # the parent alone hears of Ctrl-C, and ends the others
                documents = executor.map(_read_docstrings, jobs, chunksize=8)
            for document in documents:
                if document is not None:
                    yield document

        if HELD_OUT_PACKAGE in folders:
            yield from docstrings(HELD_OUT_PACKAGE, folders.pop(HELD_OUT_PACKAGE), "library")
        yield from _documentation(stdlib, folders)
        yield from docstrings("python", stdlib, "docstrings")
        for package, folder in folders.items():
            yield from docstrings(package, folder, "docstrings")
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """See to it that this process, which waits for work, does not outlive the one that would give it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="end with the parent", daemon=True).start()


def _package_folder(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)  # of a top-level name: finds, does not import
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _files(folder: Path, *suffixes: str) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.suffix in suffixes)
    kept = (path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts))
    return sorted(kept, key=lambda path: path.relative_to(folder).as_posix())


def _documentation(stdlib: Path, folders: dict[str, Path]) -> Iterator[Document]:
    """Manual pages of the language, descriptions of the packages, text files inside them."""
    topics = stdlib / "pydoc_data" / "topics.py"
    if topics.exists():
        for node in ast.parse(topics.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                for name, page in sorted(ast.literal_eval(node.value).items()):
                    yield Document(f"pydoc_data/topics/{name}", "documentation", prose(page))
    owners = importlib.metadata.packages_distributions()
    for name in sorted({owner for package in folders for owner in owners.get(package, [])}):
        _, _, description = (importlib.metadata.distribution(name).read_text("METADATA") or "").partition("\n\n")
        yield Document(f"{name}/METADATA", "documentation", prose(description))
    for folder in folders.values():
        for path in _files(folder, ".md", ".rst", ".txt"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield Document(f"{folder.name}/{path.relative_to(folder).as_posix()}", "documentation", prose(text))


def _read_docstrings(job: tuple[str, str, str]) -> Document | None:
    """The docstrings of one Python file as one document, definitions in source order, each below its name."""
    path, name, kind = job
    source = Path(path).read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    paragraphs = []
    for title, docstring in _docstrings(tree, ""):
        kept = prose(docstring)
        if kept and title:
            kept[0] = f"{title}\n{kept[0]}"
        paragraphs += kept
    return Document(name, kind, paragraphs) if paragraphs else None


def _docstrings(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module or class and all it defines, but for definitions inside functions."""
    if isinstance(node, ast.Module) and (docstring := ast.get_docstring(node)):
        yield "", docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(child):
                yield prefix + child.name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            # How compiled functions get theirs: add_docstr(torch.abs, r"""...""")
            for inner in ast.walk(child):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and "\n" in inner.value:
                    yield "", textwrap.dedent(inner.value)


def prose(text: str) -> list[str]:
    """The paragraphs of `text` that read as English: code, prompts, tables, markup, licences and addresses left out."""
    text = _FENCE.sub("", text.expandtabs().encode("utf-8", "ignore").decode())
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in paragraph.splitlines()]
        lines = [line for line in lines if line and not _RULE.match(line) and not _MARKUP_LINE.match(line)]
        if not lines or any(_PROMPT.match(line) for line in lines):
            continue
        clean = textwrap.dedent("\n".join(lines)).strip()
        if _is_prose(clean):
            kept.append(clean)
    return kept


def _is_prose(paragraph: str) -> bool:
    words = _WORD.findall(paragraph.lower())
    if len(words) < 5 or _UNWANTED.search(paragraph):
        return False
    characters = len(paragraph) - paragraph.count(" ") - paragraph.count("\n")
    letters = sum(map(len, words))
    ascii_share = len(paragraph.encode("ascii", "ignore")) / len(paragraph)
    longest = max(map(len, paragraph.split()))
    return letters >= 0.75 * characters and ascii_share >= 0.97 and longest <= 80 and not _COMMON.isdisjoint(words)


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone (Python's own hash changes from process to process)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _write_c4_file(path: Path, documents: list[Document]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as file:
        for document in documents:
            row = {"text": document.text, "timestamp": "2026-01-01T00:00:00Z", "url": f"python:{document.name}"}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
