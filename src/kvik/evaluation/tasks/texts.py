"""Words and sentences that the tasks' texts are made of; all drawn with a `random.Random`, so that a seed decides them."""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["ADJECTIVES", "NOUNS", "names", "sentences"]

ADJECTIVES = (
    "amber", "ancient", "autumn", "blue", "brave", "bright", "broken", "bronze", "calm", "careful", "clever", "coastal",
    "copper", "crimson", "curious", "dark", "distant", "dry", "eastern", "empty", "famous", "fast", "foreign", "frozen",
    "gentle", "giant", "golden", "grand", "green", "hidden", "hollow", "honest", "humble", "iron", "ivory", "jolly",
    "lonely", "lucky", "marble", "modern", "narrow", "noble", "northern", "old", "orange", "pale", "patient", "plain",
    "proud", "purple", "quiet", "rapid", "red", "royal", "rusty", "secret", "silent", "silver", "simple", "southern",
    "stone", "sunny", "tall", "western", "white", "wild", "winter", "wooden", "yellow", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "arrow", "badger", "barrel", "basket", "beacon", "bell", "bottle", "bridge", "bucket", "button",
    "cabin", "camel", "candle", "castle", "cloud", "compass", "cottage", "crown", "dragon", "drum", "eagle", "engine",
    "falcon", "feather", "forest", "fountain", "garden", "gate", "hammer", "harbor", "helmet", "island", "jacket", "kettle",
    "ladder", "lamp", "lantern", "lion", "market", "mirror", "mountain", "needle", "ocean", "orchard", "palace", "pencil",
    "pepper", "piano", "pillow", "planet", "rabbit", "ribbon", "river", "rocket", "saddle", "school", "shadow", "spoon",
    "table", "temple", "tiger", "tower", "train", "tunnel", "turtle", "valley", "violin", "wagon",
)  # fmt: skip

_PEOPLE = (
    "the baker", "a farmer", "the old captain", "my neighbour", "the teacher", "a young painter", "the doctor", "a traveller",
    "the gardener", "her uncle", "the librarian", "a fisherman", "the carpenter", "his sister", "the postman", "a student",
)  # fmt: skip
_ACTS = (
    "walked slowly along the road", "read a long letter", "repaired the fence", "listened to the rain", "cooked a pot of soup",
    "opened the window", "waited for the evening boat", "counted the sheep twice", "swept the floor", "told a story",
    "carried a heavy box up the stairs", "planted beans in straight rows", "drew a map of the coast", "fed the horses",
    "looked for a lost glove", "sat under the tree", "bought bread and cheese", "sang a song about the sea",
)  # fmt: skip
_TIMES = (
    "in the morning", "before the bells rang", "after lunch", "late in the evening", "on a cold day", "when the wind turned",
    "at the end of the week", "while the children slept", "just before dawn", "every second Sunday", "during the long summer",
)  # fmt: skip
_THINGS = (
    "the road was muddy", "the shop was closed", "the water was clear", "the lamps were lit", "the hills were covered with snow",
    "nobody was at home", "the grass had grown tall", "the kitchen smelled of onions", "the ferry was late", "the sky was grey",
    "the streets were full of people", "the clock had stopped", "the dog barked at the door", "the harvest was good",
)  # fmt: skip


def sentences(draw: random.Random) -> Iterator[str]:
    """Plain English without end, about everyday things, no numbers in it; each begins with a space."""
    while True:
        who, act, when, thing = (draw.choice(words) for words in (_PEOPLE, _ACTS, _TIMES, _THINGS))
        yield " " + draw.choice(
            (
                f"{_begun(who)} {act} {when}.",
                f"{_begun(when)} {who} {act}, and {thing}.",
                f"{_begun(thing)}, so {who} {act}.",
                f"{_begun(who)} {act} because {thing} {when}.",
                f"{_begun(when)} {thing}.",
            )
        )


def names(draw: random.Random) -> Iterator[str]:
    """Names of two words, no two the same, 4,900 in all; of the first 70 no two have a word in common."""
    adjectives = draw.sample(ADJECTIVES, len(ADJECTIVES))
    nouns = draw.sample(NOUNS, len(NOUNS))
    for turn in range(len(nouns)):
        for at, adjective in enumerate(adjectives):
            yield f"{adjective} {nouns[(at + turn) % len(nouns)]}"


def _begun(words: str) -> str:
    return words[0].upper() + words[1:]
