"""MED pre-training in PyTorch: the peer of the bench `training`.

    training_peer.py THREADS WIDTH BLOCKS HEADS SIDE VOCABULARY QUEUE STEPS LENGTH...

For every line that it reads it makes some steps on the same batch, of texts with these lengths in tokens, padded to the longest, and answers
with the pairs a second.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import BlipConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "goldens"))
import training

threads, width, blocks, heads, side, vocabulary, queue, steps, *lengths = map(int, sys.argv[1:])
batch = len(lengths)
torch.set_num_threads(threads)
torch.manual_seed(0)
config = BlipConfig(
    vision_config=dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=side,
        patch_size=8,
    ),
    text_config=dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks - 1,
        num_attention_heads=heads, max_position_embeddings=64, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    ),
    image_text_hidden_size=64,
)
model = training.MedPretraining(config, momentum=0.995, queue=queue)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.05)
model.train()
unit = lambda: torch.nn.functional.normalize(torch.randn(queue, 64), dim=1)
model.start(unit(), unit())
optimizer = training.optimizer(model, rate=1e-4, decay=0.05)
pixels = torch.randn(batch, 3, side, side)
mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
ids = torch.randint(7, vocabulary, mask.shape) * mask
for _ in sys.stdin:
    began = time.perf_counter()
    for _ in range(steps):
        training.step(model, optimizer, (pixels, ids, mask), alpha=0.4)
    print(steps * batch / (time.perf_counter() - began), flush=True)
