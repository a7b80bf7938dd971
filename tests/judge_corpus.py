#!/usr/bin/env python3
"""Compares what a run gathered and kept with what is really on a corpus's web site.

    judge_corpus.py --truth CORPUS/truth.jsonl --store STORE --queries CORPUS/queries.tsv
                    [--stats http://127.0.0.1:PORT/__stats] [--dataset NAME] [--version N] [--json FILE]

truth.jsonl has a line for each picture on a page: page, image, alt, title, figcaption, text_kind, text_ok, image_kind,
image_usable, duplicate_of, item, true_captions, server, opt_out, robots_disallowed. The store is a folder; its tables are
read as the commits and the dataset version name them. Printed: what became of the pairs offered and whether the truth
explains it, what should not have been gathered, duplicates that slipped through, and how well the filter told wrong web
texts from right ones, overall and by kind of noise. Needs pyarrow (scripts/requirements-test.txt).

The truth is for judging only: nothing of it may go back into training, filtering or a threshold.
"""

import argparse
import collections
import glob
import gzip
import json
import os
import re
import sys
import unicodedata
import urllib.request
from urllib.parse import unquote, urlsplit

import pyarrow.parquet


# ---------------------------------------------------------------- reading


class Store:
    """A store folder, read through its records."""

    def __init__(self, folder: str):
        self.folder = folder
        if not os.path.isdir(f"{folder}/commits"):
            raise SystemExit(f"judge_corpus: {folder} is not a store with commits; has the run begun?")

    def records(self, pattern: str) -> list[dict]:
        out = []
        for path in sorted(glob.glob(f"{self.folder}/{pattern}")):
            with open(path) as file:
                out.append(json.load(file))
        return out

    def rows(self, table: str, digests: list[str], columns: list[str]) -> list[dict]:
        out = []
        for digest in digests:
            out += pyarrow.parquet.read_table(f"{self.folder}/objects/{table}/{digest}.parquet", columns=columns).to_pylist()
        return out

    def committed(self, table: str) -> list[str]:
        """Digests of every object of `table` that a commit names, each once."""
        outputs = (o for commit in self.records("commits/*/*.json") for o in commit["outputs"])
        return list(dict.fromkeys(o["digest"] for o in outputs if o["table"] == table))

    def version(self, name: str | None, number: int | None) -> dict:
        """A dataset version: the newest unless told otherwise."""
        versions = self.records(f"datasets/{name or '*'}/*.json")
        if number is not None:
            versions = [v for v in versions if v["version"] == number]
        if not versions:
            raise SystemExit(f"judge_corpus: {self.folder} has no such dataset version; has the run been finished?")
        return max(versions, key=lambda v: (v["created_at_ms"], v["version"]))


def address(url: str) -> str:
    """An address as truth and tables can be compared by: host and path, escapes resolved, no query."""
    parts = urlsplit(url)
    return f"{parts.netloc.lower()}{unquote(parts.path)}"


def plain(text: str | None) -> str:
    return " ".join(unicodedata.normalize("NFC", text or "").split()).lower()


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


class Queries:
    """The query list, matched by whole words."""

    def __init__(self, path: str):
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            self.texts = {" ".join(words(line.split("\t")[0])) for line in file} - {""}
        self.longest = max((len(t.split()) for t in self.texts), default=0)

    def match(self, text: str) -> bool:
        tokens = words(text)
        return any(" ".join(tokens[i : i + n]) in self.texts for i in range(len(tokens)) for n in range(1, self.longest + 1))


# Where the scores of a judged text stand.
SCORES = {"itm": 2, "itc": 3}

# ---------------------------------------------------------------- what became of the pairs

NO_TEXT, NO_QUERY, CLOSED, OPT_OUT_PAGE = "no text", "text matches no query", "page closed by robots.txt", "page opts out"
NO_PAGE, MISSED, OTHER_TEXT, NOT_SELECTED, GATHERED = "page not gathered", "not found on its page", "gathered with another text", "over the caps", "gathered"


def fate(p: dict, tables: dict, queries: Queries) -> tuple[str, str | None]:
    """(what became of the placement's pair, its sample id if it has one)."""
    place = address(p["image"])
    found = tables["candidates"].get(place, {})
    sample = found.get(plain(p["alt"])) if plain(p["alt"]) else None
    if sample is None:
        if found:
            return OTHER_TEXT, None
        if not plain(p["alt"]):
            return NO_TEXT, None
        if not queries.match(p["alt"]):
            return NO_QUERY, None
        if p["page"] and p["page"] not in tables["pages"]:
            return (CLOSED if p["robots_disallowed"] else OPT_OUT_PAGE if p["opt_out"] else NO_PAGE), None
        return (OPT_OUT_PAGE if p["opt_out"] else MISSED), None
    if sample not in tables["selected"]:
        return NOT_SELECTED, sample
    status = tables["samples"].get(sample, "no row")
    return (GATHERED if status == "ok" else f"fetch: {status}"), sample


def explained(what: str, p: dict) -> bool:
    """Whether the truth says why the pair was not gathered."""
    status = what.removeprefix("fetch: ")
    if what in (NO_TEXT, NO_QUERY, OTHER_TEXT, NOT_SELECTED, CLOSED, OPT_OUT_PAGE):
        return True
    if status == "robots":
        return p["robots_disallowed"]
    if status == "opt_out":
        return p["opt_out"]
    return bool(p["server"]) or not p["image_usable"]


def right(p: dict, text: str) -> bool | None:
    """Whether `text` describes the placement's picture; None: unknown."""
    if plain(text) == plain(p["alt"]):
        return p["text_ok"]
    if p["true_captions"] and plain(text) == plain(p.get("figcaption")):
        return plain(text) in {plain(c) for c in p["true_captions"]}
    return None


# ---------------------------------------------------------------- numbers


def auroc(good: list[float], bad: list[float]) -> float | None:
    """The chance that a right text scores above a wrong one, ties counted half."""
    if not good or not bad:
        return None
    ranked = sorted([(s, 1) for s in good] + [(s, 0) for s in bad])
    total, at = 0.0, 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        total += sum(kind for _, kind in ranked[at:end]) * (at + end + 1) / 2
        at = end
    return (total - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad))


def share(part: int, whole: int) -> str:
    return f"{part:6} of {whole:6}  {part / whole:6.1%}" if whole else f"{part:6} of {whole:6}"


def find_setting(value, name: str):
    """The first setting of this name, however deep."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        for inner in value.values():
            if (found := find_setting(inner, name)) is not None:
                return found
    return None


def rule(settings: dict) -> tuple[str, float] | None:
    """The score by which texts were kept, and from where on; none if they were ranked."""
    policy = find_setting(settings, "policy")
    return (policy, find_setting(settings, f"min_{policy}") or 0.0) if policy in SCORES else None


def judge_gathering(truth: list[dict], tables: dict, queries: Queries) -> tuple[dict, dict[str, dict]]:
    """(numbers, {sample id: placement} of the pairs whose image was fetched)."""
    counts, unexplained, examples, gathered, forbidden = collections.Counter(), collections.Counter(), {}, {}, []
    for p in truth:
        what, sample = fate(p, tables, queries)
        counts[what] += 1
        if what == GATHERED:
            gathered.setdefault(sample, p)
            if p["robots_disallowed"] or p["opt_out"]:
                forbidden.append(p["image"])
        elif not explained(what, p):
            unexplained[what] += 1
            examples.setdefault(what, p["image"])
    print(f"PAIRS OFFERED  {len(truth)} places of pictures")
    for what, n in counts.most_common():
        note = f"   {unexplained[what]} not explained by the truth, such as {examples[what]}" if unexplained[what] else ""
        print(f"  {what:28} {share(n, len(truth))}{note}")
    usable = [p for p in truth if p["image_usable"] and not p["server"] and not p["robots_disallowed"] and not p["opt_out"] and plain(p["alt"]) and queries.match(p["alt"])]
    fetched = sum(fate(p, tables, queries)[0] in (GATHERED, OTHER_TEXT, NOT_SELECTED) for p in usable)
    print(f"  of those that should be found   {share(fetched, len(usable))}  (usable picture, matching text, nothing in the way)")
    print(f"  gathered against robots or opt-out: {len(forbidden)}" + (f", such as {forbidden[0]}" if forbidden else ""))
    numbers = {"offered": len(truth), "fates": dict(counts), "unexplained": dict(unexplained), "forbidden": len(forbidden), "findable": len(usable), "found": fetched}
    return numbers, gathered


def judge_duplicates(gathered: dict[str, dict], kept: set[str]) -> dict:
    """Duplicates: further pictures of an item of which one is in the dataset already."""
    by_item = collections.defaultdict(dict)
    for sample, p in gathered.items():
        by_item[p["item"]].setdefault(address(p["image"]), []).append((sample, p))
    offered, slipped = collections.Counter(), collections.Counter()
    for places in by_item.values():
        copies = [(samples[0][1]["image_kind"], any(s in kept for s, _ in samples)) for samples in places.values()]
        copies.sort(key=lambda c: (c[0] != "ok", c[0]))  # the original first: the copies are the duplicates
        present = 0
        for n, (kind, inside) in enumerate(copies):
            if n:
                offered[kind] += 1
            if inside and present:
                slipped[kind] += 1
            present += inside
    print(f"DUPLICATES  further pictures of the same item that were gathered: {sum(offered.values())}")
    for kind in sorted(offered):
        print(f"  {kind:28} {share(slipped[kind], offered[kind])} slipped through")
    return {"offered": dict(offered), "slipped": dict(slipped)}


def judge_filter(gathered: dict[str, dict], texts: dict[str, str], scores: dict, kept_web: set[str], rule: tuple | None) -> dict:
    """How well the filter tells wrong web texts from right ones."""
    judged = []  # (kind, right?, itm, itc, kept?)
    for sample, p in gathered.items():
        ok = right(p, texts[sample])
        if ok is not None and sample in scores and scores[sample][0] is not None:
            kind = p["text_kind"] if plain(texts[sample]) == plain(p["alt"]) else "figcaption"
            judged.append((kind, ok, *scores[sample], sample in kept_web))
    good, bad = [j for j in judged if j[1]], [j for j in judged if not j[1]]
    print(f"FILTER  {len(judged)} fetched web texts of known truth, {len(bad) / max(1, len(judged)):.1%} wrong")
    numbers = {"judged": len(judged), "wrong": len(bad), "rule": rule}
    if rule is not None:
        score, least = rule
        removed, passed = sum(j[SCORES[score]] < least for j in bad), sum(j[SCORES[score]] >= least for j in good)
        print(f"  at {score} >= {least:g}: wrong texts removed {share(removed, len(bad))}   right texts kept {share(passed, len(good))}")
        numbers |= {"wrong_removed": removed / max(1, len(bad)), "right_kept": passed / max(1, len(good))}
    gone, there = sum(not j[4] for j in bad), sum(j[4] for j in good)
    print(f"  in the dataset (after deduplication): wrong texts gone {share(gone, len(bad))}   right texts there {share(there, len(good))}")
    if there + len(bad) - gone:
        print(f"  web texts of known truth in the dataset that are right: {share(there, there + len(bad) - gone)}")
    numbers |= {"wrong_gone": gone / max(1, len(bad)), "right_there": there / max(1, len(good))}
    for name, column in SCORES.items():
        good_scores = [j[column] for j in good if j[column] is not None]
        line = {"overall": auroc(good_scores, [j[column] for j in bad if j[column] is not None])}
        for kind in sorted({j[0] for j in bad}):
            line[kind] = auroc(good_scores, [j[column] for j in bad if j[0] == kind and j[column] is not None])
        numbers[f"auroc_{name}"] = line
        print(f"  AUROC by {name}: " + "  ".join(f"{kind} {value:.3f}" for kind, value in line.items() if value is not None))
    kinds = collections.Counter(j[0] for j in judged)
    print("  texts by kind: " + "  ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
    return numbers


def judge_manners(url: str) -> dict:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        stats = json.load(answer)
    violations = sum(stats.get("robots_violations", {}).values())
    print(f"MANNERS  {stats.get('requests')} requests; against robots.txt: {violations} {stats.get('robots_violations') or ''}")
    late = [host for host, first in stats.get("robots_asked_first", {}).items() if not first]
    print(f"  hosts asked for something before their robots.txt: {len(late)} {late or ''}")
    for key in ("most_at_once", "most_in_one_second"):
        if stats.get(key):
            host, most = max(stats[key].items(), key=lambda e: e[1])
            print(f"  {key.replace('_', ' ')}: {most} ({host})")
    return stats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--stats", help="the corpus server's /__stats")
    parser.add_argument("--dataset")
    parser.add_argument("--version", type=int)
    parser.add_argument("--json", help="write the numbers there too")
    args = parser.parse_args()

    with open(args.truth, encoding="utf-8") as file:
        truth = [json.loads(line) for line in file]
    store, queries = Store(args.store), Queries(args.queries)
    version = store.version(args.dataset, args.version)
    read = collections.defaultdict(list)
    for given in version["lineage"]["inputs"]:
        read[given["table"]].append(given["digest"])

    pairs = store.rows("candidates", store.committed("candidates"), ["sample_id", "url", "text", "page_url"])
    candidates = collections.defaultdict(dict)
    for row in pairs:
        candidates[address(row["url"])][plain(row["text"])] = row["sample_id"]
    samples = store.rows("samples", read["samples"] or store.committed("samples"), ["sample_id", "status", "text"])
    tables = {
        "candidates": candidates,
        "pages": {row["page_url"] for row in pairs},
        "selected": {r["sample_id"] for r in store.rows("selected", store.committed("selected"), ["sample_id"])},
        "samples": {r["sample_id"]: r["status"] for r in samples},
    }
    scored = store.rows("scores", read["scores"] or store.committed("scores"), ["sample_id", "status", "web_itm", "web_itc"])
    scores = {r["sample_id"]: (r["web_itm"], r["web_itc"]) for r in scored if r["status"] == "ok"}
    rows = store.rows("dataset", [o["digest"] for o in version["shards"]], ["sample_id", "origin"])

    print(f"DATASET  {version['name']} version {version['version']}, round {version['round']}: {version['counts']}")
    numbers = {"dataset": {k: version[k] for k in ("name", "version", "round", "digest", "counts", "noise_ratio")}}
    numbers["gathering"], gathered = judge_gathering(truth, tables, queries)
    numbers["duplicates"] = judge_duplicates(gathered, {r["sample_id"] for r in rows if r["origin"] != "human"})
    numbers["filter"] = judge_filter(
        gathered, {r["sample_id"]: r["text"] for r in samples}, scores, {r["sample_id"] for r in rows if r["origin"] == "web"},
        rule(version["settings"]),
    )
    if args.stats:
        numbers["manners"] = judge_manners(args.stats)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(numbers, file, indent=1)
            file.write("\n")
    violations = sum(numbers.get("manners", {}).get("robots_violations", {}).values())
    return 1 if violations or numbers["gathering"]["forbidden"] else 0


if __name__ == "__main__":
    sys.exit(main())
