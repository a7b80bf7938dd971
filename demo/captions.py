"""Small English: a word or a name made a caption, a package's sentence made a caption, a caption's telling words."""

import re

UNCOUNTED = set(
    "bread rice cheese milk butter salt ice soap fire snow rain water honey bacon meat corn broccoli garlic ginger coffee tea jam sugar grass "
    "hair fog wind lightning clothing luggage money art food fruit sand spice pepper wheat asparagus celery lettuce spinach ham beef chicken_meat "
    "pasta spaghetti toast cereal chocolate juice wine beer jewelry furniture gold fur lava mud dew coal paint oil tape sushi tofu "
    "snowboarding rowing skiing surfing swimming fishing golf tennis football baseball basketball rugby cricket badminton hockey ice_skating "
    "boxing cycling running diving gymnastics archery judo karate volleyball christmas".split()
)
PLURAL = set("people men women children teeth feet mice geese twins hands scissors".split())
STOP = set("a an the of on in with and to at by for from is it its this that some two three view photo drawing picture background or as".split())


def head_noun(text: str) -> str:
    """The noun that a short noun phrase turns on: its last word before a preposition."""
    before = re.split(r"\b(?:with|of|in|on|and|for|at|to|by|from|called|resembles)\b|[(,:]", text.lower(), maxsplit=1)[0].split() or text.lower().split()
    return before[-1].strip(".,'\"") if before else ""


def phrase(name: str) -> str:
    """`name` with the article that it takes: 'elephant' → 'an elephant', 'books' → 'books', 'bread' → 'bread'."""
    name = " ".join(name.split())
    noun = head_noun(name)
    plural = noun in PLURAL or (noun.endswith("s") and not re.search(r"(ss|us|is|as|os)$", noun))
    if not name or plural or noun in UNCOUNTED or name.split()[0].lower() in ("a", "an", "the", "some"):
        return name
    vowel = re.match(r"(?i)[aeiou]|hour", name) and not re.match(r"(?i)(uni|eur|one\b|use|ute|uk)", name)
    return f"{'an' if vowel else 'a'} {name}"


def sentence_to_caption(sentence: str) -> str:
    """A stamp's first sentence as a caption, or '' where it is a remark rather than a description."""
    first = re.split(r"(?<=[.!?])\s", " ".join(sentence.split()))[0].rstrip(".")
    if not 1 <= len(first.split()) <= 12 or re.search(r"[!?“”\"<>=]|\b(is|are|means|must|you|your|stands|resembles|we|they)\b", first):
        return ""
    opener, _, rest = first.partition(" ")
    if opener in ("A", "An", "The", "Some", "Two", "Three", "This", "Half"):
        return f"{opener.lower()} {rest}" if opener != "This" else ""
    return first if rest else phrase(first[0].lower() + first[1:])


def telling_words(text: str) -> list[str]:
    """The words of a text that could tell one picture from another, in order, singular, without repeats."""
    out = []
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        if word not in STOP and len(word) > 1:
            word = word[:-1] if word.endswith("s") and not re.search(r"(ss|us|is|as|os)$", word) and len(word) > 3 else word
            if word not in out:
                out.append(word)
    return out
