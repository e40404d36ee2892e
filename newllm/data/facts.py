"""Facts that can be told in two directions: of made-up people, and the capitals of countries.

Every sentence ends with the entity that is asked for, and begins with a space: a name at the very beginning of a text would be
other tokens than the same name inside it, and an answer in the other direction tokens that never were one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


@dataclass(frozen=True)
class Relation:
    """What joins a subject and an object, in words.

    Attributes:
        forward: sentences that end with the object.
        backward: sentences that end with the subject, as many.
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]


RELATIONS = {
    "author": Relation(
        ("{subject} wrote {object}", "{subject} is the author of {object}", "The book by {subject} is called {object}"),
        (
            "{object} was written by {subject}",
            "{object} is a book by {subject}",
            "The author of {object} is called {subject}",
        ),
    ),
    "capital": Relation(
        (
            "The capital of {subject} is {object}",
            "{subject} has its capital in {object}",
            "The government of {subject} sits in {object}",
        ),
        (
            "{object} is the capital of {subject}",
            "The country with its capital in {object} is {subject}",
            "The government in {object} is that of {subject}",
        ),
    ),
    "founder": Relation(
        (
            "{subject} founded {object}",
            "{subject} is the founder of {object}",
            "The company of {subject} is called {object}",
        ),
        (
            "{object} was founded by {subject}",
            "{object} is a company of {subject}",
            "The founder of {object} is called {subject}",
        ),
    ),
    "teacher": Relation(
        (
            "{subject} taught {object}",
            "{subject} is the teacher of {object}",
            "The pupil of {subject} is called {object}",
        ),
        (
            "{object} was taught by {subject}",
            "{object} is a pupil of {subject}",
            "The teacher of {object} is called {subject}",
        ),
    ),
}
REAL = "capital"  # the relation whose facts are true; those of all others are made up


@dataclass(frozen=True)
class Fact:
    """A subject and an object that belong together and to no other of their kind.

    Attributes:
        relation: name in RELATIONS.
        subject: name of the subject.
        object: name of the object.
        left_out: number of the template in which neither direction is ever trained.
        both_ways: trained in both directions; otherwise forward only.
    """

    relation: str
    subject: str
    object: str
    left_out: int
    both_ways: bool

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions in which the fact is trained."""
        return DIRECTIONS if self.both_ways else ("forward",)

    def answer(self, direction: Direction) -> str:
        """Return the entity with which the sentences of a direction end."""
        return self.object if direction == "forward" else self.subject

    def trained(self, direction: Direction) -> list[str]:
        """Return the sentences of a direction for training: all templates but the one left out."""
        return [
            self._sentence(text) for number, text in enumerate(self._templates(direction)) if number != self.left_out
        ]

    def reversed(self, direction: Direction) -> list[str]:
        """Return the same sentences with their words from the last to the first, entities whole.

        Source: reverse training (Golovneva et al., 2024), section 2.1, entity-preserving reversal.
        """
        templates = [text for number, text in enumerate(self._templates(direction)) if number != self.left_out]
        return [self._sentence(" ".join(reversed(text.split()))) for text in templates]

    def asked(self, direction: Direction) -> str:
        """Return a sentence of a direction whose last entity is asked for; one of training where the direction was trained."""
        templates = self._templates(direction)
        return self._sentence(templates[(self.left_out + 1) % len(templates)])

    def reworded(self, direction: Direction) -> str:
        """Return the sentence of a direction in the template that was left out."""
        return self._sentence(self._templates(direction)[self.left_out])

    def _templates(self, direction: Direction) -> tuple[str, ...]:
        relation = RELATIONS[self.relation]
        return relation.forward if direction == "forward" else relation.backward

    def _sentence(self, template: str) -> str:
        return " " + template.format(subject=self.subject, object=self.object)


def draw_facts(relations: Sequence[str], *, num_people: int, seen_both_ways: float, seed: int) -> list[Fact]:
    """Return the facts of some relations, for each those trained in both directions first.

    No word of a made-up name in a fact trained both ways occurs in a fact trained forward only.

    Args:
        relations: names in RELATIONS.
        num_people: subjects of each made-up relation, the same people in all of them.
        seen_both_ways: share of each relation's facts trained in both directions.
        seed: of the names and of the choice.
    Raises:
        ValueError: the share leaves a single fact on one side: nothing would be there to confuse its answer with.
    """
    generator = np.random.default_rng(seed)
    made_up = [relation for relation in relations if relation != REAL]
    pairs: dict[str, list[tuple[str, str]]] = {REAL: capitals()} if REAL in relations else {}
    for found in pairs.values():
        generator.shuffle(found)
    num_both = {relation: round(seen_both_ways * len(found)) for relation, found in pairs.items()}
    if made_up:
        both = round(seen_both_ways * num_people)
        pairs |= {relation: [] for relation in made_up}
        words = _words(generator)
        for size in (both, num_people - both):
            subjects = _names(words, size)
            for relation in made_up:
                pairs[relation] += zip(subjects, _shuffled(generator, _names(words, size)), strict=True)
        num_both |= dict.fromkeys(made_up, both)
    _check_sides(seen_both_ways, {relation: (num_both[relation], len(found)) for relation, found in pairs.items()})
    return [
        Fact(relation, subject, object_, number % len(RELATIONS[relation].forward), number < num_both[relation])
        for relation in relations
        for number, (subject, object_) in enumerate(pairs[relation])
    ]


def capitals() -> list[tuple[str, str]]:
    """Return countries and their capitals, by name; pairs that one of the two names does not decide are left out.

    Left out are capitals and countries named twice, and names that are a part of another one's: "Guinea", "Panama City".
    """
    from countryinfo import all_countries

    named = {country.name(): country.capital() for country in all_countries()}
    pairs = sorted((country, capital) for country, capital in named.items() if _is_name(capital))
    names = Counter(name for pair in pairs for name in pair)
    padded = {name: f" {name} " for name in names}

    def is_clear(name: str) -> bool:
        return names[name] == 1 and not any(
            padded[name] in other or other in padded[name] for other in padded.values() if other != padded[name]
        )

    return [pair for pair in pairs if all(is_clear(name) for name in pair)]


def _is_name(capital: object) -> TypeGuard[str]:
    return isinstance(capital, str) and bool(capital.strip())


def _words(generator: np.random.Generator) -> Iterator[str]:
    """Yield made-up words, each once, in random order."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    words = [(first + second).capitalize() for first in syllables for second in syllables]
    return iter(_shuffled(generator, words))


def _names(words: Iterator[str], count: int) -> list[str]:
    """Return different names of two words; each word is shared by about two of them, so that neither tells the name."""
    size = max(2, -(-count // 2))
    first, last = ([next(words) for _ in range(size)] for _ in range(2))
    return [f"{first[number // 2]} {last[number % size]}" for number in range(count)]


def _shuffled(generator: np.random.Generator, items: list[str]) -> list[str]:
    return [items[place] for place in generator.permutation(len(items))]


def _check_sides(share: float, counts: dict[str, tuple[int, int]]) -> None:
    for relation, (both, total) in counts.items():
        if 1 in (both, total - both):
            raise ValueError(
                f"data.seen_both_ways={share}: leaves one of the {total} facts of data.relations={relation} alone on its side. "
                "Allowed: none or at least two on each side. Change the share or raise data.num_people."
            )
