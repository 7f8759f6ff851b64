"""What prepared data is: `python scripts/inspect_data.py SHARDS`; several folders with weights show a mixture.

In: shards directories, as scripts/prepare_data.py writes them. Out: a report on standard output; on request decoded
instances, a histogram of ids, the checksums verified, the overlap of validation with training, a picture of a batch.
Exit status: 0; 1 when something is not as it should be; 2 for a mistake of the user.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data.mixture import InstanceStream
from data.overlap import Overlap, OverlapFinder
from data.packing import PackedDataset
from data.picture import draw_batch
from data.remote import localized
from data.shards import (
    TOKENIZER_NAME,
    DataError,
    Instances,
    TokenDataset,
    TokenStream,
    check_shards_dir,
    check_tokenizer,
    counted,
    read_manifest,
    validation_domains,
    verify_checksums,
)
from data.statistics import statistics
from scripts.console import run

PICTURES = (".png", ".pdf", ".svg", ".jpg")
MOST_INSTANCES = 100_000  # shown by one command


def main(arguments: list[str] | None = None) -> int:
    """Report as the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="shards directory or its address; PATH=WEIGHT in a mixture")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens of an instance (4096)")
    parser.add_argument("--packing", choices=("none", "best_fit"), default="none")
    parser.add_argument("--seed", type=int, default=0, help="of the order, as training.seed")
    parser.add_argument("--instances", type=int, default=0, metavar="N", help="show the first N of a run, decoded")
    parser.add_argument("--position", type=int, default=0, help="where in the stream to begin with them")
    parser.add_argument("--histogram", action="store_true", help="read everything: ids, lengths of documents")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    parser.add_argument("--overlap", type=int, metavar="N", help="N-grams that validation and training share")
    parser.add_argument("--windows", type=int, metavar="W", help="shares of a mixture over windows of W")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw a batch, as windows and packed")
    parser.add_argument("--cache", type=Path, help="folder for copies of remote shards")
    options = parser.parse_args(arguments)
    try:
        return 1 if Inspection(options).run() else 0
    except BrokenPipeError:
        raise
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Inspection:
    """One run of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        for name, least in (("sequence-length", 1), ("instances", 0), ("position", 0), ("overlap", 1), ("windows", 1)):
            value = getattr(options, name.replace("-", "_"))
            if value is not None and value < least:
                raise DataError(f"--{name} {value} cannot be used: use {least} or more.")
        if options.instances > MOST_INSTANCES:
            raise DataError(f"--instances {options.instances} cannot be used: use at most {MOST_INSTANCES:,}.")
        if options.picture is not None and not options.picture.absolute().parent.is_dir():
            raise DataError(f"--picture {options.picture} cannot be written: its folder does not exist.")
        if options.picture is not None and options.picture.suffix.lower() not in PICTURES:
            raise DataError(f"--picture {options.picture} cannot be drawn: name it {', '.join(PICTURES)}.")
        self.weights: list[float] = []
        self.roots: list[Path] = []
        for entry in options.shards:
            path, equals, weight = entry.rpartition("=")
            try:
                self.weights.append(float(weight) if equals else 1.0)
            except ValueError:
                raise DataError(f"{entry} cannot be read: write PATH=WEIGHT with a number, or PATH alone.") from None
            if not 0 < self.weights[-1] < math.inf:
                raise DataError(f"{entry} cannot be used: write PATH=WEIGHT with a positive number, or PATH alone.")
            self.roots.append(localized(path if equals else entry, options.cache, print))
            check_shards_dir(self.roots[-1])
            check_tokenizer(self.roots[-1])
        self.problems: list[str] = []
        self._streams: dict[str, InstanceStream] = {}  # by packing

    def run(self) -> list[str]:
        """Print all that was asked for. Returns what is not as it should be."""
        for root in self.roots:
            self._describe(root)
        if self.options.windows or len(self.roots) > 1:
            self._mixture()
        if self.options.instances:
            self._instances()
        if self.options.picture is not None:
            self._picture()
        for problem in self.problems:
            print(f"problem: {problem}")
        return self.problems

    def _describe(self, root: Path) -> None:
        """The splits of one shards directory, with what was asked for of each."""
        options = self.options
        names = ["train", *(f"validation/{domain}" for domain in validation_domains(root))]
        print(f"{root}")
        for name in names:
            manifest = read_manifest(root / name)
            print(
                f"  {name}: {counted(manifest.documents, 'document')}, {manifest.tokens:,} tokens, "
                f"{manifest.bytes:,} bytes of text ({manifest.bytes_per_token:.3f} a token) | "
                f"{counted(len(manifest.files), 'file')} of {manifest.dtype} | fingerprint {manifest.fingerprint}"
            )
            for what, counts in (("left out by filters", manifest.filtered), ("broken input", manifest.broken)):
                if counts:
                    print(f"    {what}: {', '.join(f'{count:,} {reason}' for reason, count in counts.items())}")
        manifest = read_manifest(root / "train")
        print(
            f"  tokenizer {manifest.tokenizer['name']} ({manifest.tokenizer['sha256'][:16]}), "
            f"{manifest.vocab_size:,} ids, EOS {manifest.eos_id}"
        )
        if not (root / TOKENIZER_NAME).exists():
            print(f"  {root / TOKENIZER_NAME} is missing: text is shown as the numbers of its ids")
        for key, value in manifest.preparation.items():
            print(f"  made with {key}: {json.dumps(value)}")
        for name in names:
            if options.verify:
                try:
                    verify_checksums(root / name)
                    print(f"  {name}: the checksums of all files are right")
                except DataError as error:
                    self.problems.append(str(error))
            if options.histogram:
                self._histogram(root, name)
        for name in names[1:]:
            if options.overlap:
                self._overlap(root, name)

    def _histogram(self, root: Path, name: str) -> None:
        found = statistics(TokenStream(root / name))
        total = int(found.counts.sum())
        print(
            f"  {name}: {found.used:,} of {read_manifest(root / name).vocab_size:,} ids occur, "
            f"entropy {found.entropy():.3f} nats; longest document {found.longest:,} tokens"
        )
        decode = _Decoder(root)
        for token, count in found.most_frequent(20):
            share = count / total
            print(f"    {token:>7} {decode([token])!r:<16} {share:7.3%} {'█' * round(share * 400)}")
        print("    documents by length:")
        for power in np.flatnonzero(found.lengths).tolist():
            share = found.lengths[power] / max(found.documents, 1)
            print(f"    {2**power:>9,} to {2 ** (power + 1) - 1:>9,} {share:7.2%} {'█' * round(share * 60)}")
        self.problems += [f"{root / name}: {problem}" for problem in found.problems]

    def _overlap(self, root: Path, name: str) -> None:
        finder = OverlapFinder(TokenStream(root / name), self.options.overlap)
        for other in self.roots:  # validation of one dataset may stand in the training data of another
            finder.scan(TokenStream(other / "train"))
        found: Overlap = finder.report()
        if not found.ngrams:
            print(f"  {name}: no document is as long as {found.ngram} tokens: use a smaller --overlap")
            return
        print(
            f"  {name}: {found.found / found.ngrams:.3%} of its {found.ngrams:,} {found.ngram}-grams occur in "
            f"training; {found.touched:,} of {found.documents:,} documents have one, "
            f"{found.covered:,} have half of theirs there"
        )
        stream, decode = TokenStream(root / name), _Decoder(root)
        for share, begin, length in found.worst:
            ids = np.empty(min(length, 40), dtype=np.int64)
            stream.read(begin, ids)
            print(f"    {share:6.1%} of {decode(ids.tolist())!r} ...")

    def _stream(self, packing: str) -> InstanceStream:
        if packing not in self._streams:
            self._streams[packing] = self._opened(packing)
        return self._streams[packing]

    def _opened(self, packing: str) -> InstanceStream:
        length = self.options.sequence_length
        kind: type[PackedDataset] | type[TokenDataset] = PackedDataset if packing == "best_fit" else TokenDataset
        datasets: list[Instances] = [kind(root / "train", length) for root in self.roots]
        for dataset in datasets:
            if isinstance(dataset, PackedDataset):
                print(f"packed {dataset.stream.folder}: {dataset.report}")
        return InstanceStream(datasets, self.weights, self.options.seed)

    def _mixture(self) -> None:
        """Shares of the datasets, exact and measured over windows of the first 100,000 windows or 10 M positions."""
        stream, window = self._stream(self.options.packing), self.options.windows or 1024
        count = max(1, min(100_000, 10_000_000 // window))
        numbers = stream.datasets_at(np.arange(count * window))
        print(f"mixture, period {stream.period:,}; instances of each dataset in {count:,} windows of {window:,}:")
        print(f"  {'dataset':<40} {'share':>8} {'wanted':>9} {'least':>9} {'most':>9} {'mean':>11}")
        for number, source in enumerate(stream.sources):
            held = (numbers == number).reshape(count, window).sum(1)
            wanted = window * stream.counts[number] / stream.period
            print(
                f"  {source.path:<40} {source.share:>8} {wanted:9.2f} {held.min():9d} {held.max():9d} "
                f"{held.mean():11.4f}"
            )
            print(f"    {json.dumps(asdict(source))}")

    def _instances(self) -> None:
        stream = self._stream(self.options.packing)
        positions = np.arange(self.options.position, self.options.position + self.options.instances)
        numbers, indices = stream.locate(positions)
        located = zip(numbers.tolist(), indices.tolist(), stream.epochs(positions).tolist(), strict=True)
        for row, (number, index, epoch) in zip(stream.rows(numbers, indices), located, strict=True):
            again = f", epoch {epoch + 1}" if epoch else ""
            print(f"instance {index} of {stream.datasets[number].stream.folder}{again}")
            decode = _Decoder(self.roots[number])
            begin = 0
            for end in [*(np.flatnonzero(row == stream.eos_id) + 1).tolist(), len(row)]:
                part = row[begin:end]
                padding = (part < 0).all()
                ids = np.where(part < 0, ~part, part)
                if len(part):
                    text = f"({len(part)} places of padding)" if padding else decode(ids.tolist())
                    print(f"  [{begin:>6} .. {end - 1:>6}] {text!r}" if not padding else f"  [{begin:>6} ..] {text}")
                begin = end

    def _picture(self) -> None:
        groups = []
        for packing in ("none", "best_fit"):
            stream = self._stream(packing)
            numbers, indices = stream.locate(np.arange(self.options.position, self.options.position + 16))
            title = "windows of the stream (data.packing=none)" if packing == "none" else "data.packing=best_fit"
            groups.append((title, stream.rows(numbers, indices), numbers))
        names = [root.name for root in self.roots]
        draw_batch(groups, names, stream.eos_id, self.options.picture)
        print(f"picture {self.options.picture}")


class _Decoder:
    """Ids to text with the tokenizer of a shards directory, or to the ids themselves where it has none."""

    def __init__(self, root: Path) -> None:
        self._tokenizer = None
        if (root / TOKENIZER_NAME).exists():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(root / TOKENIZER_NAME))

    def __call__(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids, skip_special_tokens=False)


if __name__ == "__main__":
    run(main)
