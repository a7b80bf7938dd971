"""BLIP-base of Hugging Face transformers with random weights, on the CPU: the peer of the bench `models`.

Reads one word a line, `caption` or `score`, does the bench's work once and answers with the figure: captions, or ITM and ITC
scores, a second. Needs torch and transformers (scripts/requirements-goldens.txt).
"""

import sys
import time

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

IMAGES, TEXTS, TOKENS, TEXT_LENGTH = 4, 2, 20, 12


def caption(model, pixels: torch.Tensor) -> int:
    """Nucleus sampling of exactly `TOKENS` tokens for each image."""
    model.generate(
        pixel_values=pixels, do_sample=True, top_p=0.9, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS, repetition_penalty=1.1
    )
    return len(pixels)


def score(model, pixels: torch.Tensor) -> int:
    """ITM and ITC of `TEXTS` texts for each image, each image encoded once."""
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
    model.itm_head(matched).softmax(-1)
    return len(ids)


def main() -> None:
    torch.manual_seed(1)
    config = BlipConfig()
    config.vision_config.image_size = 384
    work = {"caption": (BlipForConditionalGeneration(config).eval(), caption), "score": (BlipForImageTextRetrieval(config).eval(), score)}
    pixels = torch.randn(IMAGES, 3, 384, 384)
    print("ready", flush=True)
    for line in sys.stdin:
        model, do = work[line.strip()]
        began = time.perf_counter()
        with torch.inference_mode():
            done = do(model, pixels)
        print(done / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
