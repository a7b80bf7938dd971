#!/usr/bin/env python3
"""Unpacks what a query list is made of from ordinary packages: WordNet's database, and how often English uses its words.

    query_sources.py [--packages .cache/demo/packages] [--out .cache/demo/query_sources]

OUT gets   wordnet/data.noun, ...   from the Debian package wordnet-base
           word_counts.tsv          word, uses in a text as long as the English Wikipedia, from the Python package wordfreq

Same packages: same bytes. A second call does nothing.
"""

import argparse
import glob
import importlib.metadata
import os
import re
import sys

from packages import deb_members

WORDS = 4.5e9  # of the English Wikipedia, about: what CLIP's "at least 100 times" is counted in
LEAST = 10  # what is rarer could be no query


def newest(pattern: str) -> str:
    files = sorted(glob.glob(pattern))
    if not files:
        raise ValueError(f"no {pattern}: fetch it with demo/get_data.sh")
    return files[-1]


def write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".part", "wb") as file:
        file.write(data)
    os.replace(path + ".part", path)


def word_counts() -> str:
    """wordfreq keeps words in lists, one for each hundredth of a decade of frequency."""
    from wordfreq import get_frequency_list

    lines = ["word\tcount"]
    for centibels, words in enumerate(get_frequency_list("en", "large")):
        uses = round(WORDS * 10 ** (-centibels / 100))
        if uses >= LEAST:
            lines += [f"{word}\t{uses}" for word in sorted(words)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default=".cache/demo/packages")
    parser.add_argument("--out", default=".cache/demo/query_sources")
    args = parser.parse_args()
    package = newest(f"{args.packages}/wordnet-base_*.deb")
    made_of = f"{os.path.basename(package)} wordfreq {importlib.metadata.version('wordfreq')}\n"
    record = f"{args.out}/made_of.txt"
    if os.path.exists(record):
        with open(record) as file:
            if file.read() == made_of:
                return
    for name, data in deb_members(package, re.compile(r"/wordnet/data\.(noun|verb|adj|adv)$")):
        write(f"{args.out}/wordnet/{os.path.basename(name)}", data)
    counts = word_counts()
    write(f"{args.out}/word_counts.tsv", counts.encode())
    write(record, made_of.encode())
    print(f"query sources in {args.out}: WordNet, and {counts.count(chr(10)) - 1} words with their counts")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"query_sources: {error}")
