"""`megalith data urls`: lists of URLs without those that lead to no text; fetching them is left to a crawler.

Lines of text files are URLs; in JSON lines and parquet they are under a key. The order stays, and of equal ones the
first.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import ipaddress
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megalith.common.extras import require
from megalith.curation.dedup.occurrences import FirstPlaces, first_occurrences
from megalith.curation.dedup.signatures import digest, normal_url
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import UrlsSettings

HOST = re.compile(r"(?=.{1,253}$)(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_][\w-]{1,62}")
FORBIDDEN = re.compile(r"[\s\x00-\x1f<>\"{}|\\^`]")  # RFC 3986, appendix A: in no URL unescaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Urls(UrlsSettings, Command):
    """The step `megalith data urls`."""

    name = "urls"
    drops = True
    text_key = "url"
    lines = True

    def check(self) -> None:
        """Raise MissingPackage without tldextract."""
        require("tldextract", "data urls")

    def files(self, output: str) -> Iterable[str]:
        """The lists."""
        return [path for path in (self.domains, self.extensions) if path]

    def run(self, run: Run) -> dict[str, Any]:
        """Filter by rules; then keep the first of equal ones."""
        checked = run.step_pass(FilterUrls(self), "rules")
        count = checked.total("kept")
        with run.clock("repeated"):
            path = (run.folder / "first.bin").resolve()
            # Half of a digest of 16 bytes: two of 10^8 URLs share it with a probability of 0.03 %.
            first_occurrences(lambda: checked.arrays("hashes", np.uint64), count, path)
        done = run.step_pass(FirstUrls(self, str(path), checked.starts("kept")), "first", final=True)
        run.assemble_documents(done)
        return {"kept": done.total("kept"), "kept_bytes": done.total("kept_bytes"), "rules": run.rules(done)}


@dataclasses.dataclass
class FilterUrls(Step):
    """The rules; writes the hash of each URL that they let pass."""

    settings: Urls
    name = "urls"
    writes = False

    def load(self) -> None:
        """Read the lists; tldextract reads the list of suffixes in its package, not the network's."""
        self.extract = require("tldextract", "data urls").TLDExtract(suffix_list_urls=(), cache_dir=None)
        self.domains = frozenset(read_list(self.settings.domains, "domains.txt"))
        self.extensions = frozenset(each.lstrip(".") for each in read_list(self.settings.extensions, "extensions.txt"))

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Apply the rules to each URL."""
        hashes = []
        for document in documents:
            if self.reason(document.text.strip())[0]:
                out.count("left out")
            else:
                out.keep(document)
                hashes.append(digest(normal_url(document.text).encode("utf-8", "surrogatepass"))[:8])
        out.write("hashes", b"".join(hashes))

    def reason(self, url: str) -> tuple[str, str]:
        """(the rule that leaves it out, what it found), ("", "") for a URL that stays."""
        if len(url) < self.settings.min_length:
            return "short", f"{len(url)} characters"
        try:
            parts = urllib.parse.urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            return "malformed", str(error)
        if parts.scheme.lower() not in ("http", "https"):
            return "malformed", "neither http nor https"
        if forbidden := FORBIDDEN.search(url):
            return "malformed", f"the character {forbidden[0]!r}"
        if not HOST.fullmatch(host) and not _is_address(host):
            return "malformed", f"host {host!r}"
        found = self._domain(host)
        if found:
            return "domain", found
        end = pathlib.PurePosixPath(parts.path).suffix.lower().lstrip(".")
        return ("extension", end) if end in self.extensions else ("", "")

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        return {}

    def _domain(self, host: str) -> str:
        """The entry of the list that a host belongs to, "" for none."""
        if host not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            labels, parts = host.split("."), self.extract(host)
            names = [".".join(labels[i:]) for i in range(len(labels))] + [parts.domain]
            self._known[host] = next((name for name in names if name in self.domains), "")
        return self._known[host]


@dataclasses.dataclass
class FirstUrls(FilterUrls):
    """The rules again, now to tell what they drop; and of equal URLs the first alone.

    first: file of an int64 for each URL that the rules let pass, as `first_occurrences` writes it. starts: the number
    of the first one of each part.
    """

    first: str = ""
    starts: dict[int, int] = dataclasses.field(default_factory=dict)
    writes = True

    def load(self) -> None:
        """Map the file too."""
        super().load()
        self.first_places = FirstPlaces(self.first, self.starts)

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Keep or drop each URL."""
        self.first_places.begin(out)
        for document in documents:
            rule, found = self.reason(document.text.strip())
            if rule:
                out.drop(document, rule, found)
                continue
            if self.first_places.take(1).all():
                out.keep(document)
            else:
                out.drop(document, "repeated")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def read_list(path: str, own: str) -> list[str]:
    """The entries of a list, in lower case: of a user's file, or megalith's."""
    if path:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    else:
        text = importlib.resources.files("megalith.curation.lists").joinpath(own).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip().lower() for line in text.splitlines())
    return [line for line in lines if line]
