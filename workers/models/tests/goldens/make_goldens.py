"""Writes the golden files of this folder with Hugging Face transformers and OpenCLIP: here small MEDs with random weights, inputs and
outputs; `families.py` has every family, small and full-size, `inputs.py` images and texts, and `training.py` steps of training.

    pip install -r scripts/requirements-goldens.txt
    python make_goldens.py

The Rust tests read the files and never run this script.
"""

import json
from pathlib import Path

import families
import inputs
import numpy as np
import torch
import training
from PIL import Image
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HERE = Path(__file__).parent
PAD, SEP, CLS, DEC, ENC, VOCAB = 0, 3, 2, 100, 101, 120
SEP_BIAS = 3.0
PROMPT = [DEC, 40, 41, 42]

# The vision width differs from the text width on purpose, and neither is a multiple of the other.
CONFIG = BlipConfig(
    vision_config=dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    ),
    text_config=dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        bos_token_id=DEC,
        pad_token_id=PAD,
        sep_token_id=SEP,
        eos_token_id=SEP,
    ),
    image_text_hidden_size=24,
)


def spread(model, seed):
    """Random weights large enough that every part moves the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
        if hasattr(model, "text_decoder"):
            # Likely enough that some captions end and others do not.
            model.text_decoder.cls.predictions.bias[SEP] += SEP_BIAS
    return model.eval()


def save(folder, model, tensors):
    target = HERE / folder
    model.save_pretrained(target)
    for extra in ("generation_config.json",):
        (target / extra).unlink(missing_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "golden.safetensors")


def random_texts(generator, lengths, first):
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros((len(lengths), width), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, 100, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = first, SEP
        mask[row, :length] = 1
    return ids, mask


def padded(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [PAD] * (width - len(row)) for row in rows])


@torch.no_grad()
def captioner():
    generator = torch.Generator().manual_seed(1)
    model = spread(BlipForConditionalGeneration(CONFIG), seed=2)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    ids, mask = random_texts(generator, [9, 5, 7], DEC)
    states = model.vision_model(pixels).last_hidden_state
    logits = model(pixels, input_ids=ids, attention_mask=mask).logits
    prompt = torch.tensor([PROMPT + [SEP]] * 3)
    greedy = dict(do_sample=False, num_beams=1, max_length=16)
    prompted = dict(input_ids=prompt, attention_mask=torch.ones_like(prompt))
    beams = {
        "beam3": dict(num_beams=3),
        "beam3_prompt": dict(num_beams=3, **prompted),
        "beam3_k": dict(num_beams=3, num_return_sequences=3, **prompted),
        "beam3_penalty": dict(num_beams=3, repetition_penalty=1.3, min_length=12),
        "beam4_short": dict(num_beams=4, num_return_sequences=4, length_penalty=0.5),
        "beam4_long": dict(num_beams=4, num_return_sequences=4, length_penalty=2.0),
        # Shorter is better, and most texts end long before their greatest length.
        "beam5_early": dict(num_beams=5, num_return_sequences=5, length_penalty=-1.0, max_length=30, **prompted),
    }
    tensors = {
        "pixels": pixels,
        "image_states": states,
        "ids": ids,
        "mask": mask,
        "lm_logits": logits,
        "greedy": model.generate(pixels, **greedy),
        "greedy_prompt": model.generate(
            pixels, input_ids=prompt, attention_mask=torch.ones_like(prompt), **greedy
        ),
        "greedy_penalty": model.generate(pixels, repetition_penalty=1.3, min_length=12, **greedy),
    }
    for name, settings in beams.items():
        # `generate` writes the first token into the ids that it is given.
        settings = dict(max_length=16) | {k: v.clone() if torch.is_tensor(v) else v for k, v in settings.items()}
        wanted = dict(do_sample=False, return_dict_in_generate=True, output_scores=True)
        out = model.generate(pixels, **wanted, **settings)
        tensors |= {name: out.sequences, f"{name}_scores": out.sequences_scores}
    save("captioner", model, {k: v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in tensors.items()})
    for name in ("greedy", "greedy_prompt", "greedy_penalty", *beams):
        print(name, tensors[name].tolist())


@torch.no_grad()
def matcher():
    generator = torch.Generator().manual_seed(3)
    model = spread(BlipForImageTextRetrieval(CONFIG), seed=4)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    ids, mask = random_texts(generator, [11, 6, 8], CLS)
    grounded = ids.clone()
    grounded[:, 0] = ENC
    itm = lambda tokens: model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, use_itm_head=True).itm_score
    tensors = {
        "pixels": pixels,
        "ids": ids,
        "mask": mask,
        "itc": model(input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False).itm_score,
        "itm_enc": itm(grounded),
        "itm_cls": itm(ids),
    }
    save("filter", model, {k: v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in tensors.items()})
    print("itc", tensors["itc"].tolist(), "itm", tensors["itm_enc"].tolist())


def sampling():
    """The distributions that `generate` draws from, in its order of processors."""
    generator = torch.Generator().manual_seed(5)
    cases = [
        dict(repetition_penalty=1.1, min_length=5, temperature=1.0, top_k=50, top_p=0.9),
        dict(repetition_penalty=1.5, min_length=9, temperature=0.7, top_k=10, top_p=0.5),
        dict(repetition_penalty=1.0, min_length=0, temperature=1.3, top_k=0, top_p=0.95),
        dict(repetition_penalty=1.2, min_length=0, temperature=1.0, top_k=5, top_p=1.0),
    ]
    logits = 2.0 * torch.randn(6, VOCAB, generator=generator)
    # The end of text is likely, so that the minimum length matters.
    logits[:, SEP] += 5.0
    # Equal scores straddle the k-th place; only for cases without a nucleus, whose cut among equals is arbitrary in the reference.
    ties = logits.clone()
    ties[:, 10:20] = 4.5
    history = torch.randint(0, VOCAB, (6, 7), generator=generator)
    tensors = {"logits": logits, "ties": ties, "history": history.to(torch.int32)}
    for number, case in enumerate(cases):
        steps = LogitsProcessorList()
        if case["repetition_penalty"] != 1.0:
            steps.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
        if case["min_length"] > 0:
            steps.append(MinLengthLogitsProcessor(case["min_length"], SEP))
        if case["temperature"] != 1.0:
            steps.append(TemperatureLogitsWarper(case["temperature"]))
        if case["top_k"] > 0:
            steps.append(TopKLogitsWarper(case["top_k"]))
        if case["top_p"] < 1.0:
            steps.append(TopPLogitsWarper(case["top_p"]))
        source = logits if case["top_p"] < 1.0 else ties
        tensors[f"probabilities.{number}"] = torch.softmax(steps(history, source.clone()), dim=-1)
    save_file(tensors, HERE / "sampling.safetensors", metadata={"cases": json.dumps(cases)})


def preprocessing():
    """Direct bicubic resize by Pillow, 1/255, CLIP mean and deviation."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    deviation = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    y, x = np.mgrid[0:61, 0:97]
    waves = [128 + 120 * np.sin(x / 5 + y / 9), (x * 255 / 96 + y * 3) % 256, ((x // 7 + y // 5) % 2) * 255]
    image = np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)
    tensors = {"image": torch.from_numpy(image)}
    for side in (32, 128):
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        normal = (small / 255 - mean) / deviation
        tensors[f"pixels.{side}"] = torch.from_numpy(normal.transpose(2, 0, 1).copy())
    save_file(tensors, HERE / "preprocess.safetensors")


if __name__ == "__main__":
    captioner()
    matcher()
    sampling()
    preprocessing()
    inputs.main()
    families.main()
    training.main()
