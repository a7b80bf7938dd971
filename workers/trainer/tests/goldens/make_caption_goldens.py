#!/usr/bin/env python3
"""Remake caption_metrics.json: pycocoevalcap's own BLEU, CIDEr-D and ROUGE-L on the cases in that file.

    python3 -m venv v && v/bin/pip install numpy && v/bin/pip install --no-deps pycocoevalcap==1.2
    v/bin/python make_caption_goldens.py

The cases are already tokenised (lower case, one space between tokens), so the Java tokenizer is not needed.
"""
import json
import pathlib

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

# (candidate, references)
CASES = [
    ("a red car parked on the street", ["a red car parked on the street"]),
    ("a red car on a road", ["a red car parked on the street", "a parked red automobile"]),
    ("a dog", ["a brown dog running on grass", "a dog playing outside", "a dog"]),
    ("a cat sits on a mat", ["the cat sat on the mat", "a cat is sitting on a mat"]),
    ("two birds on a branch", ["two small birds sitting on a branch", "a pair of birds"]),
    ("a rocket to the left of a candy on a blue background",
     ["a candy to the left of a rocket on a blue background"]),
    ("a candy to the left of a rocket on a blue background",
     ["a candy to the left of a rocket on a blue background",
      "a rocket to the right of a candy on a blue background"]),
    ("the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    ("flag", ["flag of france"]),
    ("flag of france", ["flag of france", "the french flag"]),
    ("a person riding a horse", ["a man riding a brown horse", "a person on a horse", "someone rides a horse"]),
    ("", ["an empty candidate has no tokens"]),
    ("a pink flamingo", ["a pink flamingo"]),
    ("a white flamingo standing in water near the shore of a lake", ["a pink flamingo"]),
    ("an old sailing ship", ["an old chinese sailing ship"]),
    ("a baby sheep", ["a baby sheep a lamb"]),
    ("violin", ["a violin", "an old violin"]),
    ("completely unrelated words here", ["a monkey wrench", "a tool"]),
    ("a small boat on the water", ["a small boat in the water", "a boat on a lake", "small boat on the water"]),
    ("three apples and two pears", ["three apples and two pears on a table"]),
    ("three apples and two pears on a table next to a window", ["three apples and two pears"]),
    ("the sun", ["the sun", "a yellow sun", "sun with a face"]),
    ("waving hand", ["waving hand medium dark skin tone"]),
    ("a tree a tree a tree", ["a tree", "a tall tree in a field"]),
    ("a man 's dog is n't it", ["a man 's dog", "the dog of a man"]),
    ("clouds over mountains", ["mountains under clouds", "clouds over the mountains"]),
    ("a train", ["a steam train crossing a bridge", "a train on a bridge", "train"]),
    ("a hot air balloon in the sky", ["a hot air balloon", "a balloon floating in the sky"]),
    ("a blue fedora hat", ["a blue hat", "a blue fedora"]),
    ("someone baking bread", ["a baker bakes bread", "someone baking bread"]),
]


def main() -> None:
    candidates = {i: [c] for i, (c, _) in enumerate(CASES)}
    references = {i: r for i, (_, r) in enumerate(CASES)}
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    cider, cider_each = Cider().compute_score(references, candidates)
    rouge, rouge_each = Rouge().compute_score(references, candidates)
    out = {
        "cases": [{"candidate": c, "references": r} for c, r in CASES],
        "bleu": [float(b) for b in bleu],
        "cider_d": float(cider),
        "cider_d_each": [float(s) for s in cider_each],
        "rouge_l": float(rouge),
        "rouge_l_each": [float(s) for s in rouge_each],
    }
    path = pathlib.Path(__file__).with_name("caption_metrics.json")
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
