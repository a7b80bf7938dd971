"""Golden inputs of the models: images as transformers and OpenCLIP prepare them, texts as transformers tokenises them."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer, CLIPTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

HERE = Path(__file__).parent
# Width and height: wide, tall, tiny, smaller than the target, odd, extreme.
SHAPES = [(131, 37), (40, 97), (5, 3), (20, 31), (63, 61), (9, 200), (30, 30)]
# 33 - 30 is odd: where the middle begins depends on the rounding.
PROCESSORS = {
    "blip": BlipImageProcessorPil(size={"height": 32, "width": 32}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 30, "width": 30}),
    "clip_same": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
    "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
}


def picture(width, height):
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 120 * np.sin(x / 5 + y / 9), (x * 255 / width + y * 3) % 256, ((x // 7 + y // 5) % 2) * 255]
    return np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)


def images():
    tensors = {}
    open_clips = {
        "open_clip": dict(resize_mode="shortest", interpolation="bicubic"),
        "open_clip_squash": dict(resize_mode="squash", interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3),
    }
    for number, shape in enumerate(SHAPES):
        image = picture(*shape)
        tensors[f"image.{number}"] = torch.from_numpy(image)
        for name, processor in PROCESSORS.items():
            pixels = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
            tensors[f"{name}.{number}"] = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))
        for name, settings in open_clips.items():
            transform = open_clip.image_transform(30, is_train=False, **settings)
            tensors[f"{name}.{number}"] = transform(Image.fromarray(image))
    configs = {name: processor.to_json_string() for name, processor in PROCESSORS.items()}
    configs |= {name: json.dumps({"preprocess_cfg": settings}) for name, settings in open_clips.items()}
    save_file(tensors, HERE / "images.safetensors", metadata=configs)


def texts():
    folder = HERE / "texts"
    lines = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    merges = (folder / "clip_merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    # OpenAI's `simple_tokenizer.py`: bytes, bytes that end a word, merges, start and end.
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_ = [chr(b) for b in letters] + [chr(256 + n) for n in range(256 - len(letters))]
    words = [*bytes_, *(b + "</w>" for b in bytes_), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split(" ")) for m in merges])
    bert_words = (folder / "bert_vocab.txt").read_text(encoding="utf-8").splitlines()
    bert = BertTokenizer(vocab={word: i for i, word in enumerate(bert_words)})
    tensors = {}
    for name, ids in {
        "clip": clip(lines, truncation=True, max_length=77)["input_ids"],
        "bert": bert(lines)["input_ids"],
    }.items():
        tensors[name] = torch.tensor([i for row in ids for i in row], dtype=torch.int32)
        tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in ids], dtype=torch.int32)
        print(name, "tokens", tensors[name].numel(), "cut", sum(len(row) == 77 for row in ids))
    save_file(tensors, folder / "ids.safetensors")


def main():
    images()
    texts()


if __name__ == "__main__":
    main()
