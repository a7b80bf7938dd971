"""Writes small BLIPs of Hugging Face transformers in every format that checkpoints come in.

    pip install "transformers==5.23.*" torch safetensors
    python make_checkpoints.py

In `formats`, `captioner` and `filter` are as transformers saves them; each other folder holds the numbers of one of them. The Rust tests
open each and compare.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

HERE = Path(__file__).parent / "formats"
SHARD = 16_000

CONFIG = BlipConfig(
    vision_config=dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    ),
    text_config=dict(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=5,
        pad_token_id=0,
        sep_token_id=3,
        eos_token_id=3,
    ),
    image_text_hidden_size=6,
)


# Its decoder reads the states of the question: image and text have one width.
QUESTIONS = BlipConfig(
    vision_config=CONFIG.vision_config.to_dict() | dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1),
    text_config=CONFIG.text_config.to_dict() | dict(num_hidden_layers=1, encoder_hidden_size=8),
)

CLIP = CLIPConfig(
    vision_config=dict(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    ),
    text_config=dict(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=18,
        eos_token_id=19,
    ),
    projection_dim=6,
)


def reference(name, kind, seed, config=CONFIG):
    """A model with random weights as transformers saves it, and its state dict."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    (HERE / name / "model.safetensors").chmod(0o644)
    return model.state_dict()


def folder(name, source):
    target = HERE / name
    target.mkdir()
    shutil.copy(HERE / source / "config.json", target)
    return target


def with_constants(tensors):
    """As older versions had it: with position ids."""
    tensors = dict(tensors)
    for prefix in ("text_decoder.bert", "text_encoder", "text_model", "vision_model"):
        positions = tensors.get(f"{prefix}.embeddings.position_embeddings.weight")
        positions = tensors.get(f"{prefix}.embeddings.position_embedding.weight", positions)
        if positions is not None:
            tensors[f"{prefix}.embeddings.position_ids"] = torch.arange(len(positions)).expand((1, -1))
    return tensors


def original_name(name):
    """The inverse of `convert_blip_original_pytorch_to_hf.py`."""
    for new, old in (
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
    ):
        name = name.replace(new, old)
    if name.startswith("visual_encoder"):
        name = name.replace("layer_norm", "norm").replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
    return name


def as_blip_had_it(tensors):
    """What BLIP's `train_retrieval.py` and `pretrain.py` save: momentum encoders and queues too (here of one layer)."""
    model = {original_name(name): tensor for name, tensor in with_constants(tensors).items()}
    for part in ("visual_encoder", "text_encoder"):
        for name in [name for name in model if name.startswith(f"{part}.") and (".0." in name or "embed" not in name)][:4]:
            model[name.replace(part, f"{part}_m", 1)] = model[name] + 1.0
    model["temp"] = torch.tensor(0.07)
    model["image_queue"] = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    model["text_queue"] = model["image_queue"] * 2.0
    model["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999), "amsgrad": False, "params": [0, 1, 2]}]}
    return {"model": model, "optimizer": optimizer, "config": {"image_size": 32, "batch": 2**40}, "epoch": 5}


OPEN_CLIP = {
    "embed_dim": 6,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8, "mlp_ratio": 1.5},
    "text_cfg": {"context_length": 10, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1, "mlp_ratio": 1.5},
}


def open_clip(tensors):
    """The inverse of `convert_clip_original_pytorch_to_hf.py`: OpenAI's and OpenCLIP's layout."""
    rename = (
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("visual_projection.weight", "visual.proj"),
        ("text_projection.weight", "text_projection"),
        ("layer_norm", "ln_"),
        ("self_attn", "attn"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    out = {"attn_mask": torch.zeros(10, 10)}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        if name.endswith("_projection.weight"):
            tensor = tensor.t()
        for new, old in rename:
            name = name.replace(new, old)
        out[name] = tensor.contiguous()
    return out


def shards(tensors):
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if size > SHARD:
            parts, size = [*parts, {}], 0
        parts[-1][name] = tensor
        size += tensor.numel() * tensor.element_size()
    return parts


def save_shards(target, tensors, stem, extension, save):
    parts, places = shards(tensors), {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.{extension}"
        save(part, target / file)
        places |= {name: file for name in part}
    index = {"metadata": {"total_size": sum(t.numel() * 4 for t in tensors.values())}, "weight_map": places}
    (target / f"{stem}.{extension}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_shard(part, path):
    save_file(part, path, {"format": "pt"})
    path.chmod(0o644)


def views(tensors):
    """Every other matrix by columns, every third tensor as a slice of a larger one; all as bfloat16."""
    out = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        tensor = tensor.bfloat16()
        if tensor.dim() == 2 and number % 2:
            tensor = tensor.t().contiguous().t()
        elif number % 3 == 0:
            tensor = torch.cat([tensor, tensor])[: tensor.shape[0]]
        out[name] = tensor
    return out


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    captioner = reference("captioner", BlipForConditionalGeneration, 1)
    matcher = reference("filter", BlipForImageTextRetrieval, 2)
    torch.save(with_constants(captioner), folder("captioner-bin", "captioner") / "pytorch_model.bin")
    torch.save(as_blip_had_it(matcher), folder("filter-pth", "filter") / "model_base_retrieval_tiny.pth")
    torch.save(as_blip_had_it(captioner), folder("captioner-pth", "captioner") / "checkpoint.pth")
    stored = {name: tensor for name, tensor in captioner.items() if "cls.predictions.decoder" not in name}
    save_shards(folder("captioner-sharded", "captioner"), stored, "model", "safetensors", save_shard)
    save_shards(folder("filter-bin-sharded", "filter"), with_constants(matcher), "pytorch_model", "bin", torch.save)
    torch.save({"state_dict": views(matcher)}, folder("filter-bf16-views", "filter") / "pytorch_model.bin")
    clip = reference("clip", CLIPModel, 3, CLIP)
    torch.save(with_constants(clip), folder("clip-bin", "clip") / "pytorch_model.bin")
    target = HERE / "clip-open"
    target.mkdir()
    save_file(open_clip(clip), target / "open_clip_model.safetensors")
    (target / "open_clip_model.safetensors").chmod(0o644)
    (target / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}, indent=2) + "\n")
    vqa = reference("vqa", BlipForQuestionAnswering, 4, QUESTIONS)
    torch.save(as_blip_had_it(vqa), folder("vqa-pth", "vqa") / "model_vqa.pth")
    old = folder("before-1.6", "filter") / "model.pth"
    torch.save(as_blip_had_it(matcher), old, _use_new_zipfile_serialization=False)
    program = folder("torchscript", "filter") / "model.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
