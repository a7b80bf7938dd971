"""pyahocorasick as MetaCLIP uses it: matching_peer.py QUERIES TEXTS

Reads the query list and the texts, builds the automaton, and prints a line of JSON about that. Then, for each line on standard input that
names a way, it matches all texts once and prints what it took:

- `spaced`: entries and texts with a blank before and after, blanks put around `, . ; : ? !` and backquotes (`metaclip/substr_matching_ahocorasick.py`)
- `boundary`: entries as they are, and a look at the characters before and after each hit
- `folded`: as `spaced`, on the ASCII texts, of which only the folded words are left: it has to find what we find
"""

import json
import re
import resource
import sys
import time

import ahocorasick

PARTED = [",", ".", ";", ":", "?", "!", "`"]
BLANK = ["\t", "\n", "\r"]


def spaced(text: str) -> str:
    text = f" {text} "
    for c in PARTED:
        text = text.replace(c, f" {c} ")
    for c in BLANK:
        text = text.replace(c, " ")
    return text


def automaton_of(entries: list[str]) -> ahocorasick.Automaton:
    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        automaton.add_word(entry, (number, entry))
    automaton.make_automaton()
    return automaton


def match_spaced(automaton: ahocorasick.Automaton, text: str) -> list[int]:
    return list({number for _, (number, _) in automaton.iter(spaced(text))})


def match_boundary(automaton: ahocorasick.Automaton, text: str) -> list[int]:
    found = set()
    for end, (number, entry) in automaton.iter(text):
        start = end - len(entry) + 1
        if (start == 0 or not text[start - 1].isalnum()) and (end + 1 == len(text) or not text[end + 1].isalnum()):
            found.add(number)
    return list(found)


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        entries = [line.split("\t")[0].rstrip("\n") for line in file]
    with open(sys.argv[2], encoding="utf-8") as file:
        texts = [line.rstrip("\n") for line in file]
    folded = [" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in texts if text.isascii()]
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    padded = automaton_of([f" {entry} " for entry in entries])
    seconds = time.process_time() - begin
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    plain = automaton_of(entries)
    print(json.dumps({"build_seconds": seconds, "megabytes": memory}), flush=True)
    ways = {"spaced": (match_spaced, padded, texts), "boundary": (match_boundary, plain, texts), "folded": (match_spaced, padded, folded)}
    for line in sys.stdin:
        match, automaton, of = ways[line.strip()]
        begin = time.process_time()
        matches = sum(len(match(automaton, text)) for text in of)
        print(json.dumps({"seconds": time.process_time() - begin, "matches": matches}), flush=True)


main()
