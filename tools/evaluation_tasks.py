"""Write the questions of the tasks in tests/data/tasks: ``python tools/evaluation_tasks.py``.

Animals and stories are of the embedded model's world, and it has seen none of them in training.
Capitals are for models that know the real one.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_facts import ANIMALS, ANSWERS, ATTRIBUTES, QUESTIONS, is_held_out, with_article
from tiny_world import compose_task

from llama import cli

FOLDER = Path(__file__).parent.parent / "tests" / "data" / "tasks"
CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Argentina Buenos_Aires,
Armenia Yerevan, Australia Canberra, Austria Vienna, Azerbaijan Baku, Bangladesh Dhaka,
Belgium Brussels, Bolivia Sucre, Bosnia_and_Herzegovina Sarajevo, Brazil Brasilia, Bulgaria Sofia,
Cambodia Phnom_Penh, Cameroon Yaounde, Canada Ottawa, Chile Santiago, China Beijing,
Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark Copenhagen, Ecuador Quito,
Egypt Cairo, Estonia Tallinn, Ethiopia Addis_Ababa, Finland Helsinki, France Paris,
Georgia Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Honduras Tegucigalpa,
Hungary Budapest, Iceland Reykjavik, India New_Delhi, Indonesia Jakarta, Iran Tehran,
Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan Tokyo, Jordan Amman,
Kazakhstan Astana, Kenya Nairobi, Laos Vientiane, Latvia Riga, Lebanon Beirut, Libya Tripoli,
Lithuania Vilnius, Madagascar Antananarivo, Malaysia Kuala_Lumpur, Mali Bamako, Malta Valletta,
Mongolia Ulaanbaatar, Morocco Rabat, Mozambique Maputo, Nepal Kathmandu, Netherlands Amsterdam,
New_Zealand Wellington, Nicaragua Managua, Niger Niamey, Nigeria Abuja, North_Korea Pyongyang,
Norway Oslo, Oman Muscat, Pakistan Islamabad, Paraguay Asuncion, Peru Lima, Philippines Manila,
Poland Warsaw, Portugal Lisbon, Qatar Doha, Romania Bucharest, Russia Moscow, Rwanda Kigali,
Saudi_Arabia Riyadh, Senegal Dakar, Serbia Belgrade, Slovakia Bratislava, Slovenia Ljubljana,
Somalia Mogadishu, South_Korea Seoul, Spain Madrid, Sudan Khartoum, Sweden Stockholm,
Switzerland Bern, Syria Damascus, Taiwan Taipei, Thailand Bangkok, Tunisia Tunis, Turkey Ankara,
Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Uzbekistan Tashkent, Venezuela Caracas,
Vietnam Hanoi, Yemen Sanaa, Zambia Lusaka, Zimbabwe Harare
"""

Document = dict[str, Any]


def chosen(rng: random.Random, right: str, wrong: list[str]) -> Document:
    """Return four choices, and the number of the right one."""
    choices = [right, *rng.sample(wrong, 3)]
    rng.shuffle(choices)
    return {"choices": choices, "answer": choices.index(right)}


def animals(rng: random.Random) -> Iterator[Document]:
    for animal, values in ANIMALS.items():
        for attribute, value in zip(ATTRIBUTES, values, strict=True):
            for phrasing in QUESTIONS[attribute]:
                if not is_held_out(("fact", animal, attribute, phrasing)):
                    continue
                question = phrasing.format(a=animal, an=with_article(animal), v=value)
                others = {each[ATTRIBUTES.index(attribute)] for each in ANIMALS.values()} - {value}
                if len(others) < 3:  # numbers of legs
                    continue
                wrong = [ANSWERS[attribute].format(a=animal, v=other) for other in sorted(others)]
                right = ANSWERS[attribute].format(a=animal, v=value)
                yield {"question": question, **chosen(rng, right, wrong)}


def capitals(rng: random.Random) -> Iterator[Document]:
    pairs = [entry.split() for entry in CAPITALS.split(",")]
    known = {country.replace("_", " "): city.replace("_", " ") for country, city in pairs}
    for country, city in known.items():
        wrong = [other for other in known.values() if other != city]
        yield {"country": country, **chosen(rng, city, wrong)}


def stories(rng: random.Random) -> Iterator[Document]:
    for _ in range(20):
        yield {"text": compose_task("story", rng, heldout=True).text}


def endings(rng: random.Random) -> Iterator[Document]:
    parts = [compose_task("story", rng, heldout=True).text.rpartition(". ") for _ in range(200)]
    known = sorted({ending for _, _, ending in parts})
    for text, _, ending in parts[:40]:
        yield {
            "text": f"{text}.",
            **chosen(rng, ending, [each for each in known if each != ending]),
        }


def main(folder: str = str(FOLDER)) -> None:
    """Write the questions, the same ones each time.

    Args:
        folder: where the files go.
    """
    for make in (animals, capitals, stories, endings):
        documents = list(make(random.Random(make.__name__)))
        lines = [json.dumps(document, ensure_ascii=False) for document in documents]
        (Path(folder) / f"{make.__name__}.jsonl").write_text(
            "\n".join(lines) + "\n", encoding="utf-8"
        )
        print(f"{make.__name__}: {len(documents)}")


if __name__ == "__main__":
    cli.run(main)
