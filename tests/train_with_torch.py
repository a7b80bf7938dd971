#!/usr/bin/env python3
"""A trainer outside of capfilt, as `[train.captioner] command = ["python3", "train_with_torch.py"]` calls it: PyTorch and transformers.

Fine-tunes the captioner in service, without which it cannot begin, on the exported WebDataset shards and leaves a checkpoint. What it is told, it
finds in its environment: CAPFILT_EXPORT, CAPFILT_CHAMPION, CAPFILT_OUTPUT, and the section of the config in CAPFILT_PARAMS (`steps`, `batch`,
`rate`, `seed`). Needs torch, transformers and pillow (scripts/requirements-goldens.txt).
"""

import glob
import io
import json
import os
import random
import shutil
import tarfile

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipImageProcessor, PreTrainedTokenizerFast


def samples(folder: str) -> list[tuple[bytes, str]]:
    """(image, text) of every sample, in the order of the shards."""
    found = []
    for path in sorted(glob.glob(f"{folder}/webdataset/*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as shard:
            for member in shard:
                key, kind = member.name.split(".", 1)
                parts.setdefault(key, {})[kind] = shard.extractfile(member).read()
        for part in parts.values():
            image = next(part[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in part)
            found.append((image, part["txt"].decode()))
    return found


def main() -> None:
    export, champion, output = (os.environ[f"CAPFILT_{name}"] for name in ("EXPORT", "CHAMPION", "OUTPUT"))
    params = json.loads(os.environ["CAPFILT_PARAMS"])
    steps, batch, rate, seed = (params.get(key, usual) for key, usual in (("steps", 100), ("batch", 16), ("rate", 1e-4), ("seed", 0)))
    torch.manual_seed(seed)
    draw = random.Random(seed)
    preprocessor = BlipImageProcessor.from_pretrained(champion)
    # The checkpoint may be stored in half precision, in which AdamW does not work.
    model = BlipForConditionalGeneration.from_pretrained(champion, dtype=torch.float32)
    text = model.config.text_config
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{champion}/tokenizer.json")
    pairs = samples(export)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    model.train()
    for step in range(steps):
        drawn = [pairs[draw.randrange(len(pairs))] for _ in range(batch)]
        rows = [tokenizer.encode(caption, add_special_tokens=False, truncation=True, max_length=28) for _, caption in drawn]
        rows = [[text.bos_token_id, *row, text.sep_token_id] for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [text.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image, _ in drawn]
        pixels = preprocessor(images=images, return_tensors="pt")["pixel_values"]
        loss = model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    model.save_pretrained(output)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(f"{champion}/{name}", f"{output}/{name}")


if __name__ == "__main__":
    main()
