"""BLIP and CLIP of Hugging Face transformers with random weights: the peer of the bench `models`.

    transformers_peer.py THREADS [DEVICE]

Reads a line `WORK NUMBERS BATCH SECONDS` (`caption float32 8 0`), does the work on a batch of images, once and then again until the seconds
are over, and answers with the images a second; with 0 where there is no memory for the batch. WORK is `caption`, `score`, `capfilt` or `clip`
of BLIP-base and CLIP ViT-B/32, or with `-base` or `-large` behind it of that BLIP and of CLIP ViT-L/14. NUMBERS is a type of torch, with
`-compiled` behind it through `torch.compile`. Elsewhere than on a CPU a first time is not counted, and the way of the images from main memory
is. Needs torch and transformers (scripts/requirements-goldens.txt).
"""

import copy
import functools
import sys
import time

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TOKENS = 20
# Tokens of the web text and of the caption, as the filter sees them: padded to the longer one.
TEXTS, TEXT_LENGTH = 2, 24


def fill(model):
    """Numbers of ordinary size: transformers starts BLIP's vision transformer at 1e-10, whose products are denormal and slow."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not ("norm" in name.lower() and name.endswith("weight")) and not name.endswith("bias"):
                parameter.normal_(0.0, 0.02)
    return model.eval()


def caption(models, pixels):
    """Nucleus sampling of exactly `TOKENS` tokens for each image, with BLIP's settings."""
    return models["captioner"].generate(
        pixel_values=pixels,
        do_sample=True,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.1,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
    )


def score(models, pixels):
    """ITM and ITC of `TEXTS` texts for each image, each image encoded once."""
    model = models["filter"]
    ids = torch.randint(1000, 20000, (len(pixels) * TEXTS, TEXT_LENGTH))
    mask = torch.ones_like(ids)
    states = model.vision_model(pixels).last_hidden_state
    image = torch.nn.functional.normalize(model.vision_proj(states[:, 0]), dim=-1)
    text = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    text = torch.nn.functional.normalize(model.text_proj(text), dim=-1)
    (image.repeat_interleave(TEXTS, 0) * text).sum(-1)
    matched = model.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=states.repeat_interleave(TEXTS, 0)
    ).last_hidden_state[:, 0]
    return model.itm_head(matched).softmax(-1)


def capfilt(models, pixels):
    caption(models, pixels)
    score(models, pixels)


def clip(models, pixels):
    return models["clip"](pixel_values=pixels[..., :224, :224]).image_embeds


@functools.cache
def rows(dtype):
    return torch.ones(4096, 3072, dtype=dtype)


def product(models, _):
    """One large product, to see what the machine could do."""
    return models["product"](rows(models.dtype))


WORK = {"caption": caption, "score": score, "capfilt": capfilt, "clip": clip, "product": product}


def blip(size):
    config = BlipConfig(text_config={"num_attention_heads": 12})
    if size == "large":
        wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        config = BlipConfig(text_config={"num_attention_heads": 12, "encoder_hidden_size": 1024}, vision_config=wide)
    config.vision_config.image_size = 384
    return config


def clip_vision(size):
    if size != "large":
        return CLIPVisionConfig()
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPVisionConfig(**wide, patch_size=14, projection_dim=768)


MAKE = {
    "captioner": lambda size: BlipForConditionalGeneration(blip(size)),
    "filter": lambda size: BlipForImageTextRetrieval(blip(size)),
    "clip": lambda size: CLIPVisionModelWithProjection(clip_vision(size)),
    "product": lambda size: torch.nn.Linear(3072, 3072),
}


@functools.cache
def exact(name, size):
    return fill(MAKE[name](size))


class Models:
    """The models of a size in a number type on the device, each made when it is asked for first."""

    def __init__(self, size, numbers, device):
        self.size, self.device = size, device
        self.dtype, self.compiled = getattr(torch, numbers.removesuffix("-compiled")), numbers.endswith("-compiled")
        self.made = {}

    def __getitem__(self, name):
        if name not in self.made:
            model = copy.deepcopy(exact(name, self.size)).to(self.device, self.dtype)
            if self.compiled:
                # The parts that compute, whoever calls them; texts grow, images stay.
                for part in ("vision_model", "text_encoder", "text_decoder"):
                    if hasattr(model, part):
                        getattr(model, part).compile(dynamic=part == "text_decoder" or None)
            self.made[name] = model
        return self.made[name]


def work(name, models, pixels, seconds):
    """Images a second; on a CPU they are there in the type of the model, elsewhere they come from main memory."""

    def once():
        with torch.inference_mode():
            WORK[name](models, pixels.to(models.device).to(models.dtype))
        if models.device != "cpu":
            torch.cuda.synchronize()

    if models.device == "cpu":
        pixels = pixels.to(models.dtype)
    else:
        once()
    began, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() - began < seconds:
        once()
        images += len(pixels)
    return images / (time.perf_counter() - began)


@functools.lru_cache(maxsize=1)
def random_pixels(batch):
    return torch.randn(batch, 3, 384, 384)


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(int(sys.argv[1]))
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    # Each length of a text may be compiled once more.
    torch._dynamo.config.recompile_limit = 64
    models = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name, numbers, batch, seconds = line.split()
        name, _, size = name.partition("-")
        if (size, numbers) not in models:
            models[size, numbers] = Models(size, numbers, device)
        try:
            rate = work(name, models[size, numbers], random_pixels(int(batch)), float(seconds))
        except torch.OutOfMemoryError:
            rate = 0.0
        if device != "cpu":
            # The other side needs the memory too.
            torch.cuda.empty_cache()
        print(rate, flush=True)


if __name__ == "__main__":
    main()
