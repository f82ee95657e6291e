"""Turns files into plain text. Headings of every format become `# Title` lines, so later steps can find sections."""

from __future__ import annotations

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from lab.corpus.fetch import read_bytes

_SKIPPED = frozenset(
    ["script", "style", "nav", "head", "footer", "svg", "button", "select", "form", "aside", "info"]
)
_FURNITURE = re.compile(
    r"sphinxsidebar|related|navheader|navfooter|headerlink|sourcelink|sidebar|breadcrumb|nav-chapters|menu-bar"
    r"|\btoc\b|toplang|bottomlang|path-item|noprint|docnav|navigation|global-nav|\bhd\b|\bnav\b|TopLeftHeader"
)
# Elements that never close, or that contain the whole page whatever their class is.
_FRAMES = frozenset("area base br col embed hr img input link meta source track wbr html body main".split())
_BLOCKS = frozenset(
    "p div section article table tr ul ol dl dt dd li blockquote pre h1 h2 h3 h4 h5 h6 title figure br hr page".split()
)
_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6, "title": 2}


class _TextMaker(HTMLParser):
    """Collects the text of a page. White space is kept inside `pre` and folded elsewhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping: tuple[str, int] | None = None  # (tag that began it, open tags of that name)
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                self._skipping = (tag, self._skipping[1] + 1)
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        if tag in _SKIPPED or (marks and tag not in _FRAMES and _FURNITURE.search(marks)):
            self._skipping = (tag, 1)
            return
        if tag == "pre":
            self._pre += 1
        if tag in _HEADINGS:
            self.parts.append("\n\n" + "#" * _HEADINGS[tag] + " ")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag in ("br", "tr", "dt", "dd"):
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[0]:
                depth = self._skipping[1] - 1
                self._skipping = (tag, depth) if depth else None
            return
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        if tag in _BLOCKS and tag not in ("li", "tr", "dt", "dd", "br"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def decode(data: bytes) -> str:
    """Decode a file as UTF-8, or as Latin-1 (which never fails) if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def from_html(page: str) -> str:
    """Return the text of an HTML or Mallard page, without its navigation."""
    maker = _TextMaker()
    maker.feed(re.sub(r"<head[\s>].*?</head>", "", page, count=1, flags=re.S | re.I))
    maker.close()
    text = re.sub(r"[ \t]*\n[ \t]*(?=\n|#|- )", "\n", "".join(maker.parts))
    text = re.sub(r"^(#+)\s+", r"\1 ", text, flags=re.M)
    return re.sub(r"(?m)^-[ \t]*\n\s*", "- ", text)  # a paragraph inside a list item


def from_rst(text: str) -> str:
    """Return reStructuredText with underlined titles turned into `#` headings, and without indexes."""
    levels: dict[str, int] = {}
    lines: list[str] = []
    skip_indent: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if skip_indent is not None:
            if not line.strip() or indent > skip_indent:
                continue
            skip_indent = None
        if re.match(
            r"\s*\.\. (_[^:]+:|(index|toctree|highlight|currentmodule|contents|image|figure|raw)\b)", line
        ):
            skip_indent = indent
            continue
        mark = line.strip()
        if len(mark) >= 3 and len(set(mark)) == 1 and mark[0] in "=-~^*\"'+#`:." and indent == 0:
            if (
                lines
                and lines[-1].strip()
                and not lines[-1].startswith((" ", "#"))
                and len(lines[-1]) <= len(mark) + 1
            ):
                level = levels.setdefault(mark[0], len(levels) + 1)
                lines[-1] = "#" * level + " " + lines[-1].strip()
            continue  # an overline, or the underline of the title above
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r":[\w:+.-]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    return text.replace("``", "`")


def from_pod(text: str) -> str:
    """Return the text of Perl's documentation format (POD), with `#` headings and without formatting codes."""
    text = re.sub(r"(?ms)^=(begin|for)\b.*?(^=end\b[^\n]*|\n\n)", "", text)
    text = re.sub(r"(?m)^=head(\d)\s+", lambda match: "#" * int(match[1]) + " ", text)
    text = re.sub(r"(?m)^=item\s+", "- ", text)
    text = re.sub(r"(?m)^=\w+[^\n]*$", "", text)
    for _ in range(2):  # codes nest
        text = re.sub(r"\b[BCFISX]<<+ (.*?) >>+", r"\1", text)
        text = re.sub(r"\b[BCFISX]<([^<>]*)>", r"\1", text)
    text = re.sub(r"\bL<(?:([^<>|]*)\|)?([^<>]*)>", lambda match: match[1] or match[2], text)
    return text.replace("E<gt>", ">").replace("E<lt>", "<")


def from_markdown(text: str) -> str:
    """Return Markdown without link targets, anchors and comments."""
    text = re.sub(r"<!--.*?-->|</?a\b[^>]*>", "", text, flags=re.S)
    text = re.sub(r"\[([^\]]+)\](?:\([^)\s]*\)|\[[^\]]*\])", r"\1", text)
    return re.sub(r"(?m)^\[[^\]]+\]:\s.*$", "", text)


def from_rdb(data: bytes) -> Iterator[str]:
    """Yield the character vectors of an R database. Each vector is a book, and each string is a line."""
    position = 0
    while position + 4 < len(data):
        # A record is its unpacked size and then one stream. R marks bzip2 with "2" and xz with "Z".
        body = data[position + 4 :]
        if body[:1] == b"2":
            bunzip = bz2.BZ2Decompressor()
            record, rest = bunzip.decompress(body[1:]), bunzip.unused_data
        elif body[:1] == b"Z":
            unxz = lzma.LZMADecompressor()
            record, rest = unxz.decompress(body[1:]), unxz.unused_data
        else:
            unzip = zlib.decompressobj()
            record, rest = unzip.decompress(body), unzip.unused_data
        position = len(data) - len(rest)
        lines = _r_strings(record)
        if lines:
            yield "\n".join(lines)


def _r_strings(record: bytes) -> list[str]:
    """Read a serialized (XDR) character vector; anything else gives an empty list."""
    version = struct.unpack_from(">i", record, 2)[0]
    position = 14
    if version >= 3:  # the name of the native encoding
        position += 4 + struct.unpack_from(">i", record, position)[0]
    flags, count = struct.unpack_from(">ii", record, position)
    if flags & 0xFF != 16:  # STRSXP
        return []
    position += 8
    lines = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", record, position)
        position += 8
        lines.append(decode(record[position : position + max(length, 0)]))
        position += max(length, 0)
    return lines


def from_sword(index: Path) -> Iterator[str]:
    """Yield the blocks of a compressed SWORD commentary. Each block is the commentary on one book."""
    blob = index.with_suffix(".bzz").read_bytes()
    for start, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        yield from_html(decode(zlib.decompress(blob[start : start + size])))


_CONVERTERS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "html": from_html,
    "rst": from_rst,
    "pod": from_pod,
    "markdown": from_markdown,
}


def texts(reader: str, path: Path) -> Iterator[str]:
    """Yield the documents in one file."""
    if reader == "sword":
        yield from from_sword(path)
    elif reader == "rdb":
        yield from from_rdb(read_bytes(path))
    else:
        yield _CONVERTERS[reader](decode(read_bytes(path)))
