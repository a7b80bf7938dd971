#!/usr/bin/env python3
"""What the bench `fetch` needs, made once: 500 photos of about two megapixels and 300 KB, and nginx.

    workers/crawler/benches/fetch_data.py FOLDER

leaves FOLDER/photos and, where the system has no nginx, FOLDER/nginx. The photos are cut out of the pictures of a Debian package of
wallpapers: JPEGs of 4:2:0, every fifth one progressive, of random shape and place, always the same ones. Packages are opened, never
installed.
"""

import io
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "demo"))
from packages import deb_members  # noqa: E402
from PIL import Image  # noqa: E402

COUNT = 500
SHAPES = [(4, 3), (3, 2), (16, 9), (1, 1), (3, 4), (2, 3)]
# Most bytes of a file, on average; what fits under it has about 300 KB.
TARGET = 380_000


def encode(image, quality, progressive):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, progressive=progressive, subsampling="4:2:0")
    return out.getvalue()


def crop(picture, draw):
    """A part of `picture` in a size of about two megapixels, or None if it is too small for the drawn shape."""
    wide, high = draw.choice(SHAPES)
    pixels = draw.uniform(1.6e6, 2.4e6)
    height = round((pixels * high / wide) ** 0.5)
    width = round(height * wide / high)
    room = min(picture.width / width, picture.height / height)
    if room < 1:
        return None
    scale = draw.uniform(1, min(room, 2))
    box_width, box_height = round(width * scale), round(height * scale)
    left, top = draw.randint(0, picture.width - box_width), draw.randint(0, picture.height - box_height)
    return picture.crop((left, top, left + box_width, top + box_height)).resize((width, height), Image.Resampling.LANCZOS)


def package(folder, name):
    """The file of a Debian package, fetched if it is not there."""
    while not (files := sorted(folder.glob(f"{name}_*.deb"))):
        print(f"fetch_data: fetching {name}", flush=True)
        subprocess.run(["apt-get", "-qq", "download", name], cwd=folder, check=True)
    return str(files[-1])


def cut(wallpapers, folder):
    pictures = []
    for _, blob in deb_members(wallpapers, re.compile(r"/contents/images/.*\.(jpg|png)$")):
        picture = Image.open(io.BytesIO(blob)).convert("RGB")
        if picture.width * picture.height > 2_500_000:
            pictures.append(picture)
    draw = random.Random(7)
    done = total = 0
    while done < COUNT:
        image = crop(draw.choice(pictures), draw)
        if image is None:
            continue
        target, progressive = TARGET * draw.uniform(0.5, 1.5), done % 5 == 4
        for quality in (95, 90, 85, 80, 75, 65, 55):
            blob = encode(image, quality, progressive)
            if len(blob) <= target:
                break
        # Of flat skies a file of this size cannot be made.
        if quality == 95 and len(blob) < target / 2:
            continue
        (folder / f"{done:04}.jpg").write_bytes(blob)
        done, total = done + 1, total + len(blob)
    print(f"fetch_data: {COUNT} photos of {total / COUNT / 1000:.0f} KB on average")


def main():
    folder = Path(sys.argv[1])
    photos, nginx = folder / "photos", folder / "nginx"
    folder.mkdir(parents=True, exist_ok=True)
    if not photos.is_dir():
        part = folder / "photos.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        cut(package(folder, "plasma-workspace-wallpapers"), part)
        part.rename(photos)
    if not nginx.exists() and not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        for _, blob in deb_members(package(folder, "nginx"), re.compile(r"usr/sbin/nginx$")):
            nginx.write_bytes(blob)
            nginx.chmod(0o755)


main()
