#!/usr/bin/env python3
"""Opens an exported dataset version with the programs that people use, and counts.

    check_exports.py FOLDER COUNT [--formats webdataset,parquet,blip]
    check_exports.py FOLDER COUNT --formats download

FOLDER holds `webdataset/*.tar`, `parquet/*.parquet` and `blip.json`, as `capfilt dataset export` writes them; COUNT is the
number of rows in the version's manifest. With `download`, FOLDER holds `00000.tar`, `00000.parquet`, ... as `capfilt download`
writes them, and COUNT is the number of images. Each format is opened with its own library (webdataset; pyarrow and Hugging
Face datasets; the standard library), every image is decoded, and one line is printed. Ends with 1 if anything is amiss.
Needs scripts/requirements-test.txt; asks the network for nothing.
"""

import argparse
import glob
import io
import json
import os
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

IMAGES = ("jpg", "jpeg", "png", "webp")


class Amiss(Exception):
    """What an export is not as it should be."""


def decoded(data: bytes, where: str) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # Pillow raises many kinds; each means that a trainer could not read the sample
        raise Amiss(f"{where}: the image does not decode: {error}") from error


def captioned(text, where: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise Amiss(f"{where}: the caption is {text!r}")


def check_webdataset(folder: str) -> int:
    return check_tars(f"{folder}/webdataset")


def check_tars(folder: str) -> int:
    import webdataset

    shards = sorted(glob.glob(f"{folder}/*.tar"))
    if not shards:
        raise Amiss(f"{folder}: no *.tar")
    keys = set()
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        key = sample["__key__"]
        if key in keys:
            raise Amiss(f"{key}: the key stands twice")
        keys.add(key)
        kinds = [kind for kind in IMAGES if kind in sample]
        if len(kinds) != 1 or "txt" not in sample or "json" not in sample:
            raise Amiss(f"{key}: expected one image, txt and json, found {sorted(k for k in sample if not k.startswith('__'))}")
        decoded(sample[kinds[0]], key)
        captioned(sample["txt"].decode(), key)
        if not isinstance(json.loads(sample["json"]), dict):
            raise Amiss(f"{key}: json is not an object")
    return len(keys)


def parquet_files(folder: str) -> list[str]:
    files = sorted(glob.glob(f"{folder}/parquet/*.parquet"))
    if not files:
        raise Amiss(f"{folder}/parquet: no *.parquet")
    return files


def check_pyarrow(folder: str) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = 0
    for file in parquet_files(folder):
        table = pyarrow.parquet.read_table(file)
        image, text = table.schema.field("image").type, table.schema.field("text").type
        if not pyarrow.types.is_struct(image) or {f.name for f in image} != {"bytes", "path"}:
            raise Amiss(f"{file}: `image` is {image}, expected struct<bytes, path>")
        if not (pyarrow.types.is_string(text) or pyarrow.types.is_large_string(text)):
            raise Amiss(f"{file}: `text` is {text}")
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        if features.get("image", {}).get("_type") != "Image":
            raise Amiss(f"{file}: the schema's huggingface metadata does not declare `image` as an image")
        for n, row in enumerate(table.select(["image", "text"]).to_pylist()):
            decoded(row["image"]["bytes"], f"{file} row {n}")
            captioned(row["text"], f"{file} row {n}")
        rows += table.num_rows
    return rows


def check_datasets(folder: str) -> int:
    import datasets

    files = parquet_files(folder)
    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        if not isinstance(loaded.features["image"], datasets.Image):
            raise Amiss(f"`image` came as {loaded.features['image']}, expected the image feature")
        rows = 0
        for row in loaded:
            row["image"].load()
            captioned(row["text"], f"row {rows}")
            rows += 1
    return rows


def check_blip(folder: str) -> int:
    with open(f"{folder}/blip.json") as file:
        pairs = json.load(file)
    for n, pair in enumerate(pairs):
        captioned(pair.get("caption"), f"entry {n}")
        image = pair.get("image", "")
        if image.startswith(("http://", "https://")):
            continue
        try:
            with open(os.path.join(folder, image), "rb") as opened:
                decoded(opened.read(), image)
        except OSError as error:
            raise Amiss(f"entry {n}: {error}") from error
    return len(pairs)


def check_download(folder: str) -> int:
    import pyarrow.parquet

    images = 0
    for file in sorted(glob.glob(f"{folder}/*.parquet")):
        rows = pyarrow.parquet.read_table(file).to_pylist()
        with open(file.replace(".parquet", "_stats.json")) as opened:
            stats = json.load(opened)
        done = [row for row in rows if row["status"] == "success"]
        if (stats["count"], stats["successes"]) != (len(rows), len(done)):
            raise Amiss(f"{file}: {len(rows)} rows and {len(done)} images, but the stats say {stats}")
        if any((row["width"] is None) != (row["error_message"] is not None) for row in rows):
            raise Amiss(f"{file}: a row has both an image and an error, or neither")
        images += len(done)
    return images


CHECKS = {
    "download": [("webdataset", check_tars), ("pyarrow", check_download)],
    "webdataset": [("webdataset", check_webdataset)],
    "parquet": [("pyarrow", check_pyarrow), ("datasets", check_datasets)],
    "blip": [("json", check_blip)],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("count", type=int)
    parser.add_argument("--formats", default="webdataset,parquet,blip")
    args = parser.parse_args()
    failed = 0
    for name in args.formats.split(","):
        for library, check in CHECKS[name]:
            try:
                found = check(args.folder)
                if found != args.count:
                    raise Amiss(f"{found} samples, but the manifest says {args.count}")
                print(f"ok    {name} opened with {library}: {found} samples, every image decodes")
            except Exception as error:  # libraries raise many kinds; each means that the export cannot be used
                failed += 1
                print(f"FAIL  {name} opened with {library}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
