"""The small world's language: who is what, said as sentences and asked as questions.

Every entity has one value for each of four attributes. A fact can be said by five sentence forms and asked by two
question forms. For each fact, a seeded choice keeps one sentence form out of all training text, and a third of the
facts are never asked in training. Scored are: for `synthetic_sentences`, the kept-out form of a fact, to be completed;
for `synthetic_questions`, a question about a fact that was never asked. So what is scored follows from the
training text, which states every fact in other words, and stands nowhere in it: neither the scored question nor the
scored sentence, with any of its choices.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

ENTITIES = 32
CHOICES = 4
NEVER_ASKED = 1 / 3
SYLLABLES = ("ba", "do", "fi", "ka", "lu", "me", "no", "pi", "ra", "so", "tu", "ve", "wi", "zo", "ge", "ha")

VALUES = {
    "food": ["plums", "figs", "nuts", "beans", "corn", "rice", "eggs", "soup"],
    "place": ["oslo", "lima", "cairo", "paris", "delhi", "tokyo", "quito", "rome"],
    "trade": ["baker", "smith", "tailor", "farmer", "sailor", "painter", "miller", "weaver"],
    "pet": ["cat", "dog", "goat", "hen", "duck", "horse", "mouse", "parrot"],
}
SENTENCES = {
    "food": ("{e} likes to eat", "for dinner {e} has", "the best meal for {e} is", "{e} always buys", "{e} is fond of"),
    "place": ("{e} lives in", "the home of {e} is in", "{e} comes from", "{e} was born in", "you can find {e} in"),
    "trade": ("{e} works as a", "the job of {e} is", "{e} was trained as a", "people call {e} the", "{e} is a good"),
    "pet": ("{e} keeps a", "the pet of {e} is a", "{e} takes care of a", "{e} plays with a", "{e} feeds the"),
}
QUESTIONS = {
    "food": ("what does {e} eat ?", "which food is for {e} ?"),
    "place": ("where does {e} live ?", "which city is the home of {e} ?"),
    "trade": ("what is the job of {e} ?", "as what does {e} work ?"),
    "pet": ("which pet does {e} have ?", "what animal does {e} keep ?"),
}


@dataclass
class World:
    """Sentences and (prompt, response) questions to train on, held-out sentences, and the suites' rows."""

    text: list[str] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    suites: dict[str, list[dict[str, object]]] = field(default_factory=dict)


def make(seed: int) -> World:
    """The world of a seed."""
    chance = random.Random(seed)
    names = [first + second for first in SYLLABLES for second in SYLLABLES if first != second]
    entities = chance.sample(names, ENTITIES)
    world = World(suites={"synthetic_questions": [], "synthetic_sentences": []})
    facts = [(entity, attribute, chance.choice(VALUES[attribute])) for entity in entities for attribute in VALUES]
    asked = set(chance.sample(range(len(facts)), round(len(facts) * (1 - NEVER_ASKED))))
    for number, (entity, attribute, value) in enumerate(facts):
        said = [form.format(e=entity) for form in SENTENCES[attribute]]
        kept_out = said.pop(chance.randrange(len(said)))
        world.text += [f"{sentence} {value} ." for sentence in said]
        world.heldout.append(f"{kept_out} {value} .")
        world.suites["synthetic_sentences"].append(_row(kept_out, attribute, value, chance))
        prompts = [_prompt(form.format(e=entity)) for form in QUESTIONS[attribute]]
        if number in asked:
            world.examples += [(prompt, f" {value}") for prompt in prompts]
        else:
            world.suites["synthetic_questions"] += [_row(prompt, attribute, value, chance) for prompt in prompts]
    for part in (world.text, world.examples, world.heldout, *world.suites.values()):
        chance.shuffle(part)
    return world


def write(world: World, folder: Path) -> None:
    """The world's data files: `{"text"}`, `{"prompt", "response"}` and suite rows, one JSON object a line."""
    (folder / "suites").mkdir(parents=True)
    _lines(folder / "text.jsonl", [{"text": text} for text in world.text])
    _lines(folder / "heldout.jsonl", [{"text": " ".join(world.heldout)}])
    _lines(folder / "examples.jsonl", [{"prompt": prompt, "response": response} for prompt, response in world.examples])
    for suite, rows in world.suites.items():
        _lines(folder / "suites" / f"{suite}.jsonl", rows)


def _prompt(question: str) -> str:
    return f"question : {question} answer :"


def _row(question: str, attribute: str, value: str, chance: random.Random) -> dict[str, object]:
    others = chance.sample([other for other in VALUES[attribute] if other != value], CHOICES - 1)
    choices = [value, *others]
    chance.shuffle(choices)
    return {"question": question, "choices": choices, "label": choices.index(value)}


def _lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
