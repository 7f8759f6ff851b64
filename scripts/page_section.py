"""The generated section of a documentation page: between two comments, and nothing outside them is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.shards import write_atomically


class PageError(ValueError):
    """A page that cannot take the section; the message says why in one sentence."""


@dataclass(frozen=True)
class PageSection:
    """The section that a script writes."""

    name: str
    script: str

    @property
    def begin(self) -> str:
        """The comment before it."""
        return f"<!-- {self.name}: begin, written by {self.script} -->"

    @property
    def end(self) -> str:
        """The comment after it."""
        return f"<!-- {self.name}: end -->"

    def check(self, page: Path) -> None:
        """Raise PageError unless the page has the two comments, each once, in order."""
        if not page.is_file():
            raise PageError(f"{page} does not exist: run this from the repository, or leave --docs away.")
        text = page.read_text(encoding="utf-8")
        begin, end = self.begin, self.end
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise PageError(f"{page} must hold the lines {begin!r} and {end!r} once each, in this order.")

    def replace(self, page: Path, content: str) -> None:
        """Write the section's content into the page. Raises PageError as `check`."""
        self.check(page)
        before, rest = page.read_text(encoding="utf-8").split(self.begin)
        after = rest.split(self.end)[1]
        write_atomically(page, f"{before}{self.begin}\n\n{content}\n\n{self.end}{after}".encode())
