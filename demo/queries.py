"""The query list, made the way CLIP's was: frequent words, pairs of words that stick together, titles."""

import collections
import math
import re

MIN_WORD = 3  # a word is a query when the packages' texts use it at least this often
MIN_BIGRAM = 3


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.lower())


def query_list(texts: list[str], titles: list[str]) -> list[str]:
    """Queries in order: frequent words, bigrams by pointwise mutual information, then titles; without repeats."""
    words, bigrams, total = collections.Counter(), collections.Counter(), 0
    for text in texts:
        tokens = words_of(text)
        words.update(tokens)
        bigrams.update(zip(tokens, tokens[1:]))
        total += len(tokens)
    frequent = sorted((w for w, n in words.items() if n >= MIN_WORD), key=lambda w: (-words[w], w))
    information = {
        pair: math.log2(n * total / (words[pair[0]] * words[pair[1]])) for pair, n in bigrams.items() if n >= MIN_BIGRAM and pair[0] != pair[1]
    }
    sticking = [" ".join(p) for p in sorted((p for p, bits in information.items() if bits >= 4.0), key=lambda p: (-information[p], p))]
    names = sorted({" ".join(words_of(t)) for t in titles if 1 <= len(words_of(t)) <= 5})
    return list(dict.fromkeys(q for q in (*frequent, *sticking, *names) if q))
