"""Pixels: a package's picture put on a background and encoded, its copies, its damaged copies, its fingerprint."""

import hashlib
import io
import random
import struct
import zlib
from dataclasses import dataclass

import resvg_py
from PIL import Image, ImageChops

from captions import phrase
from packages import Picture

SIDE = 256  # longest side of every picture of the demo
VECTOR_WIDTH = 192  # drawings from vectors; what is cut out is shown at 184 px at most
BACKGROUNDS = {
    "white": (255, 255, 255), "blue": (92, 148, 222), "green": (120, 190, 110), "yellow": (250, 224, 110), "red": (214, 84, 76),
    "orange": (244, 160, 84), "purple": (160, 120, 200), "pink": (246, 178, 200), "gray": (170, 170, 170), "black": (24, 24, 24),
}


@dataclass
class Item:
    """A picture ready to be placed: encoded bytes, what it shows, and what it looks like."""

    id: str
    source: str
    license: str
    style: str
    topic: str
    stem: str
    captions: list[str]  # right captions, shortest first; empty where the package does not say reliably
    natural: list[str]
    data: bytes
    ext: str  # "jpg" | "png"
    width: int
    height: int
    dhash: int  # 64 bits of grey gradients, of the picture cut to its content
    colours: bytes  # 4 x 4 RGB of the same


def key(*parts) -> random.Random:
    """A random generator that depends on its key alone."""
    return random.Random("/".join(map(str, parts)))


def encode(image: Image.Image, ext: str, quality: int = 88) -> bytes:
    out = io.BytesIO()
    image.save(out, *(("JPEG",) if ext == "jpg" else ("PNG",)), **({"quality": quality} if ext == "jpg" else {"compress_level": 6}))
    return out.getvalue()


def decode(picture: Picture) -> Image.Image:
    """The picture as RGBA, no side longer than `SIDE`, drawings from vectors at that size."""
    if picture.raw[:6].lstrip().startswith(b"<") or b"<svg" in picture.raw[:2000]:
        vector = picture.raw.decode("utf-8", "replace")
        # one side given: the other follows, so no drawing's own size (some are 25,000 px wide) is ever rendered
        png = resvg_py.svg_to_bytes(svg_string=vector, skip_system_fonts=True, dpi=96.0, width=VECTOR_WIDTH)
        image = Image.open(io.BytesIO(bytes(png)))
    else:
        image = Image.open(io.BytesIO(picture.raw))
    image = image.convert("RGBA")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def fingerprint(image: Image.Image) -> tuple[int, bytes]:
    """(gradient hash, colours) of a picture, white where transparent and cut to its content."""
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    box = ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).getbbox()
    flat = flat.crop(box) if box else flat
    grey = list(flat.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes())
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (grey[row * 9 + column] > grey[row * 9 + column + 1])
    return bits, flat.resize((4, 4), Image.Resampling.BOX).tobytes()


def alike(a: Item, b: Item) -> bool:
    """Whether two pictures could be taken for copies of each other."""
    if (a.dhash ^ b.dhash).bit_count() > 9:
        return False
    return sum(abs(x - y) for x, y in zip(a.colours, b.colours)) < 26 * len(a.colours)


def render(picture: Picture, seed: int) -> Item | None:
    """The picture on its background, encoded as its page will show it; None where it cannot be drawn or shows nothing."""
    rng = key(seed, "render", picture.id)
    try:
        image = decode(picture)
    except (ValueError, OSError, SyntaxError):  # a vector without size, a broken file: the packages have some
        return None
    alpha = image.getchannel("A")
    cut_out = alpha.histogram()[0] > 0.05 * image.width * image.height
    dhash, colours = fingerprint(image)
    captions = [picture.caption] if picture.caption else []
    plain = picture.caption.removeprefix("a view of ")
    if cut_out:
        box = alpha.getbbox()
        if box is None:
            return None
        image = image.crop(box)
        content = rng.choice((112, 136, 160, 184))
        scale = min(content / max(image.size), 4.0)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
        colour = "white" if rng.random() < 0.4 or not captions else rng.choice(list(BACKGROUNDS)[1:])
        width, height = (min(SIDE, max(96, round(side * 1.25) + 8)) for side in image.size)
        canvas = Image.new("RGB", (width, height), BACKGROUNDS[colour])
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2), image)
        captions += [f"{c} on {phrase(colour)} background" for c in captions]
    else:
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=alpha)
        captions += [f"a {'photo' if picture.style == 'photo' else 'drawing'} of {plain}"] if captions else []
    extrema = canvas.convert("L").getextrema()
    if min(canvas.size) < 48 or extrema[1] - extrema[0] < 24:
        return None
    ext = "jpg" if rng.random() < 0.6 or not cut_out else "png"  # photos and scans are JPEG, as on the web
    data = encode(canvas, ext, rng.choice((80, 86, 92)))
    return Item(
        picture.id, picture.source, picture.license, picture.style, picture.topic, picture.stem, captions, picture.natural, data, ext,
        canvas.width, canvas.height, dhash, colours,
    )


def copy_of(item: Item, rng: random.Random) -> tuple[str, bytes, str]:
    """(kind, bytes, ending) of a near-duplicate: encoded again, made smaller, or cut at the edges."""
    image = Image.open(io.BytesIO(item.data)).convert("RGB")
    kind = rng.choice(("reencoded", "resized", "cropped"))
    if kind == "resized":
        image = image.resize((max(48, image.width * 7 // 10), max(48, image.height * 7 // 10)), Image.Resampling.LANCZOS)
    elif kind == "cropped":
        dx, dy = max(1, image.width // 40), max(1, image.height // 40)
        image = image.crop((dx, dy, image.width - dx, image.height - dy))
    return kind, encode(image, "jpg", 72), "jpg"


DAMAGES = ("truncated", "html_as_image", "one_pixel", "empty_file", "bad_crc", "noise_bytes")


def damaged(item: Item, kind: str) -> tuple[bytes, str]:
    """(bytes, ending) of the picture, damaged in the way named."""
    if kind == "truncated":
        return item.data[: max(40, len(item.data) // 3)], item.ext
    if kind == "html_as_image":
        return b"<!doctype html><title>Not found</title><h1>404</h1><p>The picture was moved.</p>", item.ext
    if kind == "one_pixel":
        return encode(Image.new("RGB", (1, 1), "white"), "png"), "png"
    if kind == "empty_file":
        return b"", item.ext
    if kind == "bad_crc":
        png = bytearray(encode(Image.open(io.BytesIO(item.data)), "png"))
        png[29] ^= 0xFF  # a byte of the header chunk's checksum
        return bytes(png), "png"
    return hashlib.sha512(item.id.encode()).digest() * 40, item.ext


def bomb(side: int = 20_000) -> bytes:
    """A grey PNG of side x side pixels in some 50 KB: a decoder without a pixel guard takes 400 MB for it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row, packer, body = b"\0" + b"\0" * ((side + 7) // 8), zlib.compressobj(9), b""
    for _ in range(side):
        body += packer.compress(row)
    body += packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def small_version(item: Item) -> bytes:
    """The picture at 96 px, for `srcset`."""
    image = Image.open(io.BytesIO(item.data)).convert("RGB")
    image.thumbnail((96, 96), Image.Resampling.LANCZOS)
    return encode(image, "jpg", 80)
