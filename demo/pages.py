"""Pages for placements: ordinary, lazy, srcset, picture, figure, anchored markup; relative addresses and <base>; robots rules."""

import posixpath
import random
from html import escape
from urllib.parse import urljoin

from pictures import key, small_version
from placements import HOSTS, IMAGE_HOST, MEMBERS_HOST, START_HOST, Placement

PER_PAGE = 24
MARKUPS = ("plain",) * 9 + ("lazy",) * 3 + ("srcset",) * 2 + ("picture",) * 2 + ("anchor",) * 2 + ("noscript",)
ROBOTS = {host: ["/private/"] for host in (*HOSTS, IMAGE_HOST)} | {MEMBERS_HOST: ["/"]}
ROBOTS.pop("clipart.test")  # a site without robots.txt: everything is allowed there


class Site:
    """The files and rules of all hosts, kept in memory until they are written."""

    def __init__(self):
        self.files: dict[tuple[str, str], bytes] = {}
        self.rules: dict[str, dict] = {}

    def put(self, host: str, path: str, data: bytes | str) -> None:
        self.files[host, path] = data.encode() if isinstance(data, str) else data


def reference(page: str, url: str, base: str | None, rng: random.Random) -> str:
    """`url` as this page would write it: absolute, without scheme, from the root, or relative to the page or its <base>."""
    host, path = url.removeprefix("http://").split("/", 1)
    if host != page.removeprefix("http://").split("/", 1)[0]:
        return url if rng.random() < 0.7 else f"//{host}/{path}"
    roll = rng.random()
    if roll < 0.25:
        return url
    if roll < 0.55:
        return f"/{path}"
    start = (base or page).removeprefix("http://").split("/", 1)[1]
    return posixpath.relpath(f"/{path}", posixpath.dirname(f"/{start}"))


def markup(p: Placement, src: str, rng: random.Random, site: Site, page: str, base: str | None) -> str:
    """The HTML of one placement."""
    p.markup = rng.choice(MARKUPS)
    alt = f' alt="{escape(p.alt)}"' if p.kind != "empty" else rng.choice((' alt=""', ""))
    src = escape(src)
    if p.markup == "lazy":
        tag = f'<img class="lazy" src="/static/blank.gif" data-src="{src}"{alt}>'
    elif p.markup == "srcset":
        if p.image_kind == "ok":
            small = posixpath.splitext(p.path)[0] + "-96w.jpg"
            site.put(p.image_host, small, small_version(p.item))
            small_src = escape(reference(page, f"http://{p.image_host}{small}", base, rng))
            tag = f'<img src="{src}" srcset="{small_src} 96w, {src} 256w" sizes="256px"{alt}>'
        else:
            tag = f'<img src="{src}" srcset="{src} 256w"{alt}>'
    elif p.markup == "picture":
        tag = f'<picture><source srcset="{src}" media="(min-width: 1px)"><img src="{src}"{alt}></picture>'
    elif p.markup == "anchor":
        tag = f'<a href="{src}"><img src="{src}" width="128"{alt}></a>'
    elif p.markup == "noscript":
        tag = f'<noscript><img src="{src}"{alt}></noscript>'
    else:
        tag = f"<img{alt} src='{src}'>" if rng.random() < 0.3 else f'<IMG SRC="{src}"{alt} loading="lazy">'
    if p.figcaption:
        tag = f"<figure>{tag}<figcaption>{escape(p.figcaption)}</figcaption></figure>"
    return f'<div class="item">{tag}</div>'


def write_pages(site: Site, placements: list[Placement], prose: list[str], seed: int) -> None:
    """Puts pictures, pages, robots.txt and the two endless pages into `site`, and each placement's page into the placement."""
    for p in placements:
        if not (p.rule and p.rule.get("status") in (404, 410)):
            site.put(p.image_host, p.path, p.data)
        if p.rule:
            site.rules[f"{p.image_host}{p.path}"] = p.rule
    hosts = (*HOSTS, MEMBERS_HOST)
    for host in hosts:
        rng = key(seed, "pages", host)
        mine = [p for p in placements if p.host == host]
        rng.shuffle(mine)
        pages = []
        for at in range(0, len(mine), PER_PAGE):
            n = len(pages) + 1
            folder = "private/gallery" if n == 3 and host == "people.test" else rng.choice(("gallery", "p", "blog/2022"))
            path = f"/{folder}/{n}.html"
            url = f"http://{host}{path}"
            base = f"http://{host}/i/" if rng.random() < 0.15 else None
            body = []
            for p in mine[at : at + PER_PAGE]:
                p.page = url
                src = reference(url, p.url, base, rng)
                if urljoin(base or url, src) != p.url:
                    raise AssertionError(f"{src} on {url} does not lead to {p.url}")
                body.append(markup(p, src, rng, site, url, base))
                if rng.random() < 0.3:
                    body.append(f"<p>{escape(rng.choice(prose)[:300])}</p>")
            pages.append(path)
            after = "index.html" if at + PER_PAGE >= len(mine) else f"more/{n + 1}"
            head = f'<meta charset="utf-8"><title>{host}, page {n}</title>' + (f'<base href="{base}">' if base else "")
            nav = f'<nav><a href="/">home</a> <a href="/{after}">next</a> <a href="http://{START_HOST}/">friends</a></nav>'
            lines = "\n".join(body)
            site.put(host, path, f'<!doctype html><html lang="en"><head>{head}</head><body>{nav}\n{lines}\n</body></html>\n')
            if n > 1:
                site.rules[f"{host}/more/{n}"] = {"status": 302, "redirect": url}
        extra = ' <a href="/calendar.html">calendar</a> <a href="/log.html">log</a>' if host == "bargains.test" else ""
        links = "".join(f'<li><a href="{path}">page {n}</a></li>' for n, path in enumerate(pages, 1))
        site.put(host, "/index.html", f"<!doctype html><html><head><title>{host}</title></head><body><h1>{host}</h1><ul>{links}</ul>{extra}</body></html>\n")
        site.put(host, "/static/blank.gif", b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00!\xf9\x04\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;")
    site.rules["bargains.test/calendar.html"] = {"endless": True}  # a page that never ends
    site.rules["bargains.test/log.html"] = {"drip": True}  # a page that comes a byte at a time
    site.rules["garage.test/robots.txt"] = {"status": 503, "times": 1, "retry_after": 1}
    for host, folders in ROBOTS.items():
        site.put(host, "/robots.txt", "User-agent: *\n" + "".join(f"Disallow: {folder}\n" for folder in folders))
    site.put(START_HOST, "/index.html", "<!doctype html><title>index</title>" + "".join(f'<a href="http://{h}/">{h}</a>\n' for h in hosts))


def disallowed(host: str, path: str) -> bool:
    """Whether the host's robots.txt closes this path to everybody."""
    return any(path.startswith(folder) for folder in ROBOTS.get(host, []))
