"""BLIP's pre-training (`models/blip_pretrain.py`) written anew on the layers of transformers: what the Rust trainer is held against, and
raced with by the bench; and CLIP's on OpenCLIP. Run as a part of `make_goldens.py`, it writes three steps of small models into `training/`."""

import copy
from pathlib import Path

import open_clip
import torch
import weights
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

HERE = Path(__file__).parent
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
PAD, CLS, SEP, DEC, ENC = 0, 2, 3, 5, 6
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


class MedPretraining(nn.Module):
    """A MED with its three losses. Text encoder and decoder share all but self-attention."""

    def __init__(self, config, momentum, queue):
        super().__init__()
        text, vision, width = config.text_config, config.vision_config, config.image_text_hidden_size
        text.encoder_hidden_size = vision.hidden_size
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text)
        bert = self.text_decoder.bert
        bert.embeddings = self.text_encoder.embeddings
        for ours, theirs in zip(bert.encoder.layer, self.text_encoder.encoder.layer):
            for name, part in theirs.named_children():
                if name != "attention":
                    setattr(ours, name, part)
        head = self.text_decoder.cls.predictions
        head.decoder.weight = self.text_encoder.embeddings.word_embeddings.weight
        head.decoder.bias = head.bias
        self.vision_proj = nn.Linear(vision.hidden_size, width)
        self.text_proj = nn.Linear(text.hidden_size, width)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.momentum, self.queue, self.width, self.slow = momentum, queue, width, None

    def start(self, image_queue, text_queue):
        """After the weights are there: the slow encoders and the queues."""
        parts = nn.ModuleList([self.vision_model, self.vision_proj, self.text_encoder, self.text_proj])
        self.__dict__["slow"] = copy.deepcopy(parts).requires_grad_(False)
        self.__dict__["fast"] = parts
        self.image_queue, self.text_queue, self.next = image_queue, text_queue, 0

    def encode(self, ids, mask, images=None):
        return self.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=images, is_decoder=False
        ).last_hidden_state[:, 0]

    def forward(self, pixels, ids, mask, alpha, smoothing=0.1):
        size = len(pixels)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters()):
                slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)
        states = self.vision_model(pixels).last_hidden_state
        first = lambda token: torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)
        unit = lambda rows: F.normalize(rows, dim=-1)
        image = unit(self.vision_proj(states[:, 0]))
        text = unit(self.text_proj(self.encode(first(CLS), mask)))
        with torch.no_grad():
            vision, vision_proj, encoder, text_proj = self.slow
            slow_image = unit(vision_proj(vision(pixels).last_hidden_state[:, 0]))
            slow_states = encoder(input_ids=first(CLS), attention_mask=mask, is_decoder=False).last_hidden_state
            slow_text = unit(text_proj(slow_states[:, 0]))
            images, texts = torch.cat([slow_image, self.image_queue]), torch.cat([slow_text, self.text_queue])
            truth = torch.zeros(size, len(images)).fill_diagonal_(1)
            target = lambda rows: alpha * F.softmax(rows / self.temperature, dim=1) + (1 - alpha) * truth
            for_images, for_texts = target(slow_image @ texts.T), target(slow_text @ images.T)
        by_image, by_text = image @ texts.T / self.temperature, text @ images.T / self.temperature
        cross = lambda scores, targets: -(F.log_softmax(scores, dim=1) * targets).sum(1).mean()
        itc = (cross(by_image, for_images) + cross(by_text, for_texts)) / 2
        if self.queue:
            places = (self.next + torch.arange(size)) % self.queue
            self.image_queue[places], self.text_queue[places] = slow_image, slow_text
            self.next = (self.next + size) % self.queue

        with torch.no_grad():
            draw = lambda scores: torch.multinomial(
                (F.softmax(scores[:, :size], dim=1) + 1e-4).fill_diagonal_(0), 1
            ).squeeze(1)
            wrong_text, wrong_image = draw(by_image), draw(by_text)
        own = torch.arange(size)
        of_images, of_texts = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])
        logits = self.itm_head(self.encode(first(ENC)[of_texts], mask[of_texts], states[of_images]))
        labels = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long()
        itm = F.cross_entropy(logits, labels)

        # The logits of all but the last place.
        logits = self.text_decoder(
            input_ids=first(DEC), attention_mask=mask, encoder_hidden_states=states, return_logits=True
        )
        following = ids.masked_fill(mask == 0, -100)[:, 1:]
        lm = F.cross_entropy(logits.flatten(0, 1), following.flatten(), label_smoothing=smoothing)
        return itc, itm, lm


def optimizer(model, rate, decay):
    """AdamW without decay of vectors, as the Rust trainer has it."""
    parameters = [p for p in model.parameters()]
    groups = [
        dict(params=[p for p in parameters if p.dim() > 1], weight_decay=decay),
        dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8)


def step(model, steps, batch, alpha, clip=1.0):
    """One update; the losses before it and the norm of the gradients before they were clipped."""
    losses = model(*batch, alpha)
    steps.zero_grad(set_to_none=True)
    sum(losses).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    steps.step()
    with torch.no_grad():
        model.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
    return [*(loss.item() for loss in losses), norm.item()]


def tokenizer(words):
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made.add_special_tokens(SPECIAL)
    return made


def normal(images):
    """Images `(n, side, side, 3)` of 0 to 255, cut to whole numbers, as models take them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.from_numpy(images).floor() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


TEXTS = [["a red bird", "two green boats on a lake"], ["a boat", "a red lake and two birds"], ["green green", "the bird"]]


def med():
    """Three steps on two pairs each: with two, the hard negatives are no draw, but always the other pair."""
    torch.manual_seed(0)
    words = sorted({word for batch in TEXTS for text in batch for word in text.split()})
    made = tokenizer(words)
    config = BlipConfig(
        vision_config=dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
        ),
        text_config=dict(
            vocab_size=len(SPECIAL) + len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=40, bos_token_id=DEC, pad_token_id=PAD, sep_token_id=SEP,
            eos_token_id=SEP, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
        ),
        image_text_hidden_size=24,
    )
    model = MedPretraining(config, momentum=0.9, queue=5)
    weights.fill(model)
    with torch.no_grad():
        model.temperature.fill_(0.07)
    unit = lambda name: F.normalize(torch.from_numpy(weights.numbers(name, 5 * 24)).reshape(5, 24), dim=1)
    model.start(unit("image queue"), unit("text queue"))
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = optimizer(model, rate=1e-3, decay=0.05)
    golden = {"image_queue": model.image_queue.clone(), "text_queue": model.text_queue.clone()}
    reports = []
    for number, texts in enumerate(TEXTS):
        made.enable_padding(pad_id=PAD, pad_token="[PAD]")
        rows = made.encode_batch(texts)
        ids, mask = (torch.tensor([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask"))
        pixels = normal(((weights.numbers(f"pixels {number}", 2 * 32 * 32 * 3) + 0.5) * 256).reshape(2, 32, 32, 3))
        reports.append(step(model, steps, (pixels, ids, mask), alpha=0.4 * min(1, number / 2)))
        print("training", len(ids[0]), reports[-1])
    named = dict(model.named_parameters())
    # What three steps changed.
    moved = lambda now, before: weights.sample(now.detach() - before, count=64)
    golden |= {f"weights/{name}": moved(parameter, first[name]) for name, parameter in named.items()}
    prefixes = ["vision_model.", "vision_proj.", "text_encoder.", "text_proj."]
    for prefix, part in zip(prefixes, model.slow):
        used = {name: value for name, value in part.named_parameters() if "crossattention" not in name}
        golden |= {f"momentum/{prefix}{name}": moved(value, first[prefix + name]) for name, value in used.items()}
    golden |= {"image_queue_after": model.image_queue, "text_queue_after": model.text_queue}
    golden["reports"] = torch.tensor(reports)
    made.no_padding()
    save("med", made, golden)


def letters(alphabet):
    """A tokenizer by CLIP's rules that knows single letters."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(letter + "</w>" for letter in alphabet), *ends])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=ends[1], end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+"), "removed", invert=True)
    start, end = ((token, vocabulary[token]) for token in ends)
    made.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return made


def clip():
    """Three steps of a CLIP with a ResNet, by the layers of OpenCLIP: batch norms learn by the batch, and remember."""
    made = letters("abdegiklnorstw")
    size = made.get_vocab_size()
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=16, head_width=64),
        text_cfg=dict(context_length=24, vocab_size=size, width=32, heads=4, layers=2),
    )
    weights.fill(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    model.train()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    steps = optimizer(model, rate=1e-3, decay=0.05)
    reports = []
    for number, texts in enumerate([[*batch, "no lake", "is it a bird"] for batch in TEXTS]):
        ids = torch.full((4, 24), size - 1)
        for row, text in zip(ids, made.encode_batch(texts)):
            row[: len(text.ids)] = torch.tensor(text.ids)
        pixels = normal(((weights.numbers(f"pixels {number}", 4 * 64 * 64 * 3) + 0.5) * 256).reshape(4, 64, 64, 3))
        images, texts, scale = model(pixels, ids)
        scores, own = scale * images @ texts.T, torch.arange(4)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        steps.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        reports.append([loss.item(), norm.item()])
        print("training clip", reports[-1])
    moved = {name: weights.sample(now - first[name], count=64) for name, now in model.state_dict().items() if now.is_floating_point()}
    save("clip", made, {f"moved/{name}": values for name, values in moved.items()} | {"reports": torch.tensor(reports)})


def save(name, made, golden):
    target = HERE / "training" / name
    target.mkdir(exist_ok=True, parents=True)
    (target / "tokenizer.json").write_text(made.to_str(pretty=True) + "\n")
    save_file({name: value.contiguous() for name, value in golden.items()}, target / "golden.safetensors")


def main():
    med()
    clip()


if __name__ == "__main__":
    main()
