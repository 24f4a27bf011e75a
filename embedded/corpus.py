"""Seeded text for the embedded models: short stories whose facts agree with each other, and
simple chat turns.

Everything is generated here from word lists written for this project, so the text may be used
freely. A story keeps track of who it is about, what they carry, where they are and what went
wrong, so that later sentences agree with earlier ones: that is what lets a model of a few
million parameters write readable text.
"""

import random
from collections.abc import Iterator

NAMES = {
    "she": [
        "Anna", "Mia", "Lily", "Rosa", "Clara", "Nora", "Elsa", "Ivy", "Ruth", "Maya", "Tilda",
        "Greta", "Hanna", "Zoe", "Emma", "Alma",
    ],
    "he": [
        "Ben", "Tom", "Leo", "Max", "Oscar", "Finn", "Hugo", "Emil", "Paul", "Sam", "Otto",
        "Karl", "Jonas", "Theo", "Noah", "Milo",
    ],
}  # fmt: skip
ANIMALS = [
    "fox", "rabbit", "bear", "mouse", "owl", "hedgehog", "squirrel", "duck", "frog", "badger",
    "otter", "goose", "cat", "dog",
]  # fmt: skip
TRAITS = [
    "little", "old", "clever", "shy", "brave", "kind", "curious", "quiet", "cheerful",
    "patient", "young", "gentle",
]  # fmt: skip
PLACES = [
    "the forest",
    "the village",
    "the garden",
    "the old mill",
    "the harbour",
    "the meadow",
    "the market",
    "the lighthouse",
    "the library",
    "the farm",
    "the river",
    "the hill",
    "the bakery",
    "the school",
    "the castle",
    "the beach",
]
THINGS = [
    "a red kite",
    "a wooden boat",
    "a silver key",
    "a blue lantern",
    "a small drum",
    "a warm scarf",
    "a brass bell",
    "a paper map",
    "a green ball",
    "a golden coin",
    "a glass marble",
    "a long rope",
    "a yellow umbrella",
    "a tin whistle",
    "a picture book",
    "a basket of apples",
]
WEATHER = {
    "sunny": "The sun was shining and the sky was blue.",
    "rainy": "It was raining, and the leaves were dripping.",
    "windy": "A strong wind was blowing over the fields.",
    "snowy": "Snow was falling, and everything was white and still.",
    "foggy": "A thick fog lay over the land.",
}
FOODS = [
    "bread", "soup", "apples", "cake", "honey", "cheese", "berries", "pancakes", "cookies",
    "pears",
]  # fmt: skip
COLORS = ["red", "blue", "green", "yellow", "white", "black", "brown", "orange"]
OPPOSITES = {
    "big": "small", "hot": "cold", "day": "night", "up": "down", "happy": "sad", "fast": "slow",
    "old": "young", "open": "closed", "light": "dark", "long": "short",
    "wet": "dry", "loud": "quiet",
}  # fmt: skip
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "Norway": "Oslo", "Austria": "Vienna", "Greece": "Athens", "Egypt": "Cairo", "Poland": "Warsaw",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "duck": "quack", "cow": "moo", "sheep": "baa", "frog": "croak",
    "owl": "hoot", "mouse": "squeak",
}  # fmt: skip


class Hero:
    """Somebody in a story, with the words to speak of them."""

    def __init__(self, rng: random.Random, taken: str = "") -> None:
        self.pronoun = rng.choice(["she", "he"])
        self.name = rng.choice([name for name in NAMES[self.pronoun] if name != taken])
        self.kind = rng.choice([*ANIMALS, "girl" if self.pronoun == "she" else "boy"])
        self.trait = rng.choice(TRAITS)
        self.them = "her" if self.pronoun == "she" else "him"
        self.their = "her" if self.pronoun == "she" else "his"
        self.They = self.pronoun.capitalize()

    @property
    def full(self) -> str:
        """Such as `a brave fox named Anna`."""
        return f"{article(self.trait)} {self.trait} {self.kind} named {self.name}"


def article(word: str) -> str:
    """`a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"


def the(thing: str) -> str:
    """`a red kite` -> `the red kite`."""
    return "the " + thing.split(" ", 1)[1]


def story(rng: random.Random, kind: str = "", thing: str = "", place: str = "") -> str:
    """One story of 90-180 words; some of it may be prescribed."""
    hero = Hero(rng)
    if kind:
        hero.kind = kind
    friend = Hero(rng, hero.name)
    thing = thing or rng.choice(THINGS)
    home, away = rng.sample(PLACES, 2)
    if place:
        home = place
        away = rng.choice([p for p in PLACES if p != place])
    weather = rng.choice(list(WEATHER))
    parts = [opening(rng, hero, home), rng.choice(possession(hero, thing))]
    parts.append(rng.choice([WEATHER[weather], f"One {weather} day, {hero.name} went to {away}."]))
    if away not in parts[-1]:
        parts.append(rng.choice([
            f"{hero.name} walked to {away} with {the(thing)}.",
            f'"Today I will go to {away}," said {hero.name}.',
            f"{hero.They} wanted to see {away}, so {hero.pronoun} set out early.",
        ]))  # fmt: skip
    parts += rng.choice([lost, broken, hungry, stuck, gift, dark])(rng, hero, friend, thing, away)
    parts.append(ending(rng, hero, friend, home, thing))
    return " ".join(parts)


def opening(rng: random.Random, hero: Hero, home: str) -> str:
    """The first sentence."""
    near = f"near {home}" if rng.random() < 0.6 else f"in a house by {home}"
    return rng.choice([
        f"Once upon a time, there was {hero.full} who lived {near}.",
        f"Once there was {hero.full}. {hero.They} lived {near}.",
        f"{hero.full[0].upper()}{hero.full[1:]} lived {near}.",
        f"{near[0].upper()}{near[1:]} lived {hero.full}.",
        f"Long ago, {hero.full} lived {near}.",
        f"This is the story of {hero.name}, {article(hero.trait)} {hero.trait} {hero.kind} who "
        f"lived {near}.",
    ])  # fmt: skip


def possession(hero: Hero, thing: str) -> list[str]:
    """What the hero owns."""
    return [
        f"{hero.name} had {thing}, and {hero.pronoun} loved it very much.",
        f"Every day {hero.pronoun} played with {the(thing)} that {hero.their} grandmother had "
        "made.",
        f"For {hero.their} birthday {hero.pronoun} got {thing}.",
        f"{hero.They} always carried {thing}.",
    ]


def lost(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """The thing is lost and found."""
    spot = rng.choice(
        ["under a bush", "behind a stone", "in the tall grass", "beside the path", "under a bridge"]
    )
    return [
        rng.choice([
            f"But when {hero.pronoun} came to {place}, {the(thing)} was gone.",
            f"There {hero.pronoun} stopped to rest, and then {hero.pronoun} could not find "
            f"{the(thing)}.",
        ]),
        f'"Oh no, I have lost {the(thing)}!" cried {hero.name}.',
        rng.choice([f"{hero.They} looked everywhere, but it was not "
                    "there.", f"{hero.They} felt very sad."]),
        meet(rng, hero, friend),
        f'"Do not worry," said {friend.name}. "We will look for it together."',
        f"They looked for a long time, and at last {friend.name} found {the(thing)} {spot}.",
        f'"Thank you, {friend.name}!" said {hero.name}, and {hero.pronoun} was happy again.',
    ]  # fmt: skip


def broken(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """The thing breaks and is mended."""
    tool = rng.choice(
        ["some glue", "a piece of string", "a needle and thread", "a little wood", "a bit of wire"]
    )
    return [
        f"At {place} {hero.pronoun} fell over a root, and {the(thing)} broke.",
        f'"What shall I do now?" asked {hero.name} with tears in {hero.their} eyes.',
        meet(rng, hero, friend),
        f'"I can mend it," said {friend.name}. "I have {tool}."',
        f"{friend.They} worked slowly and with care until {the(thing)} was whole again.",
        f'"It is even better than before!" said {hero.name}.',
    ]


def hungry(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """Somebody is hungry and food is shared."""
    food = rng.choice(FOODS)
    return [
        meet(rng, hero, friend),
        f'{friend.name} looked tired. "I have not eaten all day," {friend.pronoun} said.',
        f"{hero.name} had some {food} in {hero.their} bag.",
        f'"Please take half of my {food}," said {hero.name}.',
        f"They sat down at {place} and ate the {food} together.",
        f'"You are a good friend," said {friend.name}.',
    ]


def stuck(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """Somebody needs to be pulled out."""
    trap = rng.choice(["a deep hole", "the mud", "a thorn bush", "a hollow tree", "an old net"])
    return [
        f"At {place} {hero.pronoun} heard a small voice.",
        f'"Help! I am stuck in {trap}!" called the voice.',
        f"It was {friend.full}.",
        rng.choice([
            f"{hero.name} put down {the(thing)} and pulled as hard as {hero.pronoun} could.",
            f"{hero.name} was not strong, but {hero.pronoun} did not give up.",
        ]),
        f"One, two, three, and {friend.name} was free.",
        f'"You saved me," said {friend.name}. "How can I thank you?"',
        f'"Just be my friend," said {hero.name}.',
    ]  # fmt: skip


def gift(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """The thing is given away, and something comes back."""
    food = rng.choice(FOODS)
    return [
        meet(rng, hero, friend),
        f'"What a beautiful thing you have," said {friend.name}. "I never had {thing}."',
        f"{hero.name} thought about it for a while.",
        f'Then {hero.pronoun} smiled and said, "You can have it. It is a present."',
        f"{friend.name} was so glad that {friend.pronoun} danced all around {place}.",
        f"The next day {friend.name} came back with {food} for {hero.name}.",
    ]


def dark(rng: random.Random, hero: Hero, friend: Hero, thing: str, place: str) -> list[str]:
    """Night falls and somebody shows the way."""
    return [
        f"The day passed quickly, and soon it was dark at {place}.",
        f"{hero.name} did not know the way home, and {hero.pronoun} was afraid.",
        meet(rng, hero, friend),
        f'"I know every path here," said {friend.name}. "Follow me."',
        rng.choice([
            f"They walked side by side, and {friend.name} sang a song so that {hero.name} would "
            "not be afraid.",
            "The moon came out from behind a cloud and showed them the way.",
            f"They held hands and counted their steps, and {hero.name} was not afraid any more.",
        ]),
        "After a while they saw a light in a window.",
    ]  # fmt: skip


def meet(rng: random.Random, hero: Hero, friend: Hero) -> str:
    """The friend comes in."""
    return rng.choice([
        f"Just then {friend.full} came along.",
        f"Then {hero.pronoun} met {friend.full}.",
        f"Soon {friend.full} came by and said hello.",
    ])  # fmt: skip


def ending(rng: random.Random, hero: Hero, friend: Hero, home: str, thing: str) -> str:
    """The last sentences."""
    return rng.choice([
        f"From that day on, {hero.name} and {friend.name} were the best of friends.",
        f"In the evening {hero.name} went back to {home} and slept well. The end.",
        f"{hero.name} told {hero.their} mother all about it, and they both laughed.",
        f"And {hero.name} learned that it is good to have a friend. The end.",
        f"They went home to {home} together and drank warm milk by the fire.",
        f"That night {hero.name} dreamed of {the(thing)} and smiled.",
    ])  # fmt: skip


def chat(rng: random.Random) -> list[tuple[str, str]]:
    """One to three (question, answer) turns."""
    return [turn(rng) for _ in range(rng.choice([1, 1, 2, 3]))]


def turn(rng: random.Random) -> tuple[str, str]:
    """One question and its answer."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    word, animal = rng.choice(list(OPPOSITES)), rng.choice(list(SOUNDS))
    country, kind = rng.choice(list(CAPITALS)), rng.choice(ANIMALS)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    start = rng.randint(1, 5)
    counted = ", ".join(NUMBERS[start : start + 5])
    choices = [
        (f"What is {NUMBERS[a]} plus "
         f"{NUMBERS[b]}?", f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}."),
        (f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."),
        (f"What does a {animal} say?", f"A {animal} says {SOUNDS[animal]}."),
        (f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."),
        (f"Count from {NUMBERS[start]} to {NUMBERS[start + 4]}.", f"{counted.capitalize()}."),
        ("Who are you?", "I am a very small language model. I can tell short stories."),
        (rng.choice(["Hello!", "Hi!", "Good morning!"]), "Hello! Would you like to hear a story?"),
        ("What can you do?", "I can tell a short story, count, and answer simple questions."),
    ]  # fmt: skip
    if rng.random() < 0.35:
        return rng.choice(choices)
    asked = rng.choice([
        (f"Tell me a story about {article(kind)} {kind}.", story(rng, kind=kind)),
        (f"Write a story about {article(kind)} {kind}.", story(rng, kind=kind)),
        (f"Tell me a story with {thing}.", story(rng, thing=thing)),
        (f"Tell me a story about {place}.", story(rng, place=place)),
        ("Tell me a story.", story(rng)),
    ])  # fmt: skip
    return asked


def documents(seed: int, count: int) -> Iterator[str | list[tuple[str, str]]]:
    """`count` documents: stories as text (seven in ten), chats as turns."""
    rng = random.Random(seed)
    for _ in range(count):
        yield story(rng) if rng.random() < 0.7 else chat(rng)
