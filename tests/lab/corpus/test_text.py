"""Reading, cleaning and deduplicating documents."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from lab.corpus.dedupe import dedupe, sketch
from lab.corpus.documents import Document, acceptable, clean, sections
from lab.corpus.extract import from_html, from_markdown, from_pod, from_rdb, from_rst, from_sword
from lab.corpus.fetch import FetchError, fetch, files
from lab.corpus.sources import SOURCES, CorpusSource


def sentence(start: int, count: int) -> str:
    return " ".join(f"word{(start + i) * 7919 % 100003}" for i in range(count))


def document(text: str, split: str = "train", name: str = "a") -> Document:
    return Document(name, text[:20], "prose", split, text)  # type: ignore[arg-type]


def test_html_keeps_headings_and_preformatted_text_and_drops_navigation() -> None:
    page = (
        "<html class='sidebar-visible'><head><title>no</title></head><body><nav>menu</nav>"
        "<div class='related'><div>inner</div>links</div><h2>Title<a class='headerlink'>x</a></h2>"
        "<p>One\n two &amp; three</p><pre>a\n  b</pre><ul><li>item</li></ul></body></html>"
    )
    text = clean(from_html(page))
    assert text == "## Title\n\nOne two & three\n\na\n  b\n\n- item"


def test_rst_titles_become_headings() -> None:
    text = from_rst(
        "=====\nTitle\n=====\n\nText :ref:`there <x-y>`.\n\n.. index:: a\n   b\n\nPart\n----\n\nMore.\n"
    )
    assert [part.title for part in sections(clean(text))] == ["Title", "Part"]
    assert "index" not in text
    assert "`there`" in text


def test_pod_and_markdown_lose_their_markup() -> None:
    assert (
        clean(from_pod("=head1 Name\n\nUse B<this C<one>> or L<that|x>.\n\n=cut\n"))
        == "# Name\n\nUse this one or that."
    )
    assert clean(from_markdown("See [it](x.md).<!-- no --> <a id='q'></a>\n\n[x]: y\n")) == "See it."


def test_r_database_gives_one_text_a_character_vector(tmp_path: Path) -> None:
    def vector(lines: list[str]) -> bytes:
        record = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"
        record += struct.pack(">ii", 16, len(lines))
        for line in lines:
            record += struct.pack(">ii", 9, len(line)) + line.encode()
        return struct.pack(">I", len(record)) + zlib.compress(record)

    assert list(from_rdb(vector(["one", "two"]) + vector(["three"]))) == ["one\ntwo", "three"]


def test_sword_blocks(tmp_path: Path) -> None:
    blob = zlib.compress(b"<p>Of the beginning.</p>")
    (tmp_path / "ot.bzz").write_bytes(blob)
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<III", 0, len(blob), 30))
    assert [clean(text) for text in from_sword(tmp_path / "ot.bzs")] == ["Of the beginning."]


def test_comments_in_code_are_not_headings() -> None:
    text = "# Title\n\nBody.\n\n# a comment\nx = 1\n\n## 2.1. Other `name_here`\n\nMore."
    assert [part.title for part in sections(text)] == ["Title", "Other name_here"]


def test_only_english_of_some_length_is_acceptable() -> None:
    english = "The cat is on the roof of the house and it is not alone with the dog. " * 8
    assert acceptable(english, "prose")
    assert not acceptable(english[:100], "prose")
    assert not acceptable("Der Hund liegt im Garten unter einem Baum und schläft sehr tief. " * 8, "prose")
    assert not acceptable("x" * 2000, "code")


def test_exact_and_near_copies_are_removed_and_heldout_wins() -> None:
    original = sentence(0, 400)
    near = original.replace("word7919", "changed")
    other = sentence(5000, 400)
    kept, struck = dedupe(
        [
            document(original),
            document(near, "heldout"),
            document(other),
            document(other.replace(" ", "  ")),
        ]
    )
    assert [(item.split, item.text) for item in kept] == [("heldout", near), ("train", other)]
    assert struck["near"] == 1
    assert struck["exact"] == 1


def test_heldout_paragraphs_leave_training_and_licence_headers_stop_repeating() -> None:
    shared, header = sentence(9000, 30), sentence(12000, 30)
    parts = [sentence(20000 + 1000 * i, 300) for i in range(5)]
    kept, struck = dedupe(
        [document(f"{header}\n\n{part}") for part in parts[:4]]
        + [document(f"{shared}\n\n{parts[0][:0]}{sentence(40000, 300)}")]
        + [document(f"{shared}\n\n{parts[4]}", "heldout")]
    )
    assert [header in item.text for item in kept] == [True, True, False, False, False, False]
    assert [shared in item.text for item in kept] == [False] * 5 + [True]
    assert struck["paragraph"] == 3


def test_sketches_of_unrelated_texts_do_not_meet() -> None:
    assert len(sketch(sentence(0, 500))) == 64
    assert not set(sketch(sentence(0, 500))) & set(sketch(sentence(3000, 500)))
    assert len(sketch("too short")) == 0


def test_no_package_is_in_both_splits_but_for_a_book_inside_one() -> None:
    assert len({(source.name, source.split) for source in SOURCES}) == len(
        {source.name for source in SOURCES}
    )
    heldout = {source.package for source in SOURCES if source.split == "heldout"}
    train = {source.package for source in SOURCES if source.split == "train"}
    assert heldout & train <= {"golang-1.19-src"}  # its test data holds a book; its code is trained on
    assert {source.kind for source in SOURCES if source.split == "heldout"} == {
        "prose",
        "books",
        "docs",
        "code",
    }
    assert all(source.licence for source in SOURCES)


def test_fetch_uses_what_the_cache_holds(tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "archives").mkdir()
    with zipfile.ZipFile(tmp_path / "archives" / "tiny_pkg-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_pkg/a.py", "x = 1\n")
        wheel.writestr("tiny_pkg/tests/b.py", "x = 2\n")
    source = CorpusSource("tiny", "code", "MIT", "pip", "tiny-pkg==1.2", "plain", ("*.py",), ("*/tests/*",))
    tree, version = fetch(source, tmp_path)
    assert version == "1.2"
    assert [path.name for path in files(source, tree)] == ["a.py"]


@pytest.mark.process
def test_a_failed_download_says_which_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="fetching nothing-of-the-kind needs apt-get"):
        fetch(CorpusSource("n", "docs", "MIT", "apt", "nothing-of-the-kind", "plain", ("*",)), tmp_path)
