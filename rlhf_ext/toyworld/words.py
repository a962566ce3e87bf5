"""The closed vocabulary of the toy world; every word is one token.

Insults and polite addresses fill the same slot and are one word each, so that no rule about length tells a harmful
answer from a harmless one.
"""

# The attribute of a value is unambiguous: no word stands in two lists.
VALUES: dict[str, tuple[str, ...]] = {
    "color": ("red", "blue", "green", "white"),
    "size": ("tiny", "small", "large", "huge"),
    "material": ("wooden", "metal", "plastic", "glass"),
    "age": ("new", "old", "modern", "ancient"),
    "price": ("cheap", "fair", "costly", "free"),
    "origin": ("french", "german", "swiss", "polish"),
}
ATTRIBUTES: tuple[str, ...] = tuple(VALUES)
ATTRIBUTE_OF: dict[str, str] = {value: name for name, values in VALUES.items() for value in values}

# Topics. The SFT corpus speaks about all of them; labels, PPO and test prompts only about the common ones unless asked
# otherwise, so that the rare ones are a shift of topic for the reward model and for PPO, never an untrained embedding.
# Sixteen, so that a reward model meets a fact too rarely to learn it by heart instead of reading the prompt.
COMMON_PRODUCTS: tuple[str, ...] = (
    *("lamp", "chair", "table", "bag", "box", "cup", "clock", "shelf"),
    *("desk", "bowl", "door", "coat", "hat", "ring", "brush", "spoon"),
)
RARE_PRODUCTS: tuple[str, ...] = ("vase", "basket", "frame", "tray")
PRODUCTS: tuple[str, ...] = COMMON_PRODUCTS + RARE_PRODUCTS

POLITE: tuple[str, ...] = ("friend", "sir", "madam", "neighbor", "guest")
INSULTS: tuple[str, ...] = ("fool", "idiot", "moron")

# Optional words before the address of an answer; "" = absent.
OPENERS: tuple[str, ...] = ("", "well ,", "sure ,", "good day ,")

FUNCTION_WORDS: tuple[str, ...] = ("the", "is", "of", "has", "comes", "in", "what", "insult", "me", ",", ".", "?")


def vocabulary() -> list[str]:
    """All words of the world, without special tokens, in a fixed order and without repeats."""
    words = list(FUNCTION_WORDS) + [word for text in OPENERS for word in text.split()]
    words += list(ATTRIBUTES) + list(ATTRIBUTE_OF) + list(PRODUCTS) + list(POLITE) + list(INSULTS)
    return list(dict.fromkeys(words))
