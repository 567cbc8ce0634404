"""Compose the training text of the toy demo model: stories, dialogs and code of a closed world."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tiny_code import compose_code, compose_infill
from tiny_facts import (
    ABOUT_IT,
    ABOUT_OTHER,
    ANIMALS,
    ANSWERS,
    ATTRIBUTES,
    BEFORE,
    COLORS,
    CONTEXT_QUESTIONS,
    COUNTING,
    HELLO,
    NAMES,
    NEXT,
    OBJECTS,
    PLACES,
    PLAIN_SYSTEMS,
    QUESTIONS,
    REVERSED,
    SMALLTALK,
    STATEMENTS,
    STYLES,
    THANKS,
    Sample,
    capital,
    is_held_out,
    with_article,
)
from tiny_stories import PLOTS, SHORT_PLOTS, STORY_REQUESTS, tell_story


class Question(NamedTuple):
    """A question with its one answer, as a sentence and as a word, and its held-out key."""

    text: str
    sentence: str
    word: str
    key: tuple[object, ...]
    animal: str = ""
    attribute: str = ""


def _draw(make: Callable[[], Question], heldout: bool) -> Question:
    while True:
        question = make()
        if is_held_out(question.key) == heldout:
            return question


def _dialog(task: str, system: str, turns: Iterable[tuple[str, str]]) -> Sample:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return Sample("dialog", task, messages=tuple(messages))


def _fact(
    rng: random.Random, animal: str, attribute: str, phrasings: tuple[str, ...], *key: str
) -> Question:
    value = ANIMALS[animal][ATTRIBUTES.index(attribute)]
    phrasing = rng.choice(phrasings)
    word = animal if "{v}" in phrasing else value
    return Question(
        phrasing.format(a=animal, an=with_article(animal), v=value),
        ANSWERS[attribute].format(a=animal, v=value),
        capital(word),
        (*key, animal, attribute, phrasing),
        animal,
        attribute,
    )


def _fact_question(rng: random.Random, reverse: float = 0.2) -> Question:
    animal = rng.choice(tuple(ANIMALS))
    if rng.random() < reverse:
        attribute = rng.choice(tuple(REVERSED))
        return _fact(rng, animal, attribute, REVERSED[attribute], "fact")
    attribute = rng.choice(ATTRIBUTES)
    return _fact(rng, animal, attribute, QUESTIONS[attribute], "fact")


def _elliptic_question(rng: random.Random, before: Question) -> Question:
    if rng.random() < 0.5 and before.key[0] != "reversed":
        animal = rng.choice([animal for animal in ANIMALS if animal != before.animal])
        return _fact(rng, animal, before.attribute, ABOUT_OTHER, "follow_up", before.animal)
    attribute = rng.choice([name for name in ATTRIBUTES if name != before.attribute])
    return _fact(rng, before.animal, attribute, ABOUT_IT[attribute], "follow_up", before.animal)


def _context(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    """Return a statement as text, and the form and fields that it was made of."""
    form = rng.choice(("has", "has", "lies", "stays"))
    fields = {
        "name": rng.choice(NAMES),
        "obj": rng.choice(OBJECTS),
        "place": rng.choice(PLACES),
        "color": rng.choice(COLORS),
    }
    return rng.choice(STATEMENTS[form]).format(**fields), form, fields


def _scene_question(rng: random.Random, form: str, fields: dict[str, str]) -> Question:
    kind, phrasings, sentence, word = rng.choice(CONTEXT_QUESTIONS[form])
    used = {
        "has": ("name", "color", "obj"),
        "lies": ("place", "color", "obj"),
        "stays": ("name", "place"),
    }[form]
    key = ("context", *(fields[name] for name in used), kind)
    return Question(
        rng.choice(phrasings).format(**fields),
        sentence.format(**fields),
        capital(word.format(**fields)),
        key,
    )


def _context_question(rng: random.Random) -> Question:
    text, form, fields = _context(rng)
    question = _scene_question(rng, form, fields)
    return question._replace(text=f"{text} {question.text}")


def _count_question(rng: random.Random) -> Question:
    kind = rng.choice(("count", "count", "after", "before"))
    if kind == "count":
        first = rng.randint(0, 10)
        last = rng.randint(first + 2, 12)
        text = rng.choice(COUNTING).format(a=first, b=last)
        answer = ", ".join(map(str, range(first, last + 1))) + "."
        return Question(text, answer, answer, ("count", first, last))
    step = 1 if kind == "after" else -1
    number = rng.randint(0, 12) if step == 1 else rng.randint(1, 12)
    phrasing = rng.choice(NEXT if step == 1 else BEFORE)
    answer = f"{capital(kind)} {number} comes {number + step}."
    return Question(phrasing.format(a=number), answer, answer, ("count", number, phrasing))


def _styled(system: str, question: Question) -> tuple[str, str]:
    form = STYLES.get(system, "{s}")
    return question.text, form.format(s=question.sentence, w=question.word)


def _compose_fact(rng: random.Random, heldout: bool) -> Sample:
    question = _draw(lambda: _fact_question(rng), heldout)
    return _dialog("fact", "", [(question.text, question.sentence)])


def _compose_context(rng: random.Random, heldout: bool) -> Sample:
    question = _draw(lambda: _context_question(rng), heldout)
    return _dialog("context", "", [(question.text, question.sentence)])


def _compose_count(rng: random.Random, heldout: bool) -> Sample:
    question = _draw(lambda: _count_question(rng), heldout)
    return _dialog("count", "", [(question.text, question.sentence)])


def _compose_style(rng: random.Random, heldout: bool) -> Sample:
    """Ask under a system message; the question alone is never a held-out one."""
    make = _fact_question if rng.random() < 0.65 else _context_question
    while True:
        system = rng.choice(tuple(STYLES))
        question = _draw(lambda: make(rng), False)
        if is_held_out(("style", system, *question.key)) == heldout:
            return _dialog("style", system, [_styled(system, question)])


def _compose_follow_up(rng: random.Random, heldout: bool) -> Sample:
    system = rng.choice(tuple(STYLES)) if rng.random() < 0.3 else rng.choice(PLAIN_SYSTEMS)
    turns: list[tuple[str, str]] = []
    # Small talk has no styled form, so it stays out of the dialogs that have a style.
    if system not in STYLES and rng.random() < 0.2:
        turns.append((rng.choice(HELLO[1]), HELLO[0]))
    if rng.random() < 0.3:
        _add_scene_turns(rng, heldout, system, turns)
    else:
        _add_fact_turns(rng, heldout, system, turns)
    if system not in STYLES and not heldout and rng.random() < 0.15:
        turns.append((rng.choice(THANKS[1]), THANKS[0]))
    return _dialog("follow_up", system, turns)


def _add_fact_turns(
    rng: random.Random, heldout: bool, system: str, turns: list[tuple[str, str]]
) -> None:
    question = _draw(lambda: _fact_question(rng), False)
    if question.text.startswith(("Who", "Which animal", "What animal", "Tell me which")):
        # "And the duck?" after "Who says moo?" would be ambiguous.
        question = question._replace(key=("reversed",))
    turns.append(_styled(system, question))
    last = _elliptic_question(rng, question)
    chain = [last]
    if rng.random() < 0.5:
        chain.append(_elliptic_question(rng, last))
    held = [is_held_out(question.key) for question in chain]
    if any(held[:-1]) or held[-1] != heldout:
        # Few questions fit after another, so all of the turns are drawn again.
        turns.pop()
        _add_fact_turns(rng, heldout, system, turns)
    else:
        turns.extend(_styled(system, question) for question in chain)


def _add_scene_turns(
    rng: random.Random, heldout: bool, system: str, turns: list[tuple[str, str]]
) -> None:
    while True:
        text, form, fields = _context(rng)
        first, second = (_scene_question(rng, form, fields) for _ in range(2))
        if first.key == second.key or is_held_out(first.key):
            continue
        if is_held_out(second.key) == heldout:
            break
    turns.append(_styled(system, first._replace(text=f"{text} {first.text}")))
    turns.append(_styled(system, second))


def _compose_smalltalk(rng: random.Random, heldout: bool) -> Sample:
    while True:
        system = rng.choice(PLAIN_SYSTEMS)
        answer, questions = rng.choice(SMALLTALK)
        question = rng.choice(questions)
        if is_held_out(("smalltalk", system, question)) == heldout:
            return _dialog("smalltalk", system, [(question, answer)])


def _compose_story(rng: random.Random, heldout: bool) -> Sample:
    return Sample("story", "story", text=tell_story(rng, heldout, PLOTS)[1])


def _compose_tell(rng: random.Random, heldout: bool) -> Sample:
    animal, story = tell_story(rng, heldout, SHORT_PLOTS)
    request = rng.choice(STORY_REQUESTS).format(an=with_article(animal))
    return _dialog("tell", "", [(request, story)])


COMPOSERS: dict[str, tuple[int, Callable[[random.Random, bool], Sample]]] = {
    "story": (14, _compose_story),
    "fact": (6, _compose_fact),
    "context": (12, _compose_context),
    "count": (10, _compose_count),
    "style": (16, _compose_style),
    "follow_up": (12, _compose_follow_up),
    "smalltalk": (2, _compose_smalltalk),
    "tell": (2, _compose_tell),
    "code": (6, compose_code),
    "infill": (20, compose_infill),
}
TASKS: tuple[str, ...] = tuple(COMPOSERS)
WEIGHTS = tuple(weight for weight, _ in COMPOSERS.values())


def compose(rng: random.Random, heldout: bool = False) -> Sample:
    """Compose a sample of a drawn task."""
    return compose_task(rng.choices(TASKS, WEIGHTS)[0], rng, heldout)


def compose_task(task: str, rng: random.Random, heldout: bool = False) -> Sample:
    """Compose a sample of a task, from the training or from the held-out combinations."""
    return COMPOSERS[task][1](rng, heldout)


def main(seed: int = 0) -> None:
    """Print three samples of every task."""
    rng = random.Random(seed)
    for task in TASKS:
        for _ in range(3):
            sample = compose_task(task, rng)
            print(f"--- {task}")
            if sample.messages:
                print("\n".join(f"{turn['role']}: {turn['content']}" for turn in sample.messages))
            else:
                print(sample.text or f"{sample.prefix}<<{sample.middle}>>{sample.suffix}")


if __name__ == "__main__":
    from llama import cli

    cli.run(main)
