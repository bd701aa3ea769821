"""The small language that the bundled in-context learner reads.

A *sentence* is five English words: four from one topic and one distractor from another. An *example* is a sentence with a
label word after it; an *episode* fixes a few topics and a label word for each. In a **natural** episode every topic carries
its own name, so the label can be known without any demonstration. In a **remapped** episode the label words are drawn at
random, so only the demonstrations can say which is which. That contrast is what makes the model a fair test bed: its
zero-shot and in-context behaviour differ for a known reason.

Nothing here touches a model. The same seed gives the same episode on every machine.

>>> rng = random.Random("readme")
>>> task = draw_assignment(rng, n_classes=2, mapping="natural")
>>> [topic == label for topic, label in zip(task.topics, task.label_words)]
[True, True]
>>> len(draw_sentence(rng, task.topics[0]).split())
5
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from iclgd_lens.draws import pick, shuffled

Labelling = Literal["natural", "remapped"]
"""How topics get their label words: their own names, or words drawn at random."""

TEMPLATE = "Words: {text} Label:"
"""How a sentence is put to the model; the label word follows with a leading space."""

SEPARATOR = " ;"
"""What stands between two demonstrations in a prompt."""

BOS, UNKNOWN = "<bos>", "<unk>"

SENTENCE_LENGTH = 5

_WORDS = {
    "animals": """
        lion tiger wolf bear horse rabbit fox deer goat sheep camel monkey elephant zebra giraffe otter
    """,
    "food": """
        bread cheese butter soup rice pasta pizza salad sausage pancake omelette honey yogurt noodle biscuit steak
    """,
    "clothing": """
        shirt trousers jacket scarf glove sock hat coat skirt dress belt sweater boot sandal mitten vest
    """,
    "weather": """
        rain snow thunder lightning fog hail breeze storm drizzle frost sunshine cloud blizzard mist gale sleet
    """,
    "music": """
        violin piano guitar trumpet drum flute cello harp melody rhythm chord tuba clarinet banjo opera choir
    """,
    "sports": """
        tennis hockey rugby cricket golf boxing sprint marathon goalkeeper referee stadium racket medal archery
        fencing rowing
    """,
    "tools": """
        hammer wrench screwdriver chisel saw drill pliers ladder shovel rake axe anvil crowbar mallet sandpaper
        toolbox
    """,
    "travel": """
        airport passport suitcase ticket hotel luggage train ferry map tourist journey visa cruise taxi highway
        station
    """,
    "body": """
        shoulder elbow knee ankle wrist finger thumb forehead chin cheek eyebrow tongue stomach rib spine lung
    """,
    "family": """
        mother father sister brother aunt uncle cousin nephew niece grandmother grandfather daughter son husband wife
        twin
    """,
    "furniture": """
        table chair sofa desk wardrobe shelf cupboard bench stool mattress drawer armchair bookcase cabinet lamp crib
    """,
    "ocean": """
        whale shark coral reef tide wave dolphin octopus jellyfish seaweed lobster squid anchor harbour lagoon
        starfish
    """,
    "space": """
        planet comet asteroid galaxy orbit rocket astronaut telescope satellite nebula meteor crater eclipse moon
        jupiter saturn
    """,
    "jobs": """
        plumber lawyer dentist farmer baker carpenter nurse pilot tailor butcher electrician librarian barber surgeon
        waiter janitor
    """,
    "school": """
        teacher pupil homework classroom pencil notebook eraser exam lesson textbook ruler blackboard diploma essay
        grade campus
    """,
    "money": """
        bank coin loan salary tax budget invoice mortgage wallet cheque interest debt savings dividend pension
        currency
    """,
}

TOPIC_WORDS: dict[str, tuple[str, ...]] = {topic: tuple(words.split()) for topic, words in _WORDS.items()}
"""The topics, each with its own words; no word belongs to two topics."""

NEUTRAL_LABELS: tuple[str, ...] = ("alpha", "beta", "gamma", "delta", "sigma", "omega", "kappa", "theta")
"""Label words that name no topic; with the topic names they are the pool for remapped episodes."""

LABEL_POOL: tuple[str, ...] = (*TOPIC_WORDS, *NEUTRAL_LABELS)


def vocabulary() -> list[str]:
    """Every token of the language, in the order of their ids: specials, template words, label words, topic words."""
    return [
        UNKNOWN,
        BOS,
        *TEMPLATE.format(text="").split(),
        SEPARATOR.strip(),
        *LABEL_POOL,
        *(word for words in TOPIC_WORDS.values() for word in words),
    ]


@dataclass(frozen=True)
class Assignment:
    """Which topics an episode is about, and the label word that stands for each.

    Attributes:
        topics: Topic names, one per class.
        label_words: The word that labels each class, in the same order.
    """

    topics: tuple[str, ...]
    label_words: tuple[str, ...]


def require_n_classes(n_classes: int) -> None:
    """Check that an episode can have so many topics.

    Raises:
        ValueError: If `n_classes` is not between 2 and the number of topics.
    """
    if not 2 <= n_classes <= len(TOPIC_WORDS):
        raise ValueError(f"n_classes must be between 2 and {len(TOPIC_WORDS)}, got {n_classes}")


def draw_assignment(rng: random.Random, *, n_classes: int, mapping: Labelling) -> Assignment:
    """Draw the topics of an episode and their label words.

    Args:
        rng: The source of randomness.
        n_classes: How many topics, 2 to 16.
        mapping: `"natural"`: each topic is labelled by its own name. `"remapped"`: by a word drawn from all label words
            without replacement, so now and then a topic keeps its own name, as chance has it.

    Raises:
        ValueError: If `n_classes` is not between 2 and the number of topics.
    """
    require_n_classes(n_classes)
    topics = tuple(shuffled(rng, list(TOPIC_WORDS))[:n_classes])
    labels = topics if mapping == "natural" else tuple(shuffled(rng, LABEL_POOL)[:n_classes])
    return Assignment(topics, labels)


def draw_sentence(rng: random.Random, topic: str) -> str:
    """Draw four words of a topic and one distractor of another topic, in random order."""
    own = shuffled(rng, TOPIC_WORDS[topic])[: SENTENCE_LENGTH - 1]
    distractor = pick(rng, TOPIC_WORDS[pick(rng, [other for other in TOPIC_WORDS if other != topic])])
    return " ".join(shuffled(rng, [*own, distractor]))
