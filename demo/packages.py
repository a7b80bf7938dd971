"""Pictures and texts out of ordinary Debian packages, read without installing them.

Each `load_*` function opens one package file and returns `Source`: the pictures in it, each with the captions that its
package gives it (or, where authors wrote free metadata, that metadata as it is), and all its English texts, which
stand as prose on the pages.  Nothing here decides what a picture is used for.
"""

import glob
import html
import io
import json
import lzma
import os
import re
import struct
import tarfile
import zlib
from dataclasses import dataclass, field

from captions import phrase, sentence_to_caption


@dataclass
class Picture:
    """One picture as its package has it."""

    id: str
    source: str
    license: str
    style: str  # photo | drawing | icon | screenshot
    topic: str
    raw: bytes  # the file: PNG, JPEG, WebP or SVG
    caption: str = ""  # what it shows; empty where the package does not say reliably
    natural: list[str] = field(default_factory=list)  # author-written texts, right or not
    stem: str = ""  # file name without its ending


@dataclass
class Source:
    """What one package gives."""

    pictures: list[Picture]
    texts: list[str]


def deb_members(path: str, wanted: re.Pattern):
    """Yields (name, bytes) of the files of a Debian package whose name matches `wanted`."""
    with open(path, "rb") as archive:
        if archive.read(8) != b"!<arch>\n":
            raise ValueError(f"{path}: not a Debian package; delete it and fetch it again")
        while header := archive.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                data = archive.read(size)
                if name.endswith(".xz"):
                    data = lzma.decompress(data)
                elif name.endswith(".gz"):
                    data = zlib.decompress(data, wbits=31)
                elif name != "data.tar":
                    raise ValueError(f"{path}: member {name} is compressed in a way that Python's library cannot read")
                with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                    for member in tar:
                        if member.isfile() and wanted.search(member.name):
                            yield member.name.removeprefix("./"), tar.extractfile(member).read()
                return
            archive.seek(size + (size & 1), os.SEEK_CUR)
    raise ValueError(f"{path}: no data member; delete the file and fetch it again")


def qt_resource(blob: bytes):
    """Yields (path, bytes) of the files in a Qt binary resource collection (`.rcc`).

    Format: header `qres`, version, then offsets of the tree, data and names sections, all big-endian; a tree node is
    14 bytes (22 since version 2): name offset, flags (1 = zlib, 2 = folder), then child count and first child, or
    locale and data offset.
    """
    version, tree, data, names = struct.unpack(">4I", blob[4:20])
    width = 14 if version < 2 else 22
    pending = [(0, "")]
    while pending:
        index, parent = pending.pop()
        node = tree + index * width
        name_at, flags = struct.unpack_from(">IH", blob, node)
        path = parent
        if index:
            (length,) = struct.unpack_from(">H", blob, names + name_at)
            start = names + name_at + 6
            path = f"{parent}/{blob[start:start + 2 * length].decode('utf-16-be')}"
        if flags & 2:
            count, first = struct.unpack_from(">II", blob, node + 6)
            pending += [(child, path) for child in range(first, first + count)]
            continue
        (offset,) = struct.unpack_from(">I", blob, node + 10)
        (size,) = struct.unpack_from(">I", blob, data + offset)
        content = blob[data + offset + 4 : data + offset + 4 + size]
        yield path, zlib.decompress(content[4:]) if flags & 1 else content


def find(folder: str, name: str) -> str | None:
    """The newest file of this package in `folder`, if any."""
    files = sorted(glob.glob(os.path.join(folder, f"{name}_*.deb")))
    return files[-1] if files else None


TUX_TOPICS = {
    "animals": "animals", "plants": "animals", "food": "food", "vehicles": "vehicles", "military": "vehicles", "space": "places",
    "naturalforces": "places", "town": "places", "people": "people", "clothes": "people", "sports": "people", "hobbies": "people",
}


def load_tuxpaint(path: str) -> Source:
    """Tux Paint's stamps: cut-out photos and drawings, each with a sentence in many languages (the first line is English)."""
    pictures, sentences = {}, {}
    for name, data in deb_members(path, re.compile(r"/stamps/.*\.(png|svg|txt)$")):
        stem, kind = name.rsplit(".", 1)
        if kind == "txt":
            sentences[stem] = data.decode("utf-8", "replace").splitlines()[0] if data.strip() else ""
        elif not re.search(r"/(alphabets|math|money)/|_mirror|_flip", stem):
            pictures[stem] = (kind, data)
    out = []
    for stem, (kind, data) in sorted(pictures.items()):
        caption = sentence_to_caption(sentences.get(stem, ""))
        folder = stem.split("/stamps/", 1)[1]
        drawing = kind == "svg" or re.search(r"cartoon|symbols|seasonal|people", folder)
        if caption:
            out.append(
                Picture(
                    "tux-" + re.sub(r"\W+", "-", folder).lower(), "tuxpaint-stamps-default", "GPL-2.0", "drawing" if drawing else "photo",
                    TUX_TOPICS.get(folder.split("/")[0], "things"), data, caption, stem=os.path.basename(stem),
                )
            )
    return Source(out, list(sentences.values()))


A4A_TOPICS = {
    "animals": "animals", "nature": "places", "construction": "places", "food": "food", "fruit_n_veg": "food", "transport": "vehicles",
    "jobs": "people", "people": "people", "body": "people", "sport": "people", "clothes_n_accessories": "people",
}


def load_art4apps(path: str) -> Source:
    """The art4apps drawings that a children's game carries: a word by file name, a category by folder."""
    out = []
    for name, data in deb_members(path, re.compile(r"/art4apps/\w+/\w+\.jpg$")):
        folder, word = name.split("/art4apps/")[1].removesuffix(".jpg").split("/")
        if folder in A4A_TOPICS:
            caption = phrase(word.replace("_", " "))
            out.append(Picture(f"a4a-{folder}-{word}", "art4apps", "CC-BY-SA-3.0", "drawing", A4A_TOPICS[folder], data, caption, stem=word))
    out.sort(key=lambda p: p.id)
    return Source(out, [p.caption for p in out])


GCOMPRIS_FOLDERS = {
    "tools": "things", "renewable": "places", "monuments": "places", "fishes": "animals", "others": "things", "animals": "animals",
    "erase": "animals", "solar_system": "places", "explore_monuments": "places", "words_sample": "",
}
GCOMPRIS_NAMES = {
    "solar": "solar panels", "fish": "a fish", "leMusee": "a museum", "burj": "a skyscraper", "operaHouse": "the Sydney Opera House",
    "monument": "a monument", "color": "", "flies": "a fly", "plier": "pliers", "tweezer": "tweezers", "dragon": "a komodo dragon",
}
NOT_THINGS = set("one two three four five six seven eight nine ten eleven twelve sixteen zero red blue green yellow pink black white gray brown mauve orange-color back skin".split())


def load_gcompris(path: str) -> Source:
    """GCompris: photos named by category, monuments with title and text, drawings for a word list."""
    out, texts, topics = [], [], {}
    wanted = re.compile(r"/rcc/(categorization|explore_monuments|explore_farm_animals|explore_world_animals|erase|solar_system|lang)\.rcc$")
    for name, blob in sorted(deb_members(path, wanted)):
        collection = os.path.basename(name).removesuffix(".rcc")
        files, titles = dict(qt_resource(blob)), {}
        for file, data in sorted(files.items()):
            if file.endswith(".qml"):
                code = data.decode("utf-8", "replace")
                texts += [t for t in re.findall(r'qsTr\("((?:[^"\\]|\\.)*)"\)', code) if "<" not in t and "\\" not in t]
                for title, image in re.findall(r'"title": qsTr\("([^"]+)"\).*?"image2": "([^"]+)"', code, re.S):
                    titles[os.path.basename(image)] = title
        for file, data in sorted(files.items()):
            if not file.endswith(".webp"):
                continue
            stem = os.path.basename(file).removesuffix(".webp")
            folder = next((p for p in reversed(file.split("/")[:-1]) if p in GCOMPRIS_FOLDERS), None)
            base = re.sub(r"\d+$", "", stem)
            if folder is None or base in NOT_THINGS:
                continue
            spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", base).replace("_", " ").lower()
            if folder == "explore_monuments" or collection == "explore_monuments":
                title = titles.get(os.path.basename(file))
                caption, topic = (f"a view of {title}" if title else ""), "places"
            elif folder == "monuments":
                caption, topic = GCOMPRIS_NAMES.get(base, f"a view of {spaced.title()}"), "places"
            elif collection == "solar_system":
                caption, topic = (f"the planet {spaced}" if base != "sun" else "the sun"), "places"
            else:
                caption, topic = GCOMPRIS_NAMES.get(base, phrase(spaced)), GCOMPRIS_FOLDERS[folder] or "things"
            if caption:
                style = "drawing" if collection == "lang" else "photo"
                out.append(Picture(f"gc-{collection}-{stem}".lower(), "gcompris-qt-data", "CC-BY-SA or GPL, per file", style, topic, data, caption, stem=stem))
    out.sort(key=lambda p: p.id)
    return Source(out, texts + [p.caption for p in out])


EMOJI_GROUPS = {
    "Smileys & Emotion": "people", "People & Body": "people", "Animals & Nature": "animals", "Food & Drink": "food", "Travel & Places": "places",
    "Activities": "things", "Objects": "things",
}


def emoji_table(text: str) -> dict[str, tuple[str, str]]:
    """`emoji-test.txt` as {code points joined by '-': (name, topic)}: no skin tones, clocks, families, gendered variants, flags, signs."""
    out, group, subgroup = {}, "", ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line[9:].strip()
        elif line.startswith("# subgroup: "):
            subgroup = line[12:].strip()
        elif "; fully-qualified" in line and group in EMOJI_GROUPS and subgroup not in ("time", "family", "person-symbol"):
            codes, rest = line.split(";", 1)
            name = re.sub(r"^.*?# \S+ E[\d.]+ ", "", rest)
            points = [c for c in codes.lower().split() if c not in ("fe0f", "200d")]
            gendered = {"2640", "2642"} & set(points) or (points[0] == "1f9d1" and len(points) > 1)
            if "skin tone" in name or gendered:
                continue
            topic = "vehicles" if subgroup.startswith("transport") else EMOJI_GROUPS[group]
            out["-".join(points)] = (name, topic)
    return out


def load_emoji(noto: str, emojione: str | None) -> Source:
    """Emoji drawn by two hands: Noto (PNG, with the Unicode tables in the same package) and EmojiOne (SVG, with keywords)."""
    images, table = {}, {}
    for name, data in deb_members(noto, re.compile(r"/emoji_u[0-9a-f_]+\.png$|/unicode/emoji-test\.txt$")):
        if name.endswith(".txt"):
            table = emoji_table(data.decode())
        else:
            images["-".join(c for c in re.findall(r"[0-9a-f]+", os.path.basename(name).removeprefix("emoji_u").removesuffix(".png")) if c not in ("fe0f", "200d"))] = data
    out, texts = [], []
    license_of = {"noto-emoji": "Apache-2.0", "emojione": "CC-BY-SA-4.0"}

    def add(style: str, points: str, data: bytes) -> None:
        if points in table:
            name, topic = table[points]
            name = re.sub(r"^(\w+): (.+)$", r"\1 with \2", name)
            out.append(Picture(f"{style}-{points}", style, license_of[style], "icon", topic, data, phrase(name), stem=f"emoji_u{points.replace('-', '_')}"))

    for points, data in sorted(images.items()):
        add("noto-emoji", points, data)
    if emojione:
        for name, data in sorted(deb_members(emojione, re.compile(r"/assets/svg/[0-9A-F-]+\.svg$|/config/index\.json$"))):
            if name.endswith(".json"):
                for entry in json.loads(data).values():
                    texts += [entry["name"], *entry["keywords"]]
            else:
                add("emojione", "-".join(c for c in os.path.basename(name).removesuffix(".svg").lower().split("-") if c not in ("fe0f", "200d")), data)
    return Source(out, texts + [name for name, _ in table.values()])


CLIPART_TOPICS = {
    "animals": "animals", "plants": "animals", "food": "food", "people": "people", "recreation": "things", "transportation": "vehicles",
    "tools": "things", "buildings": "places", "office": "things", "education": "things", "electronics": "things", "unsorted": "things",
}


def load_openclipart(path: str) -> Source:
    """Open Clip Art: drawings whose authors wrote title, description and keywords; some right, some template, some of another picture."""
    out, texts = [], []
    for name, data in deb_members(path, re.compile(r"/openclipart/svg/.*\.svg$")):
        code = data.decode("utf-8", "replace")
        head = code[: code.find("</metadata>")] if "</metadata>" in code else ""
        title, description = (" ".join(html.unescape(m.group(1)).split()) if (m := re.search(rf"<dc:{t}>([^<]*)</dc:{t}>", head)) else "" for t in ("title", "description"))
        keywords = sorted({html.unescape(k).strip() for k in re.findall(r"<rdf:li>([^<]*)</rdf:li>", head)} - {"", "hash"})
        texts += [t for t in (title, description, *keywords) if t]
        parts = name.split("/openclipart/svg/")[1].split("/")
        stem = parts[-1].removesuffix(".svg")
        if parts[0] in CLIPART_TOPICS and not {"cards", "pantyhose"} & set(parts) and len(data) < 250_000 and title:
            natural = [title, description or title, ", ".join(keywords) or title]
            identity = "oc-" + re.sub(r"\W+", "-", "-".join(parts)).lower().removesuffix("-svg")
            out.append(Picture(identity, "openclipart", "CC0 / public domain", "drawing", CLIPART_TOPICS[parts[0]], data, natural=natural, stem=stem))
    out.sort(key=lambda p: p.id)
    return Source(out, texts)


def load_games(path: str) -> Source:
    """Screenshots of free games: a real web's weakest texts, nothing but the file name."""
    out = []
    for name, data in deb_members(path, re.compile(r"/thumbnails/[^/]+\.png$")):
        stem = os.path.basename(name).removesuffix(".png")
        words = stem.replace("-", " ").replace("_", " ")
        out.append(Picture(f"game-{stem}", "games-thumbnails", "free, per game", "screenshot", "games", data, natural=[words, f"{words} screenshot", stem], stem=stem))
    out.sort(key=lambda p: p.id)
    return Source(out, [p.natural[0] for p in out])


def loaders(folder: str) -> list[tuple]:
    """(function, arguments) for every package that is there, slowest first; the two that the demo cannot do without must be."""
    tux, noto = find(folder, "tuxpaint-stamps-default"), find(folder, "ruby-tanuki-emoji")
    if not tux or not noto:
        raise SystemExit(f"build_site: {folder} lacks tuxpaint-stamps-default or ruby-tanuki-emoji; run demo/get_data.sh")
    jobs = [(load_tuxpaint, (tux,))]
    optional = [
        (load_openclipart, find(folder, "openclipart-svg")), (load_gcompris, find(folder, "gcompris-qt-data")),
        (load_art4apps, find(folder, "pysiogame")), (load_games, find(folder, "games-thumbnails")),
    ]
    jobs.insert(1, (load_emoji, (noto, find(folder, "ruby-gemojione"))))
    return jobs + [(function, (path,)) for function, path in optional if path]
