#!/usr/bin/env python3
"""Builds the demo's data from package files: a small noisy web site, clean captions to train on, held-out captions.

    build_site.py [--packages .cache/demo/packages] [--out .cache/demo] [--seed 7] [--jobs N]

OUT gets   site/<host>/...       the web site, served by serve.py, which behaves as site.json says
           site.json             seeds, hosts, robots rules, and by address the server's moods
           annotated/            annotated.json (COCO caption layout) and images/: clean pairs to train on
           heldout/              heldout.json and images/: known concepts, unseen pictures
           extra_urls.tsv.gz     url, text: pictures that no page links to, and lines that lead nowhere
           truth.jsonl           what each picture on the site shows; for judging only
           build.json            what all this was built from; a second call with the same does nothing

Same packages, seed and library versions: same bytes. Needs Pillow and resvg_py (scripts/requirements-demo.txt).
"""

import argparse
import collections
import gzip
import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from captions import telling_words
from packages import Source, loaders
from pages import ROBOTS, Site, disallowed, write_pages
from pictures import Item, alike, key, render
from placements import HOSTS, START_HOST, Placement, plan

ANNOTATED = 1_900
HELD_OUT = 280
SAMPLED = {"load_openclipart": 1_000, "load_games": 100}  # weak texts: as much as the noise needs
CHUNK = 220  # pictures drawn by one call of a helper process


def load(function, arguments, seed: int) -> tuple[Source, str]:
    """One package's pictures and texts; of the packages with weak texts, a sample."""
    source = function(*arguments)
    if limit := SAMPLED.get(function.__name__):
        source.pictures = sorted(key(seed, "sample", function.__name__).sample(source.pictures, min(limit, len(source.pictures))), key=lambda p: p.id)
    return source


def render_all(pictures: list, seed: int) -> list[Item | None]:
    return [render(p, seed) for p in pictures]


def items_and_texts(folder: str, seed: int, jobs: int) -> tuple[list[Item], list[str]]:
    """(pictures drawn, all texts) of every package, in an order that does not depend on the helpers' speed."""
    with ProcessPoolExecutor(jobs) as pool:
        loading = [pool.submit(load, function, arguments, seed) for function, arguments in loaders(folder)]
        drawing, texts = [], []
        for future in reversed(loading):  # the slowest package is first in the pool and last here
            source = future.result()
            texts += source.texts
            drawing += [pool.submit(render_all, source.pictures[at : at + CHUNK], seed) for at in range(0, len(source.pictures), CHUNK)]
        items = [item for future in drawing for item in future.result() if item]
    items.sort(key=lambda i: i.id)
    return items, sorted(texts)


def split(items: list[Item], seed: int) -> tuple[list[Item], list[Item], list[Item]]:
    """(annotated, held out, web).

    A held-out picture shows a known concept (each telling word of its caption stands in other pictures' captions too)
    in an unseen way (nothing that stays is alike); its caption is its own among the held-out ones.
    """
    captioned = [i for i in items if i.captions]
    words = {i.id: set(telling_words(i.captions[0])) for i in captioned}
    uses = collections.Counter(w for ws in words.values() for w in ws)
    order = sorted(captioned, key=lambda i: hashlib.sha256(f"{seed}/split/{i.id}".encode()).digest())
    held, used, by_head = [], set(), collections.Counter()
    for item in order:
        caption = item.captions[0].lower()
        head = telling_words(caption)[-1:]
        if not head or len(held) >= HELD_OUT or caption in used or by_head[head[0]] >= 3 or any(uses[w] < 3 for w in words[item.id]):
            continue
        if any(other.id != item.id and alike(item, other) for other in items):
            continue
        held.append(item)
        used.add(caption)
        by_head[head[0]] += 1
    held_ids = {i.id for i in held}
    left = [i for i in order if i.id not in held_ids]
    known = collections.Counter(w for i in left for w in words[i.id])
    held = [i for i in held if all(known[w] for w in words[i.id])]
    annotated = left[:ANNOTATED]
    taken = {i.id for i in (*annotated, *held)} | held_ids
    return sorted(annotated, key=lambda i: i.id), sorted(held, key=lambda i: i.id), [i for i in items if i.id not in taken]


def write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def as_json(value) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def write_captions(out: str, name: str, items: list[Item]) -> None:
    """A folder in COCO's caption layout."""
    document = {"info": {"description": f"capfilt demo, {name}"}, "images": [], "annotations": []}
    for item in items:
        file = f"images/{item.id}.{item.ext}"
        write(f"{out}/{name}/{file}", item.data)
        document["images"].append(
            {"id": item.id, "file_name": file, "width": item.width, "height": item.height, "license": item.license, "source": item.source, "style": item.style}
        )
        document["annotations"] += [{"id": f"{item.id}/{n}", "image_id": item.id, "caption": c} for n, c in enumerate(item.captions)]
    write(f"{out}/{name}/{name}.json", as_json(document))


def extra_urls(placements: list[Placement], seed: int) -> bytes:
    """A URL list as they are found: pictures that no page links to, pairs that the pages have too, lines that lead nowhere."""
    rng = key(seed, "extra")
    rows = [(p.url, p.alt) for p in placements if not p.host]
    rows += [(p.url, p.alt) for p in rng.sample([p for p in placements if p.host and p.alt], 30)]
    texts = [p.alt for p in placements if p.alt]
    rows += [(f"http://cdn.test/i/gone-{n}.jpg", rng.choice(texts)) for n in range(8)]
    rows += [("http://nowhere.test/a.jpg", rng.choice(texts)), ("not a url", rng.choice(texts)), ("ftp://cdn.test/a.jpg", rng.choice(texts)), ("", "no address"), ("http://cdn.test/private/x.png", rng.choice(texts))]
    rng.shuffle(rows)
    lines = ["url\ttext"] + [f"{url}\t{' '.join(text.split())}" for url, text in rows]
    return gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0)


def truth(p: Placement) -> dict:
    return {
        "page": p.page or None, "image": p.url, "alt": p.alt, "figcaption": p.figcaption or None, "figcaption_ok": p.figcaption_ok, "markup": p.markup,
        "item": p.item.id, "source": p.item.source, "license": p.item.license, "style": p.item.style, "true_captions": p.item.captions,
        "text_kind": p.kind, "text_ok": p.ok, "image_kind": p.image_kind, "image_usable": p.image_kind == "ok" or "duplicate" in p.image_kind,
        "duplicate_of": p.duplicate_of or None, "server": p.rule, "opt_out": p.opt_out,
        "robots_disallowed": disallowed(p.image_host, p.path) or bool(p.page and disallowed(p.host, p.page.split(p.host, 1)[1])),
        "tier": HOSTS.get(p.host, ("list",))[0],
    }


def inputs_digest(packages: str, seed: int) -> str:
    """Everything that the output depends on: this folder's programs, library versions, the packages by name and size, the seed."""
    import PIL
    import importlib.metadata

    here = os.path.dirname(os.path.abspath(__file__))
    parts = [f"seed {seed}", f"pillow {PIL.__version__}", f"resvg_py {importlib.metadata.version('resvg_py')}"]
    parts += [f"{f} {os.path.getsize(os.path.join(packages, f))}" for f in sorted(os.listdir(packages)) if f.endswith(".deb")]
    for file in sorted(f for f in os.listdir(here) if f.endswith(".py")):
        with open(os.path.join(here, file), "rb") as code:
            parts.append(f"{file} {hashlib.sha256(code.read()).hexdigest()}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def build(packages: str, out: str, seed: int, jobs: int) -> dict:
    """Builds everything under `out` and returns its counts."""
    items, texts = items_and_texts(packages, seed, jobs)
    annotated, held, web = split(items, seed)
    placements = plan(web, seed)
    site = Site()
    prose = [t for t in sorted(set(texts)) if 8 <= len(t.split()) <= 80] or ["Nothing to say."]
    write_pages(site, placements, prose, seed)

    for old in ("site", "annotated", "heldout"):
        shutil.rmtree(f"{out}/{old}", ignore_errors=True)
    for (host, path), data in sorted(site.files.items()):
        write(f"{out}/site/{host}{path}", data)
    write_captions(out, "annotated", annotated)
    write_captions(out, "heldout", held)
    write(f"{out}/extra_urls.tsv.gz", extra_urls(placements, seed))
    hosts = sorted({host for host, _ in site.files})
    write(f"{out}/site.json", as_json({"seeds": [f"http://{START_HOST}/"], "hosts": hosts, "robots": ROBOTS, "rules": site.rules}))
    write(f"{out}/truth.jsonl", "".join(json.dumps(truth(p), ensure_ascii=False, sort_keys=True) + "\n" for p in placements).encode())
    judged = [p for p in placements if p.ok is not None]
    return {
        "pictures": len(items), "web_pictures": len(web), "placements": len(placements), "pages": len({p.page for p in placements if p.page}), "hosts": len(hosts),
        "annotated": len(annotated), "heldout": len(held), "wrong_share": round(sum(not p.ok for p in judged) / max(1, len(judged)), 4),
        "text_kinds": dict(sorted(collections.Counter(p.kind for p in placements).items())),
        "image_kinds": dict(sorted(collections.Counter(p.image_kind for p in placements).items())),
        "sources": dict(sorted(collections.Counter(i.source for i in items).items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", default=".cache/demo/packages")
    parser.add_argument("--out", default=".cache/demo")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    started, digest, record = time.monotonic(), inputs_digest(args.packages, args.seed), f"{args.out}/build.json"
    if os.path.exists(record):
        with open(record) as file:
            if json.load(file).get("inputs") == digest:
                print(f"demo data in {args.out} is up to date")
                return
        os.remove(record)
    counts = build(args.packages, args.out, args.seed, args.jobs)
    if counts["web_pictures"] < 1_500:
        sys.exit(f"build_site: only {counts['web_pictures']} web pictures could be made; fetch the missing packages with demo/get_data.sh")
    write(record, as_json({"inputs": digest, "seed": args.seed, **counts}))
    print(
        f"demo data in {args.out}: {counts['web_pictures']} pictures at {counts['placements']} places on {counts['pages']} pages of {counts['hosts']} hosts, "
        f"{counts['wrong_share']:.1%} of the known texts wrong; {counts['annotated']} annotated, {counts['heldout']} held out; "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"build_site: {error}")
