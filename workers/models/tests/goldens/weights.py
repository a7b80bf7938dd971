"""Weights that a rule makes of a name and a shape, so that no file has to hold them: the Rust tests make the same ones."""

import numpy as np
import torch


def numbers(name, count):
    """`count` float32 in [-0.5, 0.5): FNV-1a of the name, MurmurHash3's finalizer of it and the index, the upper 24 bits."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = (seed ^ byte) * 0x01000193 & 0xFFFFFFFF
    out = np.empty(count, dtype=np.float32)
    step = 1 << 22
    for start in range(0, count, step):
        x = np.arange(start, min(start + step, count), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
        out[start : start + step] = (x >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    return out


def tensor(name, shape):
    """Norms are about 1, biases about 0, and the others keep the size of what goes through them."""
    values = numbers(name, int(np.prod(shape, dtype=np.int64)))
    if len(shape) < 2:
        values *= np.float32(0.2)
        if name.endswith((".weight", "running_var")):
            values += np.float32(1.0)
    else:
        values *= np.float32(4.0 / np.sqrt(np.prod(shape[1:], dtype=np.float64)))
    return torch.from_numpy(values.reshape(shape))


def fill(model):
    """Fills every parameter and running statistic of a model; returns their shapes by name."""
    shapes = {}
    with torch.no_grad():
        for name, target in [*model.named_parameters(), *model.named_buffers()]:
            if target.dtype == torch.float32 and not name.endswith("attn_mask"):
                target.copy_(tensor(name, tuple(target.shape)))
                shapes[name] = list(target.shape)
    model.eval()
    return shapes


def images(count, side):
    """Normalised pixels `(count, 3, side, side)`."""
    return torch.from_numpy(numbers("pixels", count * 3 * side * side).reshape(count, 3, side, side) * np.float32(4.0))


def sample(states, count=256):
    """Numbers of a large tensor at even distances, with its largest magnitude, which tolerances are relative to."""
    flat = states.detach().flatten().float()
    step = max(flat.numel() // count, 1)
    return torch.cat([flat.abs().max().reshape(1), flat[::step][:count]])
