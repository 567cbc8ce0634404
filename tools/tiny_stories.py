"""Stories about the toy demo model's world."""

import random

from tiny_facts import (
    ANIMALS,
    COLORS,
    GIRLS,
    NAMES,
    OBJECTS,
    OUTDOORS,
    capital,
    is_held_out,
    with_article,
)

Slots = tuple[tuple[str, ...], ...]

WHO = (
    "Once upon a time, there was a little {kid} named {name}.",
    "There once was a {kid} named {name}.",
    "{name} was a happy little {kid}.",
    "{name} was a kind {kid} with a big smile.",
)
GO = tuple(
    f"{who} {go}"
    for who in WHO
    for go in (
        "One day, {he} went to the {place}.",
        "{He} loved to play in the {place}.",
        "Every morning, {he} walked to the {place}.",
    )
) + (
    "One sunny morning, {name} went to the {place}.",
    "On a warm day, {name} ran to the {place}.",
    "It was a sunny day, and {name} was in the {place}.",
    "Once upon a time, a {kid} named {name} went to the {place}.",
    "One day, a little {kid} named {name} was in the {place}.",
    "Early in the morning, {name} walked to the {place}.",
    "After school, {name} ran to the {place} to play.",
)
HAS = (
    "{He} had a {color} {obj}.",
    "{He} took {his} {color} {obj} along.",
    "In {his} bag was a {color} {obj}.",
    "{He} loved {his} {color} {obj} very much.",
)
MEET = (
    "There {he} met {an}.",
    "Soon {he} saw a {look} {animal}.",
    "A {look} {animal} came to {him}.",
)
SPEAK = (
    "The {animal} said {sound}.",
    'The {animal} said, "{Sound}!"',
    '"{Sound}!" said the {animal}.',
)
FACT = (
    "",
    "",
    "It was a {coat} {animal}, and it could {skill}.",
    "It lived in the {home} and liked to eat {food}.",
    "{name} knew that it liked {food}.",
)
END = (
    "They went home happy.",
    "From that day on, {name} and the {animal} were good friends.",
    "{name} smiled all the way home.",
    "That night, {he} slept very well.",
    "It was the best day of all.",
    "{name} and the {animal} played until the sun went down.",
)
PLOTS: dict[str, Slots] = {
    "lost": (
        GO,
        HAS,
        (
            "But soon the {obj} was gone.",
            "Then {he} could not find the {obj}.",
            "Oh no, the {obj} was lost!",
        ),
        (
            "{name} looked here and there, but {he} did not see it.",
            "{He} began to cry.",
            "{He} looked high and low.",
            "",
        ),
        MEET,
        SPEAK,
        (
            "It had found the {obj} in the grass.",
            "It showed {him} the {obj} under a bush.",
            "It came with the {color} {obj}.",
        ),
        ('"Thank you, {animal}!" said {name}.', "{name} gave it some {food} as a gift.", ""),
        END,
    ),
    "stuck": (
        GO,
        HAS,
        (
            "A strong wind came and took the {obj} up into a tree.",
            "{He} threw the {obj} up, and it got stuck in a tree.",
        ),
        (
            "{name} jumped and jumped, but the tree was too tall.",
            "{He} could not get it down, and {he} was sad.",
            "",
        ),
        ("{friend} came by with {an}.", "Then {friend} and {an} came to help."),
        ("",) + SPEAK,
        (
            "{friend} shook the tree, and the {obj} fell down.",
            "{friend} got the {obj} down with a long stick.",
        ),
        ('"You are a good friend," said {name}.', "{name} was so happy that {he} sang.", ""),
        END,
    ),
    "hungry": (
        GO,
        MEET,
        FACT,
        SPEAK,
        ("It was very hungry.", "It had no food, and it was weak."),
        ('"What do you want to eat?" asked {name}.', "{name} wanted to help.", ""),
        (
            "{He} put down {his} {color} {obj} and went to get some {food}.",
            "{He} put down {his} {color} {obj} and gave the {animal} some {food}.",
        ),
        ("The {animal} ate all of it.", "Soon the {animal} was strong and happy again.", ""),
        END,
    ),
    "far_home": (
        GO,
        MEET,
        SPEAK,
        ("It was lost and far from the {home}.", "It could not find the way back to the {home}."),
        ('"Do not cry," said {name}.', "{name} wanted to help it.", ""),
        (
            "{He} held up {his} {color} {obj} and showed the way.",
            "{He} gave it {his} {color} {obj}, so it felt safe.",
            HAS[2],
        ),
        (
            "They walked and walked until they came to the {home}.",
            "Step by step, they found the {home}.",
        ),
        ("At home, the {animal} had a lot of {food}.", "The {animal} was home.", ""),
        ("{name} smiled all the way back.", "From that day on, they were good friends."),
    ),
    "share": (
        GO,
        HAS,
        (
            "{friend} came and wanted the {obj} too.",
            '"I want to play with the {obj}," said {friend}.',
        ),
        ('"No, it is my {obj}!" said {name}.', "{name} did not want to share."),
        ("{friend} was sad and sat down next to {an}.", "{friend} went away and talked to {an}."),
        ("",) + SPEAK,
        ("Then {name} felt bad.", "{name} saw that and was sorry.", ""),
        ('"We can share the {obj}," {he} said.', "{He} gave the {color} {obj} to {friend}."),
        (
            "They played with the {obj} and the {animal} all day.",
            "It was more fun to play together.",
        ),
    ),
    "broken": (
        GO,
        HAS,
        (
            "{An} ran by, and the {obj} fell down and broke.",
            "{name} fell over {an}, and the {obj} broke.",
        ),
        ("",) + SPEAK,
        ("The {animal} was very sorry.", '"Oh no, my {obj}!" said {name}.', ""),
        ("{friend} saw it and came to help.", '"I can help you," said {friend}.'),
        ("Together they fixed the {color} {obj}.", "{friend} fixed the {obj} with some string."),
        ("Now the {obj} was as good as new.", "The {obj} looked very good again.", ""),
        END,
    ),
    "rain": (
        GO,
        HAS,
        ("Then a big cloud came, and it began to rain.", "All at once it rained."),
        ("{name} got wet and cold.", "{He} did not know where to go.", ""),
        MEET,
        SPEAK,
        (
            "It showed {him} a dry place under a big tree.",
            "They sat down side by side and kept warm.",
        ),
        ("They waited there until the rain was over.", "Soon the sun came out again."),
        END,
    ),
    "noise": (
        WHO,
        ("One night, {he} slept in the {place}.", "One night, {he} had to walk to the {place}."),
        ("It was very dark.", "There was no light at all.", "", ""),
        ("Then {he} heard a sound.", "All at once there was a sound."),
        ('"{Sound}!"',),
        (
            "{name} was afraid and held {his} {color} {obj} tight.",
            "{He} hid behind {his} {color} {obj}.",
        ),
        ("But it was only a {look} {animal}.", "Then {he} saw that it was only {an}."),
        FACT,
        ("{name} was not afraid any more.", '"Hello, {animal}!" said {name}.'),
        END,
    ),
    "mud": (
        GO,
        HAS,
        ("{He} fell, and the {obj} landed in the mud.", "But the {obj} rolled into the mud."),
        ("The {color} {obj} was dirty now.", "Now it was dirty.", ""),
        MEET,
        FACT,
        (
            "It helped {him} to wash the {obj}.",
            "Together they took the {obj} to the water and washed it.",
        ),
        ("Soon the {obj} was clean again.", "Now the {obj} was {color} and clean."),
        SPEAK,
        END,
    ),
    "gift": (
        WHO,
        ("Today was the birthday of {friend}.", "{friend} had a birthday."),
        (
            "{name} went to the {place} to look for a gift.",
            "{He} looked for a gift in the {place}.",
        ),
        ("But {he} did not find one.", "But what would {friend} like?", ""),
        MEET,
        SPEAK,
        ("It had found a {color} {obj}.", "Next to it was a {color} {obj}."),
        ('"That is a good gift!" said {name}.', "{name} took the {obj} and said thank you."),
        ("{friend} loved the {obj}.", "{friend} was very happy with the {color} {obj}."),
    ),
}
SHORT_PLOTS: dict[str, Slots] = {
    "short_home": (
        ("Once upon a time, there was a {look} {animal}.", "There once was {an}."),
        ("It lived in the {home}.", "It lived in the {home} and ate {food}."),
        (
            "One day, it found a {color} {obj} in the {place}.",
            "One day, {name} came from the {place} with a {color} {obj}.",
        ),
        (
            '"{Sound}!" said the {animal}, and it was happy.',
            "It played with the {obj} all day long.",
        ),
    ),
    "short_food": (
        (
            "One day, {name} saw {an} in the {place}.",
            "A {look} {animal} was in the {place} with {name}.",
        ),
        ("It said {sound} and was very hungry.", "It was hungry and cold."),
        (
            "{name} put down a {color} {obj} and gave it some {food}.",
            "{name} had some {food} and a {color} {obj} for it.",
        ),
        ("Now they are good friends.", "From that day on, they were good friends."),
    ),
    "short_help": (
        ("{name} had {an} and a {color} {obj}.",),
        (
            "One day, the {obj} was lost in the {place}.",
            "One day, {he} lost the {obj} in the {place}.",
        ),
        ("The {animal} said {sound} and found it.", "The {animal} looked and found it."),
        ("{name} gave the {animal} some {food}.", "{name} was very happy."),
    ),
}
STORY_REQUESTS = (
    "Tell me a story about {an}.",
    "Please tell me a short story about {an}.",
    "I want a story about {an}.",
    "Can you tell me a story about {an}?",
)
LOOKS = ("little", "big", "small", "friendly", "funny")


def tell_story(rng: random.Random, heldout: bool, plots: dict[str, Slots]) -> tuple[str, str]:
    """Return the animal of a story and the story."""
    while True:
        name, friend = rng.sample(NAMES, 2)
        animal, obj = rng.choice(tuple(ANIMALS)), rng.choice(OBJECTS)
        place, plot = rng.choice(OUTDOORS), rng.choice(tuple(plots))
        if is_held_out(("story", name, animal, obj, place, plot)) == heldout:
            break
    girl = name in GIRLS
    sound, food, home, coat, _, skill = ANIMALS[animal]
    fields = {
        "name": name,
        "friend": friend,
        "animal": animal,
        "an": with_article(animal),
        "An": capital(with_article(animal)),
        "obj": obj,
        "place": place,
        "sound": sound,
        "Sound": capital(sound),
        "food": food,
        "home": home,
        "coat": coat,
        "skill": skill,
        "color": rng.choice(COLORS),
        "look": rng.choice(LOOKS),
        "kid": "girl" if girl else "boy",
        "he": "she" if girl else "he",
        "He": "She" if girl else "He",
        "his": "her" if girl else "his",
        "him": "her" if girl else "him",
    }
    sentences = (rng.choice(slot).format(**fields) for slot in plots[plot])
    return animal, " ".join(sentence for sentence in sentences if sentence)
