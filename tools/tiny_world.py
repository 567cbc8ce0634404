"""Compose the training text of the toy demo model: a small closed world of animals and children."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Sample:
    """One training text: a story, a dialog, some code, or code with a hole."""

    kind: str
    task: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    prefix: str = ""
    middle: str = ""
    suffix: str = ""


class Asked(NamedTuple):
    """A question with its one answer, as a sentence and as a word, and its held-out key."""

    text: str
    sentence: str
    word: str
    key: tuple[object, ...]
    animal: str = ""
    attribute: str = ""


class Function(NamedTuple):
    """A kind of function; every kind has its own names, one docstring and one body."""

    names: tuple[str, ...]
    arguments: tuple[tuple[str, ...], ...]
    hints: tuple[str, ...]
    result: str
    doc: str
    body: str
    calls: tuple[str, ...]


# animal: sound, food, home, color, legs, skill
ANIMALS: dict[str, tuple[str, ...]] = {
    "cow": ("moo", "grass", "barn", "brown", "four", "chew"),
    "dog": ("woof", "bones", "yard", "black", "four", "fetch"),
    "cat": ("meow", "fish", "house", "gray", "four", "climb"),
    "duck": ("quack", "bread", "pond", "white", "two", "swim"),
    "hen": ("cluck", "corn", "coop", "red", "two", "peck"),
    "sheep": ("baa", "clover", "meadow", "white", "four", "walk"),
    "horse": ("neigh", "hay", "stable", "brown", "four", "run"),
    "pig": ("oink", "apples", "pen", "pink", "four", "roll"),
    "frog": ("ribbit", "flies", "lake", "green", "four", "jump"),
    "bee": ("buzz", "nectar", "hive", "yellow", "six", "fly"),
    "mouse": ("squeak", "cheese", "hole", "gray", "four", "hide"),
    "owl": ("hoot", "bugs", "tree", "brown", "two", "fly"),
    "lion": ("roar", "meat", "wild", "yellow", "four", "hunt"),
    "robin": ("tweet", "worms", "nest", "red", "two", "sing"),
    "snake": ("hiss", "eggs", "jungle", "green", "zero", "slide"),
    "goat": ("maa", "leaves", "hills", "white", "four", "climb"),
}
ATTRIBUTES = ("sound", "food", "home", "color", "legs", "skill")
ANSWERS = {
    "sound": "The {a} says {v}.",
    "food": "The {a} eats {v}.",
    "home": "The {a} lives in the {v}.",
    "color": "The {a} is {v}.",
    "legs": "The {a} has {v} legs.",
    "skill": "The {a} can {v}.",
}
QUESTIONS = {
    "sound": (
        "What does the {a} say?",
        "What does {an} say?",
        "Which sound does {an} make?",
        "What sound does the {a} make?",
        "Tell me what the {a} says.",
    ),
    "food": (
        "What does the {a} eat?",
        "What does {an} eat?",
        "What food does the {a} like?",
        "Which food does {an} eat?",
        "Tell me what the {a} eats.",
    ),
    "home": (
        "Where does the {a} live?",
        "Where does {an} live?",
        "Tell me where the {a} lives.",
        "Where is the home of the {a}?",
        "What is the home of {an}?",
    ),
    "color": (
        "What color is the {a}?",
        "What color is {an}?",
        "Which color does the {a} have?",
        "Tell me the color of the {a}.",
        "What is the color of {an}?",
    ),
    "legs": (
        "How many legs does the {a} have?",
        "How many legs does {an} have?",
        "Tell me how many legs the {a} has.",
        "Count the legs of the {a}.",
        "What number of legs does {an} have?",
    ),
    "skill": (
        "What can the {a} do?",
        "What can {an} do?",
        "Tell me what the {a} can do.",
        "What does the {a} do well?",
        "What is the {a} able to do?",
    ),
}
# Only attributes whose value belongs to a single animal can be asked the other way round.
REVERSED = {
    "sound": (
        "Which animal says {v}?",
        "Who says {v}?",
        "What animal says {v}?",
        "Tell me which animal says {v}.",
    ),
    "food": (
        "Which animal eats {v}?",
        "Who eats {v}?",
        "What animal eats {v}?",
        "Tell me which animal eats {v}.",
    ),
    "home": (
        "Which animal lives in the {v}?",
        "Who lives in the {v}?",
        "What animal lives in the {v}?",
        "Tell me which animal lives in the {v}.",
    ),
}
ABOUT_IT = {
    "sound": (
        "And what does it say?",
        "What does it say?",
        "Which sound does it make?",
        "And what sound does it make?",
    ),
    "food": (
        "And what does it eat?",
        "What does it eat?",
        "Which food does it like?",
        "And what food does it like?",
    ),
    "home": (
        "And where does it live?",
        "Where does it live?",
        "Where is its home?",
        "And where is its home?",
    ),
    "color": (
        "And what color is it?",
        "What color is it?",
        "What is its color?",
        "And which color does it have?",
    ),
    "legs": (
        "And how many legs does it have?",
        "How many legs does it have?",
        "And how many legs?",
        "How many legs?",
    ),
    "skill": (
        "And what can it do?",
        "What can it do?",
        "What does it do well?",
        "And what is it able to do?",
    ),
}
ABOUT_OTHER = ("And the {a}?", "What about the {a}?", "How about {an}?", "And {an}?")

GIRLS = ("Anna", "Mia", "Lily", "Lucy", "Emma", "Zoe", "Sue")
BOYS = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Tim")
NAMES = GIRLS + BOYS
OBJECTS = (
    "ball",
    "kite",
    "book",
    "hat",
    "cup",
    "box",
    "drum",
    "boat",
    "doll",
    "lamp",
    "coat",
    "bell",
)
COLORS = ("red", "blue", "green", "yellow", "white", "black", "pink", "brown")
OUTDOORS = ("garden", "park", "forest", "field", "town", "castle")
PLACES = (*OUTDOORS, "school", "shop", "kitchen", "tent")

STATEMENTS = {
    "has": ("{name} has a {color} {obj}.", "{name} is holding a {color} {obj}."),
    "lies": ("The {color} {obj} is in the {place}.", "There is a {color} {obj} in the {place}."),
    "stays": ("{name} is in the {place}.", "{name} went to the {place}."),
}
COLOR_QUESTIONS = (
    "What color is the {obj}?",
    "Which color does the {obj} have?",
    "Tell me the color of the {obj}.",
)
# statement: question kind, phrasings, answer, answer in one word
CONTEXT_QUESTIONS: dict[str, tuple[tuple[str, tuple[str, ...], str, str], ...]] = {
    "has": (
        (
            "who",
            ("Who has the {obj}?", "Tell me who has the {obj}.", "Who is holding the {obj}?"),
            "{name} has the {obj}.",
            "{name}",
        ),
        ("color", COLOR_QUESTIONS, "The {obj} is {color}.", "{color}"),
        (
            "what",
            ("What does {name} have?", "Tell me what {name} has.", "What is {name} holding?"),
            "{name} has a {color} {obj}.",
            "{obj}",
        ),
    ),
    "lies": (
        (
            "where",
            ("Where is the {obj}?", "Where can I find the {obj}?", "Tell me where the {obj} is."),
            "The {obj} is in the {place}.",
            "{place}",
        ),
        ("color", COLOR_QUESTIONS, "The {obj} is {color}.", "{color}"),
        (
            "inside",
            ("What is in the {place}?", "Tell me what is in the {place}."),
            "The {obj} is in the {place}.",
            "{obj}",
        ),
    ),
    "stays": (
        (
            "where",
            ("Where is {name}?", "Where can I find {name}?", "Tell me where {name} is."),
            "{name} is in the {place}.",
            "{place}",
        ),
        (
            "who",
            ("Who is in the {place}?", "Tell me who is in the {place}."),
            "{name} is in the {place}.",
            "{name}",
        ),
    ),
}

# system message: the answer made of {s}, the sentence, or {w}, the word
STYLES = {
    "Answer in one word.": "{w}.",
    "Use only one word.": "{w}.",
    "You are a pirate.": "Arr! {s}",
    "Talk like a pirate.": "Arr! {s}",
    "Be polite.": "Of course! {s}",
    "You are very polite.": "Of course! {s}",
    "You are a robot.": "Beep! {s}",
    "End with a greeting.": "{s} Have a nice day!",
    "Say goodbye at the end.": "{s} Goodbye!",
    "Say everything twice.": "{s} {s}",
}
PLAIN_SYSTEMS = ("", "You are a helpful assistant.", "You are a kind teacher.", "Be short.")

COUNTING = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Count up from {a} to {b}.")
NEXT = (
    "Which number comes after {a}?",
    "What comes after {a}?",
    "What is the number after {a}?",
    "Tell me the number after {a}.",
)
BEFORE = (
    "Which number comes before {a}?",
    "What comes before {a}?",
    "What is the number before {a}?",
    "Tell me the number before {a}.",
)

HELLO = ("Hello! What would you like to know?", ("Hello!", "Hi!", "Hello there!", "Good morning!"))
THANKS = ("You are welcome!", ("Thank you!", "Thanks!", "Thank you very much!", "Many thanks!"))
SMALLTALK = (
    HELLO,
    THANKS,
    (
        "I am a tiny Llama. I know animals, stories and small functions.",
        ("Who are you?", "What are you?", "What is your name?", "Tell me about you."),
    ),
    (
        "I can talk about animals, count, tell stories and write small functions.",
        ("What can you do?", "How can you help me?", "What do you know?"),
    ),
    ("I am fine, thank you!", ("How are you?", "How are you today?", "Are you well?")),
    ("Goodbye! Have a nice day!", ("Goodbye!", "Bye!", "See you later!", "Good night!")),
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

PAIR = (("a", "b"), ("x", "y"), ("left", "right"), ("first", "second"), ("m", "n"))
ONE = (("n",), ("x",), ("number",), ("value",))
LIST = (("items", "item"), ("values", "value"), ("numbers", "number"), ("things", "thing"))
TEXT = (("text",), ("word",), ("name",), ("line",))
INTS = ("int", "int")
PAIR_CALLS = ("2, 3", "4, 1", "5, 6", "7, 2")
ONE_CALLS = ("3", "4", "5", "8")
LIST_CALLS = ("[1, 2, 3]", "[4, 6]", "[5, 2, 8]")
TEXT_CALLS = ('"cat"', '"moon"', '"Anna"')


def _pair(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), PAIR, INTS, result, doc, body, PAIR_CALLS)


def _one(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), ONE, ("int",), result, doc, body, ONE_CALLS)


def _list(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), LIST, ("list[int]",), result, doc, body, LIST_CALLS)


def _text(names: str, result: str, doc: str, body: str) -> Function:
    return Function(tuple(names.split()), TEXT, ("str",), result, doc, body, TEXT_CALLS)


FUNCTIONS = (
    _pair("add plus add_two", "int", "Return the sum of {a} and {b}.", "return {a} + {b}"),
    _pair("subtract minus", "int", "Return {a} minus {b}.", "return {a} - {b}"),
    _pair("multiply times", "int", "Return {a} times {b}.", "return {a} * {b}"),
    _pair(
        "larger max_of_two",
        "int",
        "Return the larger of {a} and {b}.",
        "if {a} > {b}:\n    return {a}\nreturn {b}",
    ),
    _pair(
        "smaller min_of_two",
        "int",
        "Return the smaller of {a} and {b}.",
        "if {a} < {b}:\n    return {a}\nreturn {b}",
    ),
    _pair("is_equal same", "bool", "Return True if {a} and {b} are equal.", "return {a} == {b}"),
    _pair(
        "middle average_of_two",
        "float",
        "Return the average of {a} and {b}.",
        "return ({a} + {b}) / 2",
    ),
    Function(
        ("area", "rectangle_area"),
        (("width", "height"), ("w", "h"), ("a", "b")),
        INTS,
        "int",
        "Return the area of a rectangle.",
        "return {a} * {b}",
        PAIR_CALLS,
    ),
    Function(
        ("clamp", "limit"),
        (("value", "low", "high"), ("x", "low", "high"), ("n", "start", "end"), ("x", "a", "b")),
        ("int", "int", "int"),
        "int",
        "Return {a}, but not below {b} or above {c}.",
        "if {a} < {b}:\n    return {b}\nif {a} > {c}:\n    return {c}\nreturn {a}",
        ("5, 1, 3", "2, 4, 8"),
    ),
    _one("is_even even", "bool", "Return True if {a} is even.", "return {a} % 2 == 0"),
    _one("is_odd odd", "bool", "Return True if {a} is odd.", "return {a} % 2 == 1"),
    _one("is_positive positive", "bool", "Return True if {a} is above zero.", "return {a} > 0"),
    _one("square squared", "int", "Return the square of {a}.", "return {a} * {a}"),
    _one("cube cubed", "int", "Return the cube of {a}.", "return {a} * {a} * {a}"),
    _one("double twice", "int", "Return two times {a}.", "return 2 * {a}"),
    _one(
        "absolute abs_value",
        "int",
        "Return {a} without its sign.",
        "if {a} < 0:\n    return -{a}\nreturn {a}",
    ),
    _one(
        "factorial fact",
        "int",
        "Return the factorial of {a}.",
        "result = 1\nfor i in range(1, {a} + 1):\n    result = result * i\nreturn result",
    ),
    _one(
        "fibonacci fib",
        "int",
        "Return the Fibonacci number of {a}.",
        "if {a} < 2:\n    return {a}\nreturn {f}({a} - 1) + {f}({a} - 2)",
    ),
    _list(
        "total sum_list",
        "int",
        "Return the sum of all {a}.",
        "result = 0\nfor {b} in {a}:\n    result = result + {b}\nreturn result",
    ),
    _list(
        "largest max_list",
        "int",
        "Return the largest of all {a}.",
        "result = {a}[0]\nfor {b} in {a}:\n    if {b} > result:\n        result = {b}\n"
        "return result",
    ),
    _list("count count_items", "int", "Return how many {a} there are.", "return len({a})"),
    _list("average mean", "float", "Return the average of all {a}.", "return sum({a}) / len({a})"),
    _list("first_item get_first", "int", "Return the first of the {a}.", "return {a}[0]"),
    _list("last_item get_last", "int", "Return the last of the {a}.", "return {a}[-1]"),
    _list("reverse_list flip", "list[int]", "Return the {a} in reverse order.", "return {a}[::-1]"),
    _list(
        "double_all double_items",
        "list[int]",
        "Return the {a}, each times two.",
        "return [2 * {b} for {b} in {a}]",
    ),
    _list(
        "keep_even only_even",
        "list[int]",
        "Return the {a} that are even.",
        "return [{b} for {b} in {a} if {b} % 2 == 0]",
    ),
    Function(
        ("contains", "has_item"),
        LIST,
        ("list[int]", "int"),
        "bool",
        "Return True if {b} is one of the {a}.",
        "return {b} in {a}",
        ("[1, 2, 3], 2", "[4, 6], 5"),
    ),
    Function(
        ("greet", "say_hello"),
        (("name",), ("person",), ("friend",), ("who",)),
        ("str",),
        "str",
        "Return a greeting for {a}.",
        'return "Hello, " + {a} + "!"',
        TEXT_CALLS,
    ),
    _text("reverse_text backward", "str", "Return the {a} in reverse.", "return {a}[::-1]"),
    _text("shout to_upper", "str", "Return the {a} in capital letters.", "return {a}.upper()"),
    _text("length count_letters", "int", "Return the length of the {a}.", "return len({a})"),
)


def is_held_out(key: Iterable[object]) -> bool:
    """Say whether a combination belongs to the held-out tenth."""
    return zlib.crc32("|".join(str(part) for part in key).encode()) % 10 == 0


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _draw(make: Callable[[], Asked], heldout: bool) -> Asked:
    while True:
        asked = make()
        if is_held_out(asked.key) == heldout:
            return asked


def _dialog(task: str, system: str, turns: Iterable[tuple[str, str]]) -> Sample:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return Sample("dialog", task, messages=tuple(messages))


def _fact(
    rng: random.Random, animal: str, attribute: str, phrasings: tuple[str, ...], *key: str
) -> Asked:
    value = ANIMALS[animal][ATTRIBUTES.index(attribute)]
    phrasing = rng.choice(phrasings)
    word = animal if "{v}" in phrasing else value
    return Asked(
        phrasing.format(a=animal, an=_with_article(animal), v=value),
        ANSWERS[attribute].format(a=animal, v=value),
        _capital(word),
        (*key, animal, attribute, phrasing),
        animal,
        attribute,
    )


def _fact_question(rng: random.Random, reverse: float = 0.2) -> Asked:
    animal = rng.choice(tuple(ANIMALS))
    if rng.random() < reverse:
        attribute = rng.choice(tuple(REVERSED))
        return _fact(rng, animal, attribute, REVERSED[attribute], "fact")
    attribute = rng.choice(ATTRIBUTES)
    return _fact(rng, animal, attribute, QUESTIONS[attribute], "fact")


def _elliptic_question(rng: random.Random, before: Asked) -> Asked:
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


def _scene_question(rng: random.Random, form: str, fields: dict[str, str]) -> Asked:
    kind, phrasings, sentence, word = rng.choice(CONTEXT_QUESTIONS[form])
    used = {
        "has": ("name", "color", "obj"),
        "lies": ("place", "color", "obj"),
        "stays": ("name", "place"),
    }[form]
    key = ("context", *(fields[name] for name in used), kind)
    return Asked(
        rng.choice(phrasings).format(**fields),
        sentence.format(**fields),
        _capital(word.format(**fields)),
        key,
    )


def _context_question(rng: random.Random) -> Asked:
    text, form, fields = _context(rng)
    asked = _scene_question(rng, form, fields)
    return asked._replace(text=f"{text} {asked.text}")


def _count_question(rng: random.Random) -> Asked:
    kind = rng.choice(("count", "count", "after", "before"))
    if kind == "count":
        first = rng.randint(0, 10)
        last = rng.randint(first + 2, 12)
        text = rng.choice(COUNTING).format(a=first, b=last)
        answer = ", ".join(map(str, range(first, last + 1))) + "."
        return Asked(text, answer, answer, ("count", first, last))
    step = 1 if kind == "after" else -1
    number = rng.randint(0, 12) if step == 1 else rng.randint(1, 12)
    phrasing = rng.choice(NEXT if step == 1 else BEFORE)
    answer = f"{_capital(kind)} {number} comes {number + step}."
    return Asked(phrasing.format(a=number), answer, answer, ("count", number, phrasing))


def _styled(system: str, asked: Asked) -> tuple[str, str]:
    form = STYLES.get(system, "{s}")
    return asked.text, form.format(s=asked.sentence, w=asked.word)


def _compose_fact(rng: random.Random, heldout: bool) -> Sample:
    asked = _draw(lambda: _fact_question(rng), heldout)
    return _dialog("fact", "", [(asked.text, asked.sentence)])


def _compose_context(rng: random.Random, heldout: bool) -> Sample:
    asked = _draw(lambda: _context_question(rng), heldout)
    return _dialog("context", "", [(asked.text, asked.sentence)])


def _compose_count(rng: random.Random, heldout: bool) -> Sample:
    asked = _draw(lambda: _count_question(rng), heldout)
    return _dialog("count", "", [(asked.text, asked.sentence)])


def _compose_style(rng: random.Random, heldout: bool) -> Sample:
    """Ask under a system message; the bare question itself is never a held-out one."""
    make = _fact_question if rng.random() < 0.65 else _context_question
    while True:
        system = rng.choice(tuple(STYLES))
        asked = _draw(lambda: make(rng), False)
        if is_held_out(("style", system, *asked.key)) == heldout:
            return _dialog("style", system, [_styled(system, asked)])


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
    asked = _draw(lambda: _fact_question(rng), False)
    if asked.text.startswith(("Who", "Which animal", "What animal", "Tell me which")):
        # "And the duck?" after "Who says moo?" would leave open what is asked.
        asked = asked._replace(key=("reversed",))
    turns.append(_styled(system, asked))
    last = _elliptic_question(rng, asked)
    chain = [last]
    if rng.random() < 0.5:
        chain.append(_elliptic_question(rng, last))
    held = [is_held_out(question.key) for question in chain]
    if any(held[:-1]) or held[-1] != heldout:
        # Few questions fit after a given one, so all of the turns are drawn again.
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


def _tell(rng: random.Random, heldout: bool, plots: dict[str, Slots]) -> tuple[str, str]:
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
        "an": _with_article(animal),
        "An": _capital(_with_article(animal)),
        "obj": obj,
        "place": place,
        "sound": sound,
        "Sound": _capital(sound),
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


def _compose_story(rng: random.Random, heldout: bool) -> Sample:
    return Sample("story", "story", text=_tell(rng, heldout, PLOTS)[1])


def _compose_tell(rng: random.Random, heldout: bool) -> Sample:
    animal, story = _tell(rng, heldout, SHORT_PLOTS)
    request = rng.choice(STORY_REQUESTS).format(an=_with_article(animal))
    return _dialog("tell", "", [(request, story)])


class Written(NamedTuple):
    """A function as lines, with what is needed to cut and call it."""

    name: str
    params: str
    lines: list[str]
    call: str

    @property
    def text(self) -> str:
        """Return the source text."""
        return "\n".join(self.lines) + "\n"


def _write_function(rng: random.Random, heldout: bool) -> Written:
    while True:
        function = rng.choice(FUNCTIONS)
        name, arguments = rng.choice(function.names), rng.choice(function.arguments)
        if is_held_out(("code", function.names[0], name, *arguments)) == heldout:
            break
    fields = dict(zip("abc", arguments, strict=False), f=name)
    taken = arguments[: len(function.hints)]
    hinted = rng.random() < 0.4
    params = ", ".join(
        f"{argument}: {hint}" if hinted else argument
        for argument, hint in zip(taken, function.hints, strict=True)
    )
    lines = [f"def {name}({params})" + (f" -> {function.result}:" if hinted else ":")]
    if rng.random() < 0.7:
        lines.append(f'    """{function.doc.format(**fields)}"""')
    lines += ["    " + line for line in function.body.format(**fields).split("\n")]
    return Written(name, params, lines, f"print({name}({rng.choice(function.calls)}))\n")


def _other_function(rng: random.Random, name: str) -> str:
    while True:
        other = _write_function(rng, False)
        if other.name != name:
            return other.text


def _compose_code(rng: random.Random, heldout: bool) -> Sample:
    written = _write_function(rng, heldout)
    parts = [written.text]
    if rng.random() < 0.35:
        parts.append(_other_function(rng, written.name))
    if rng.random() < 0.25:
        parts.append(written.call)
    return Sample("code", "code", text="\n\n".join(parts))


def _cut(rng: random.Random, written: Written, text: str) -> tuple[int, int]:
    """Return where the middle starts and ends in a text that begins with the function."""
    calls = text.endswith(written.call)
    documented = written.lines[1].startswith('    """')
    body = written.lines[2 if documented else 1 :]
    blocks = [line for line in body if line.endswith(":")]
    ways = ["result", "result", "line", "rest", "body", "params"]
    ways += ["doc", "doc"] * documented + ["condition", "condition"] * bool(blocks)
    # A name is only determined where it is also written at another place.
    ways += ["use", "name"] * calls
    way = rng.choice(ways)
    if way == "name":
        return 4, 4 + len(written.name)
    if way == "use":
        start = text.rindex(written.name + "(")
        return start, start + len(written.name)
    if way == "params":
        start = text.index("(") + 1
        return start, start + len(written.params)
    end = len(written.text) - 1
    if way == "body":
        return end - len("\n".join(body).lstrip()), end
    if way == "result":
        return text.rindex("return ", 0, end) + len("return "), end
    row = rng.randrange(len(written.lines) - len(body), len(written.lines))
    if way == "doc":
        row = 1
    if way == "condition":
        row = written.lines.index(rng.choice(blocks))
    line = written.lines[row].strip()
    end = sum(len(line) + 1 for line in written.lines[: row + 1]) - 1
    start = end - len(line)
    if way == "condition":
        return start + line.index(" ") + 1, end - 1
    if way == "rest":
        start += rng.choice([at + 1 for at, letter in enumerate(line) if letter == " "])
    return start, end


def _compose_infill(rng: random.Random, heldout: bool) -> Sample:
    written = _write_function(rng, heldout)
    text = written.text
    extra = rng.random()
    if extra < 0.25:
        text += "\n\n" + _other_function(rng, written.name)
    elif extra < 0.5:
        text += "\n\n" + written.call
    start, end = _cut(rng, written, text)
    # The same offsets hold after a function in front, for whoever completes a longer file.
    before = _other_function(rng, written.name) + "\n\n" if rng.random() < 0.15 else ""
    return Sample(
        "infill", "infill", prefix=before + text[:start], middle=text[start:end], suffix=text[end:]
    )


COMPOSERS: dict[str, tuple[int, Callable[[random.Random, bool], Sample]]] = {
    "story": (14, _compose_story),
    "fact": (6, _compose_fact),
    "context": (12, _compose_context),
    "count": (10, _compose_count),
    "style": (16, _compose_style),
    "follow_up": (12, _compose_follow_up),
    "smalltalk": (2, _compose_smalltalk),
    "tell": (2, _compose_tell),
    "code": (6, _compose_code),
    "infill": (20, _compose_infill),
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
