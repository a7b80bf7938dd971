"""Golden outputs of every model family, small and full-size, with weights that `weights.py` makes of their names."""

import json
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)
from weights import fill, images, sample

HERE = Path(__file__).parent / "families"
SEP, CLS, DEC, ENC = 102, 101, 30522, 30523
# Equal widths: the decoder of transformers cross-attends the question at the vision width.
SMALL_VQA = dict(
    vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    ),
    text_config=dict(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, bos_token_id=100, pad_token_id=0, sep_token_id=3, eos_token_id=3,
    ),
    image_text_hidden_size=24,
)  # fmt: skip
BASE = dict(
    vision_config=dict(image_size=384),
    text_config=dict(num_attention_heads=12, vocab_size=30524, encoder_hidden_size=768),
)
LARGE = dict(
    vision_config=dict(
        image_size=384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    text_config=dict(num_attention_heads=12, vocab_size=30524, encoder_hidden_size=1024),
)
SMALL_TEXT = dict(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16,
)  # fmt: skip
SMALL_VISION = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
)
CLIPS = {
    # The newer configs name the end of text, the older ones say 2.
    "clip_small": CLIPConfig(
        vision_config=SMALL_VISION, text_config=SMALL_TEXT | dict(eos_token_id=50), projection_dim=24
    ),
    "clip_small_gelu": CLIPConfig(
        vision_config=SMALL_VISION | dict(hidden_act="gelu"),
        text_config=SMALL_TEXT | dict(hidden_act="gelu", eos_token_id=2),
        projection_dim=24,
    ),
    "clip_b32": CLIPConfig(),
    "clip_l14": CLIPConfig(
        vision_config=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
        text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2),
        projection_dim=768,
    ),
    # 32 is no multiple of the patch: the last pixels are left out.
    "siglip_small": SiglipConfig(
        vision_config=SMALL_VISION | dict(patch_size=7), text_config=SMALL_TEXT | dict(projection_size=48)
    ),
    "siglip_b16": SiglipConfig(),
}
OPEN_CLIPS = {
    "openclip_vit_small": dict(
        embed_dim=24,
        vision_cfg=dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8, mlp_ratio=2.0),
        text_cfg=dict(context_length=16, vocab_size=100, width=32, heads=4, layers=2),
    ),
    "openclip_resnet_small": dict(
        embed_dim=24,
        quick_gelu=True,
        vision_cfg=dict(image_size=64, layers=[1, 2, 1, 1], width=8, head_width=32, patch_size=None),
        text_cfg=dict(context_length=16, vocab_size=100, width=32, heads=4, layers=2),
    ),
    "openclip_rn50": open_clip.get_model_config("RN50"),
}


def save(name, config, tensors, **metadata):
    HERE.mkdir(exist_ok=True)
    ints = {k: v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in tensors.items()}
    texts = {"config": config if isinstance(config, str) else config.to_json_string(), **metadata}
    save_file({k: v.contiguous() for k, v in ints.items()}, HERE / f"{name}.safetensors", metadata=texts)
    print(name, {k: v.tolist() for k, v in ints.items() if v.dtype == torch.int32 and v.numel() < 40})


def texts(first, last, vocab, lengths):
    """Ids right-padded with 0, and their mask."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = 4 + (torch.arange(length) * 7919 + 104729 * row) % (vocab - 8)
        ids[row, 0], ids[row, length - 1] = first, last
        mask[row, :length] = 1
    return ids, mask


@torch.no_grad()
def captioner(name, config, max_length):
    config = BlipConfig(**config)
    model = BlipForConditionalGeneration(config)
    fill(model)
    pixels = images(1, config.vision_config.image_size)
    ids, mask = texts(DEC, SEP, 30522, [7])
    settings = dict(do_sample=False, max_length=max_length)
    save(name, config, {
        "states": sample(model.vision_model(pixels).last_hidden_state),
        "ids": ids,
        "logits": sample(model(pixels, input_ids=ids, attention_mask=mask).logits),
        # Without a penalty a random model says one word for ever.
        "greedy": model.generate(pixels, num_beams=1, repetition_penalty=2.0, **settings),
        "beam3": model.generate(pixels, num_beams=3, **settings),
    })  # fmt: skip


@torch.no_grad()
def matcher(name, config):
    config = BlipConfig(**config)
    model = BlipForImageTextRetrieval(config)
    fill(model)
    pixels = images(1, config.vision_config.image_size)
    ids, mask = texts(CLS, SEP, 30522, [9])
    grounded = ids.clone()
    grounded[:, 0] = ENC
    score = lambda ids, head: model(
        input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=head
    ).itm_score
    save(name, config, {
        "ids": ids,
        "grounded": grounded,
        "itc": score(ids, False),
        "itm_enc": score(grounded, True),
        "itm_cls": score(ids, True),
    })  # fmt: skip


@torch.no_grad()
def questions(name, config, first, lengths, max_length):
    config = BlipConfig(**config)
    model = BlipForQuestionAnswering(config)
    fill(model)
    text = config.text_config
    pixels = images(len(lengths), config.vision_config.image_size)
    ids, mask = texts(first, text.sep_token_id, min(text.vocab_size, 30522), lengths)
    image_states = model.vision_model(pixels).last_hidden_state
    states = model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states)[0]
    answers, _ = texts(text.bos_token_id, text.sep_token_id, min(text.vocab_size, 30522), [5] * len(lengths))
    logits = model.text_decoder(input_ids=answers, encoder_hidden_states=states).logits
    settings = dict(do_sample=False, num_beams=1, max_length=max_length)
    tensors = {
        "ids": ids,
        "mask": mask,
        "states": sample(states),
        "answers": answers,
        "logits": sample(logits),
        # Padding is seen by the decoder of transformers, so a question's answer differs with its batch.
        "greedy": model.generate(input_ids=ids, pixel_values=pixels, attention_mask=mask, **settings),
    }
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids=ids[row : row + 1, :length], pixel_values=pixels[row : row + 1], **settings)
        tensors[f"greedy.{row}"] = alone[0]
    save(name, config, tensors)


@torch.no_grad()
def contrastive(name, config):
    model = (CLIPModel if config.model_type == "clip" else SiglipModel)(config)
    fill(model)
    text = config.text_config
    pixels = images(2 if "small" in name else 1, config.vision_config.image_size)
    if config.model_type == "siglip":
        width = text.max_position_embeddings
        ids = 4 + (torch.arange(3 * width).reshape(3, width) * 7919) % (text.vocab_size - 8)
    else:
        # Lower ids behind the end do not count, nor does the end's id a second time.
        end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        ids, _ = texts(text.vocab_size - 2, end, min(text.vocab_size, end), [9, 5, 7])
        ids[2, 8] = end
    out = model(input_ids=ids, pixel_values=pixels)
    image_states = out.vision_model_output.last_hidden_state
    if config.model_type == "clip":
        image_states = model.vision_model.post_layernorm(image_states)
    save(name, config, {
        "ids": ids,
        "image_states": sample(image_states),
        "text_states": sample(out.text_model_output.last_hidden_state),
        "image_features": out.image_embeds,
        "text_features": out.text_embeds,
        "logits": out.logits_per_image,
    })  # fmt: skip


@torch.no_grad()
def open_clips(name, config):
    model = open_clip.CLIP(**config)
    shapes = fill(model)
    pixels = images(2 if "small" in name else 1, config["vision_cfg"]["image_size"])
    vocab = config["text_cfg"]["vocab_size"]
    ids, _ = texts(vocab - 2, vocab - 1, vocab, [9, 5, 7])
    width = config["text_cfg"]["context_length"]
    padded = torch.zeros(3, width, dtype=torch.long)
    padded[:, :9] = ids
    image_features, text_features, scale = model(pixels, padded)
    save(name, json.dumps({"model_cfg": config}), {
        "ids": ids,
        "image_features": image_features,
        "text_features": text_features,
        "logits": scale * image_features @ text_features.T,
    }, shapes=json.dumps(shapes))  # fmt: skip


@torch.no_grad()
def trunk(name, side):
    model = timm.create_model(f"tf_{name}", pretrained=False)
    fill(model)
    # What timm takes for pixels, from those that CLIP and BLIP normalise.
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = (255 * (images(2, side) * std + mean) - 127) / 128
    save(name, json.dumps({"side": side}), {"map": sample(model.forward_features(pixels).flatten(2).transpose(1, 2))})


def main():
    # Feature maps of odd sides are padded unevenly.
    trunk("efficientnet_lite0", 96)
    trunk("efficientnet_lite3", 64)
    questions("vqa_small", SMALL_VQA, 101, [11, 6, 8], 14)
    for name, config in CLIPS.items():
        contrastive(name, config)
    for name, config in OPEN_CLIPS.items():
        open_clips(name, config)
    captioner("blip_base", BASE, 12)
    captioner("blip_large", LARGE, 9)
    matcher("blip_itm_base", BASE)
    questions("blip_vqa_base", BASE, ENC, [9], 8)


if __name__ == "__main__":
    main()
