"""The toy demo model's closed world: animals and children, and questions and answers about them."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


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
WHO_HAS = ("Who has the {obj}?", "Tell me who has the {obj}.", "Who is holding the {obj}?")
WHAT_HAS = ("What does {name} have?", "Tell me what {name} has.", "What is {name} holding?")
WHERE_LIES = ("Where is the {obj}?", "Where can I find the {obj}?", "Tell me where the {obj} is.")
WHAT_LIES = ("What is in the {place}?", "Tell me what is in the {place}.")
WHERE_STAYS = ("Where is {name}?", "Where can I find {name}?", "Tell me where {name} is.")
WHO_STAYS = ("Who is in the {place}?", "Tell me who is in the {place}.")
# statement: question kind, phrasings, answer, answer in one word
CONTEXT_QUESTIONS: dict[str, tuple[tuple[str, tuple[str, ...], str, str], ...]] = {
    "has": (
        ("who", WHO_HAS, "{name} has the {obj}.", "{name}"),
        ("color", COLOR_QUESTIONS, "The {obj} is {color}.", "{color}"),
        ("what", WHAT_HAS, "{name} has a {color} {obj}.", "{obj}"),
    ),
    "lies": (
        ("where", WHERE_LIES, "The {obj} is in the {place}.", "{place}"),
        ("color", COLOR_QUESTIONS, "The {obj} is {color}.", "{color}"),
        ("inside", WHAT_LIES, "The {obj} is in the {place}.", "{obj}"),
    ),
    "stays": (
        ("where", WHERE_STAYS, "{name} is in the {place}.", "{place}"),
        ("who", WHO_STAYS, "{name} is in the {place}.", "{name}"),
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


def is_held_out(key: Iterable[object]) -> bool:
    """Return whether a combination belongs to the held-out tenth."""
    return zlib.crc32("|".join(str(part) for part in key).encode()) % 10 == 0


def capital(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
