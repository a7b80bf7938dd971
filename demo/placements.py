"""Which picture stands where, with which text: the plan of the web site before any page is written.

The share of wrong texts is a quota, not a coin: over all pictures whose truth is known it is `WRONG_SHARE`, spread over
the hosts by their quality, so the noise depends on the site as it does on the real web.
"""

import random
from dataclasses import dataclass

from captions import head_noun, telling_words
from pictures import DAMAGES, Item, bomb, copy_of, damaged, key

WRONG_SHARE = 0.375
# host: (quality, share of wrong texts before scaling, topics that live there; "*" takes any)
HOSTS = {
    "wildlife.test": ("good", 0.15, {"animals"}),
    "kitchen.test": ("mid", 0.40, {"food"}),
    "travel.test": ("good", 0.15, {"places"}),
    "garage.test": ("mid", 0.40, {"vehicles"}),
    "people.test": ("mid", 0.40, {"people"}),
    "household.test": ("mid", 0.40, {"things"}),
    "clipart.test": ("mid", 0.40, {"*"}),
    "pinboard.test": ("bad", 0.75, {"*"}),
    "bargains.test": ("bad", 0.75, {"*"}),
    "arcade.test": ("mid", 0.40, {"games"}),
}
IMAGE_HOST = "cdn.test"
MEMBERS_HOST = "members.test"  # closed to robots as a whole
START_HOST = "index.test"
RIGHT = {"clean": 45, "described": 20, "decorated": 20, "keywords": 15}
WRONG = {"mismatch": 42, "filename": 18, "boilerplate": 14, "seo": 14, "empty": 12}
BOILERPLATE = (
    "click to enlarge", "image", "picture", "read more", "thumbnail", "photo of the day", "loading...", "no image available", "share this", "logo",
    "advertisement", "click here for more", "banner", "untitled", "view full size image", "icon",
)
SEO = (
    "buy {other} online - best price, free shipping", "cheap {other} for sale | {other} deals {year}", "top 10 best {other} reviews {year}",
    "{other} discount {other} outlet {other} store", "download free {other} wallpaper hd", "{other} near me - order now and save 50%",
)
DECORATIONS = ("{text} - {site}", "Photo: {text}", "{text} | free pictures", "{text} (no. {number})", "{text}, {year}", "our {bare}")


@dataclass
class Placement:
    """One picture at one address with one text, and the truth about it."""

    item: Item
    host: str  # of the page; "" where no page links to it
    image_host: str
    path: str
    data: bytes
    alt: str = ""
    kind: str = "natural"
    ok: bool | None = None  # whether `alt` describes the picture; None: unknown
    figcaption: str = ""
    figcaption_ok: bool | None = None
    image_kind: str = "ok"
    duplicate_of: str = ""
    rule: dict | None = None
    markup: str = ""
    page: str = ""

    @property
    def opt_out(self) -> bool:
        """Whether the picture's answer forbids use for training."""
        return bool(self.rule and self.rule.get("headers"))

    @property
    def url(self) -> str:
        return f"http://{self.image_host}{self.path}"


def bare(caption: str) -> str:
    """A caption without its article."""
    first, _, rest = caption.partition(" ")
    return rest if first in ("a", "an", "the") and rest else caption


def quota(weights: dict[str, int], n: int, rng: random.Random) -> list[str]:
    """`n` kinds in the proportions of `weights`, in random order."""
    total, out, owed = sum(weights.values()), [], 0.0
    for kind, weight in weights.items():
        owed += n * weight / total
        out += [kind] * (round(owed) - len(out))
    rng.shuffle(out)
    return out


class Planner:
    """Plans placements; every choice is keyed by the seed and the picture's id."""

    def __init__(self, items: list[Item], seed: int):
        self.seed = seed
        self.known = [i for i in items if i.captions]
        self.words = {i.id: set(telling_words(i.captions[0])) for i in self.known}
        self.by_topic: dict[str, list[Item]] = {}
        for item in self.known:
            self.by_topic.setdefault(item.topic, []).append(item)
        self.taken: set[tuple[str, str]] = set()

    def stranger(self, item: Item, rng: random.Random) -> Item:
        """Another picture that shares no telling word; of the same topic half of the time, which is the harder error."""
        pool = self.by_topic[item.topic] if rng.random() < 0.5 else self.known
        mine = self.words.get(item.id, set())
        for _ in range(200):
            other = rng.choice(pool)
            if not mine & self.words[other.id] and head_noun(other.captions[0]) not in mine:
                return other
        return rng.choice([i for i in self.known if not mine & self.words[i.id]])

    def path(self, item: Item, image_host: str, ext: str, rng: random.Random, folder: str | None = None) -> str:
        """A new address: a name of the picture, a camera's number or a hash, as sites have them; it never tells more than half of the time."""
        folder = folder or rng.choice(("/i", "/i", "/uploads/2023/05", "/media/pictures", "/assets/img"))
        roll = rng.random()
        slug = "-".join(telling_words(item.captions[0] if item.captions else item.natural[0]))[:40] or "picture"
        name = slug if roll < 0.35 else f"IMG_{rng.randrange(10_000):04}" if roll < 0.6 else f"{rng.getrandbits(48):012x}"
        path, n = f"{folder}/{name}.{ext}", 1
        while (image_host, path) in self.taken:
            n += 1
            path = f"{folder}/{name}-{n}.{ext}"
        self.taken.add((image_host, path))
        return path

    def host(self, item: Item, rng: random.Random) -> str:
        own = [h for h, (_, _, topics) in HOSTS.items() if item.topic in topics]
        anywhere = [h for h, (_, _, topics) in HOSTS.items() if "*" in topics]
        if item.topic == "games":
            return "arcade.test"
        if item.natural:
            return rng.choice(("clipart.test", "clipart.test", "pinboard.test"))
        return rng.choice(own) if own and rng.random() < 0.6 else rng.choice(anywhere)

    def place(self, item: Item, host: str, data: bytes, ext: str, rng: random.Random, **more) -> Placement:
        image_host = IMAGE_HOST if rng.random() < 0.2 and host else (host or IMAGE_HOST)
        return Placement(item, host, image_host, self.path(item, image_host, ext, rng), data, **more)

    def texts(self, placements: list[Placement]) -> None:
        """Gives every placement its text, wrong ones by quota."""
        weight = {h: share for h, (_, share, _) in HOSTS.items()} | {"": 0.40, MEMBERS_HOST: 0.40}
        judged = [p for p in placements if p.item.captions]
        scale = WRONG_SHARE * len(judged) / max(1e-9, sum(weight[p.host] for p in judged))
        for host in sorted({p.host for p in placements}):
            mine = [p for p in judged if p.host == host]
            rng = key(self.seed, "texts", host)
            wrong = round(min(0.95, weight[host] * scale) * len(mine))
            kinds = [(k, False) for k in quota(WRONG, wrong, rng)] + [(k, True) for k in quota(RIGHT, len(mine) - wrong, rng)]
            rng.shuffle(kinds)
            for placement, (kind, ok) in zip(mine, kinds):
                self.write(placement, kind, ok, key(self.seed, "text", placement.url))
        for placement in placements:
            if not placement.item.captions:
                placement.alt = key(self.seed, "text", placement.url).choice(placement.item.natural)

    def write(self, p: Placement, kind: str, ok: bool, rng: random.Random) -> None:
        caption, other = p.item.captions[0], self.stranger(p.item, rng)
        year, number = rng.randrange(2009, 2025), rng.randrange(2, 90)
        p.kind, p.ok = kind, ok
        if kind == "clean":
            p.alt = caption if rng.random() < 0.7 else bare(caption)
        elif kind == "described":
            p.alt = p.item.captions[-1]
        elif kind == "decorated":
            p.alt = rng.choice(DECORATIONS).format(text=caption, bare=bare(caption), site=p.host or IMAGE_HOST, number=number, year=year)
        elif kind == "keywords":
            p.alt = ", ".join([*telling_words(caption), p.item.topic.rstrip("s"), p.item.style])
        elif kind == "mismatch":
            p.alt = other.captions[0] if rng.random() < 0.75 else other.captions[-1]
        elif kind == "filename":
            p.alt = rng.choice((f"IMG_{rng.randrange(10_000):04}.JPG", f"DSC{rng.randrange(100_000):05}", f"{p.item.stem}.{p.item.ext}", f"image{number}", f"{rng.getrandbits(40):x}.{p.item.ext}"))
            if set(telling_words(p.alt)) & self.words[p.item.id]:
                p.alt = f"pic_{number:03}.{p.item.ext}"  # a file name that names the picture would not be a wrong text
        elif kind == "boilerplate":
            p.alt = rng.choice(BOILERPLATE)
        elif kind == "seo":
            p.alt = rng.choice(SEO).format(other=bare(other.captions[0]), year=year)
        if rng.random() < 0.15:
            p.figcaption, p.figcaption_ok = (caption, True) if rng.random() < (0.85 if ok else 0.3) else (other.captions[0], False)


def plan(items: list[Item], seed: int) -> list[Placement]:
    """All placements of the web pictures: each once, some twice, some damaged, some behind a server's moods."""
    planner, out = Planner(items, seed), []
    for item in items:
        rng = key(seed, "place", item.id)
        roll = rng.random()
        host = "" if roll < 0.07 else MEMBERS_HOST if roll > 0.994 else planner.host(item, rng)
        out.append(planner.place(item, host, item.data, item.ext, rng))
        roll = rng.random()
        second = rng.choice(("pinboard.test", "bargains.test", "clipart.test"))
        if roll < 0.04:
            out.append(planner.place(item, second, item.data, item.ext, rng, image_kind="exact_duplicate", duplicate_of=item.id))
        elif roll < 0.08:
            kind, data, ext = copy_of(item, rng)
            out.append(planner.place(item, second, data, ext, rng, image_kind=f"near_duplicate_{kind}", duplicate_of=item.id))
    trouble(planner, out, seed)
    planner.texts(out)
    return out


def trouble(planner: Planner, placements: list[Placement], seed: int) -> None:
    """Damages some pictures, hides some behind robots rules, and writes the server's misbehaviour by path."""
    rng = key(seed, "trouble")
    free = [p for p in placements if p.image_kind == "ok" and p.item.captions and p.host and p.host != MEMBERS_HOST]
    rng.shuffle(free)

    def take(n: int) -> list[Placement]:
        out = free[:n]
        del free[:n]
        return out

    def move(p: Placement, folder: str | None, ext: str) -> None:
        p.path = planner.path(p.item, p.image_host, ext, key(seed, "move", p.item.id), folder)

    for kind in DAMAGES:
        for p in take(5):
            p.data, ext = damaged(p.item, kind)
            p.image_kind = kind
            if ext != p.path.rsplit(".", 1)[1]:
                move(p, None, ext)
    for p in take(2):
        p.data, p.image_kind = bomb(), "decompression_bomb"
        move(p, None, "png")
    for p in take(45):
        p.image_host = rng.choice((p.host, IMAGE_HOST))
        move(p, "/private", p.item.ext)
    moods = (
        (24, {"status": 404}), (4, {"status": 410}), (5, {"status": 500}), (20, {"status": 503, "times": 1, "retry_after": 1}),
        (20, {"redirect": "moved"}), (2, {"redirect": "loop"}), (3, {"drip": True}), (6, {"content_type": "text/plain"}), (6, {"delay_ms": 1500}),
        (12, {"headers": {"X-Robots-Tag": "noai, noimageai"}}),
    )
    for n, rule in moods:
        for p in take(n):
            p.rule = dict(rule)
            if rule.get("redirect"):
                p.rule = {"status": 301, "redirect": p.url + ("?moved=1" if rule["redirect"] == "moved" else "")}
