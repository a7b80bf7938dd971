"""BLIP-base and CLIP ViT-B/32 of Hugging Face transformers with random weights, on the CPU: the peer of the bench `models`.

Reads a line `WORK NUMBERS BATCH` (`caption float32 8`), does the work once on a batch of images and answers with the images a second.
Needs torch and transformers (scripts/requirements-goldens.txt).
"""

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


WORK = {"caption": caption, "score": score, "capfilt": capfilt, "clip": clip}


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(int(sys.argv[1]))
    config = BlipConfig(text_config={"num_attention_heads": 12})
    config.vision_config.image_size = 384
    exact = {
        "captioner": fill(BlipForConditionalGeneration(config)),
        "filter": fill(BlipForImageTextRetrieval(config)),
        "clip": fill(CLIPVisionModelWithProjection(CLIPVisionConfig())),
    }
    models = {"float32": exact}
    print("ready", flush=True)
    for line in sys.stdin:
        work, numbers, batch = line.split()
        if numbers not in models:
            import copy

            models[numbers] = {name: copy.deepcopy(model).to(getattr(torch, numbers)) for name, model in exact.items()}
        pixels = torch.randn(int(batch), 3, 384, 384).to(getattr(torch, numbers))
        began = time.perf_counter()
        with torch.inference_mode():
            WORK[work](models[numbers], pixels)
        print(int(batch) / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
