"""Make the example's data: commands for a home in English, and the JSON that a home automation wants.

A model of 135 million parameters learns in ten minutes to copy and to classify, so that is all the task asks:
which device, which room, which action; value and time stand in the answer exactly as they were said. What is
not a home command gets one fixed refusal.

A test row's combination of phrasing and room (without a room: of phrasing, value and time) is not in
training.

    python examples/home/generate.py [FOLDER]

writes train.jsonl, validation.jsonl and test.jsonl beside this file, or into FOLDER; always the same bytes.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 20261122
SIZES = {"test": 300, "validation": 200, "train": 1520}
REFUSAL = {"error": "not a home command"}
REFUSED_SHARE = 0.14

ROOMS = (
    "kitchen", "bedroom", "living room", "bathroom", "hallway", "office", "study", "garage",
    "nursery", "attic", "basement", "dining room", "guest room", "laundry room",
)  # fmt: skip

# What people call a device, by its name in the answer.
DEVICES = {
    "light": ("light", "lights", "ceiling light"),
    "lamp": ("lamp", "floor lamp", "desk lamp"),
    "fan": ("fan", "ceiling fan"),
    "tv": ("tv", "television", "telly"),
    "speaker": ("speaker", "stereo", "music"),
    "heating": ("heating", "radiator", "thermostat"),
    "blinds": ("blinds", "shades"),
    "curtains": ("curtains", "drapes"),
    "window": ("window",),
    "door": ("door",),
    "vacuum": ("vacuum", "robot vacuum"),
    "coffee machine": ("coffee machine", "coffee maker"),
    "dishwasher": ("dishwasher",),
    "washing machine": ("washing machine", "washer"),
    "oven": ("oven",),
}

SWITCHED = ("light", "lamp", "fan", "tv", "speaker", "heating")
OPENED = ("blinds", "curtains", "window", "door")
RUN = ("vacuum", "coffee machine", "dishwasher", "washing machine")

PERCENT = tuple(f"{number}{unit}" for number in range(5, 100, 5) for unit in ("%", " percent"))
DEGREES = tuple(f"{number}{unit}" for number in range(15, 27) for unit in (" degrees", ".5 degrees", " C"))
OVEN_DEGREES = tuple(f"{number} degrees" for number in range(120, 255, 5))
VOLUME = tuple(str(number) for number in range(2, 60))
CHANNEL = tuple(f"channel {number}" for number in range(1, 80))
LEVEL = tuple(f"level {number}" for number in range(1, 10))
COLOUR = ("red", "blue", "green", "orange", "purple", "pink", "warm white", "cold white")


@dataclass(frozen=True)
class Intent:
    """One action, the devices that know it, the values it takes, and how people ask for it.

    A phrasing that starts with a verb may be made polite; the others stand as they are.
    """

    action: str
    devices: tuple[str, ...]
    orders: tuple[str, ...]
    wishes: tuple[str, ...] = ()
    values: tuple[str, ...] = ()


INTENTS = (
    Intent(
        "on", SWITCHED,
        (
            "turn on the {device} in the {room}", "turn the {room} {device} on",
            "switch on the {room} {device}", "switch the {device} on in the {room}",
            "put the {room} {device} on", "power up the {room} {device}",
            "turn on the {device}", "switch the {device} on",
        ),
        ("I need the {device} on in the {room}", "{room} {device} on", "I want the {room} {device} on"),
    ),
    Intent(
        "off", SWITCHED,
        (
            "turn off the {device} in the {room}", "turn the {room} {device} off",
            "switch off the {room} {device}", "switch the {device} off in the {room}",
            "shut off the {room} {device}", "power down the {room} {device}",
            "turn off the {device}", "switch the {device} off",
        ),
        ("I want the {device} off in the {room}", "{room} {device} off", "no need for the {room} {device}"),
    ),
    Intent(
        "set", ("light", "lamp"),
        (
            "set the {room} {device} to {value}", "dim the {device} in the {room} to {value}",
            "bring the {room} {device} to {value}", "put the {device} in the {room} at {value}",
            "set the {device} to {value}",
        ),
        ("{room} {device} at {value}", "I want the {room} {device} at {value}"),
        PERCENT,
    ),
    Intent(
        "set", ("light", "lamp"),
        ("make the {room} {device} {value}", "change the {device} in the {room} to {value}",
         "turn the {room} {device} {value}"),
        ("I want a {value} {device} in the {room}",),
        COLOUR,
    ),
    Intent(
        "set", ("blinds", "curtains"),
        ("set the {room} {device} to {value}", "move the {device} in the {room} to {value}",
         "adjust the {room} {device} to {value}"),
        ("{room} {device} at {value}",),
        PERCENT,
    ),
    Intent(
        "set", ("heating",),
        (
            "set the {room} {device} to {value}", "set the {device} in the {room} to {value}",
            "adjust the {room} {device} to {value}", "put the {device} at {value}",
        ),
        ("I want the {room} {device} at {value}", "{room} {device} at {value}"),
        DEGREES,
    ),
    Intent("on", ("oven",), ("turn on the {device}", "switch the {device} on", "power up the {device}")),
    Intent("off", ("oven",), ("turn off the {device}", "switch the {device} off", "shut off the {device}")),
    Intent(
        "set", ("oven",),
        ("set the {device} to {value}", "preheat the {device} to {value}", "heat the {device} up to {value}"),
        ("I need the {device} at {value}",),
        OVEN_DEGREES,
    ),
    Intent(
        "set", ("speaker",),
        ("set the {room} {device} to {value}", "set the volume of the {device} in the {room} to {value}",
         "put the {room} {device} at volume {value}"),
        ("I want the {room} {device} at volume {value}",),
        VOLUME,
    ),
    Intent(
        "set", ("tv",),
        ("put the {room} {device} on {value}", "change the {device} in the {room} to {value}",
         "switch the {room} {device} to {value}"),
        ("I want {value} on the {room} {device}",),
        CHANNEL,
    ),
    Intent(
        "set", ("fan",),
        ("set the {room} {device} to {value}", "run the {device} in the {room} at {value}",
         "put the {room} {device} on {value}"),
        ("I want the {room} {device} on {value}",),
        LEVEL,
    ),
    Intent(
        "increase", ("light", "lamp", "fan", "speaker", "heating"),
        ("turn up the {room} {device}", "turn the {device} in the {room} up", "turn up the {device}"),
        ("I need more of the {room} {device}",),
    ),
    Intent(
        "increase", ("light", "lamp", "fan", "speaker", "heating"),
        ("turn up the {room} {device} by {value}", "raise the {device} in the {room} by {value}"),
        (),
        PERCENT,
    ),
    Intent(
        "decrease", ("light", "lamp", "fan", "speaker", "heating"),
        ("turn down the {room} {device}", "turn the {device} in the {room} down", "turn down the {device}"),
        ("I need less of the {room} {device}",),
    ),
    Intent(
        "decrease", ("light", "lamp", "fan", "speaker", "heating"),
        ("turn down the {room} {device} by {value}", "lower the {device} in the {room} by {value}"),
        (),
        PERCENT,
    ),
    Intent(
        "open", OPENED,
        ("open the {room} {device}", "open the {device} in the {room}", "open up the {room} {device}",
         "open the {device}"),
        ("I want the {room} {device} open",),
    ),
    Intent(
        "close", OPENED,
        ("close the {room} {device}", "close the {device} in the {room}", "shut the {room} {device}",
         "shut the {device}"),
        ("I want the {room} {device} closed",),
    ),
    Intent(
        "lock", ("door", "window"),
        ("lock the {room} {device}", "lock the {device} in the {room}", "lock up the {room} {device}"),
        ("make sure the {room} {device} is locked", "I want the {room} {device} locked"),
    ),
    Intent(
        "unlock", ("door", "window"),
        ("unlock the {room} {device}", "unlock the {device} in the {room}"),
        ("I want the {room} {device} unlocked",),
    ),
    Intent(
        "start", RUN,
        ("start the {device} in the {room}", "start the {room} {device}", "run the {device} in the {room}",
         "start the {device}", "run the {device}", "get the {room} {device} going"),
    ),
    Intent(
        "stop", RUN,
        ("stop the {device} in the {room}", "stop the {room} {device}", "halt the {device} in the {room}",
         "stop the {device}", "halt the {device}"),
    ),
)  # fmt: skip

BEFORE = ("", "", "", "please ", "could you ", "can you ", "hey, ", "ok, ", "would you ", "I'd like you to ")
AFTER = ("", "", "", "", " please", ", thanks")

FIXED_TIMES = (
    "tonight", "tomorrow", "tomorrow morning", "tomorrow evening", "this evening", "this afternoon",
    "at noon", "at midnight", "at sunset", "at sunrise", "after dinner", "before breakfast",
    "when I get home", "on Monday", "on Friday evening", "on Sunday morning", "at half past six",
    "at half past nine", "at quarter to eight", "at quarter past ten", "right now",
    "every day", "every night",
)  # fmt: skip

REFUSED = (
    "what is the capital of {country}?", "how many people live in {country}?", "how far is it to {city}?",
    "what is the weather like in {city}?", "book a flight to {city}", "find me a hotel in {city}",
    "who wrote {book}?", "tell me what {book} is about", "recommend a book like {book}",
    "tell me a joke about {animal}", "write a poem about {animal}", "how long do {animal} live?",
    "translate {food} into {language}", "how do I say {food} in {language}?", "teach me some {language}",
    "order {food} for {number} people", "how do I cook {food}?", "how many calories are in {food}?",
    "what is {number} plus {other}?", "what is {number} times {other}?", "is {number} a prime number?",
    "send an email to {name}", "call {name}", "remind {name} to buy {food}", "what did {name} say?",
    "who invented the {device}?", "how does a {device} work?", "what does a new {device} cost?",
    "my neighbour has a nice {device}", "write a poem about a {device}", "I dreamt about a {device}",
    "what is the best colour for a {place}?", "how big is an average {place}?", "I love our {place}",
    "do {animal} like a warm {place}?", "my cousin painted the {place}", "is {city} in {country}?",
    "good morning, how are you?", "are you a robot?", "what is your name?", "sing me a song", "I am bored",
    "do you like me?", "what should I wear today?", "never mind", "thank you very much", "who are you?",
)  # fmt: skip
FILLERS = {
    "country": ("France", "Japan", "Kenya", "Brazil", "Norway", "India", "Peru", "Greece", "Vietnam"),
    "city": ("Berlin", "Tokyo", "Nairobi", "Lima", "Oslo", "Toronto", "Mumbai", "Athens", "Madrid", "Hanoi"),
    "book": ("Hamlet", "Dracula", "Emma", "Moby Dick", "Frankenstein", "Don Quixote", "Ulysses", "Dune"),
    "animal": ("cats", "dogs", "penguins", "elephants", "spiders", "horses", "owls", "turtles"),
    "food": ("pizza", "soup", "bread", "noodles", "rice", "salad", "pancakes", "curry", "apple pie"),
    "language": ("Spanish", "German", "Italian", "Swahili", "Dutch", "Korean", "Polish"),
    "name": ("Anna", "Ben", "Chloe", "David", "Emily", "Frank", "Grace", "my mother", "my boss"),
    "device": tuple(name for names in DEVICES.values() for name in names if name[-1] not in "sc"),
    "place": ROOMS,
    "number": tuple(str(number) for number in range(2, 40)),
    "other": tuple(str(number) for number in range(2, 90)),
}


@dataclass(frozen=True)
class Example:
    """A row, and the combination that must not be in two sets: phrasing and room, or phrasing, value and
    time."""

    text: str
    answer: dict[str, str | None]
    combination: tuple[str | None, ...]

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The row as a conversation."""
        answer = json.dumps(self.answer, separators=(",", ":"))
        question = {"role": "user", "content": self.text}
        return {"messages": [question, {"role": "assistant", "content": answer}]}


def build() -> dict[str, list[Example]]:
    """All examples by set, the same ones each time."""
    rng = random.Random(SEED)
    sets: dict[str, list[Example]] = {}
    texts: set[str] = set()
    taken: set[tuple[str | None, ...]] = set()  # combinations of the sets that are finished
    for name, size in SIZES.items():
        examples: list[Example] = []
        while len(examples) < size:
            example = refused(rng) if rng.random() < REFUSED_SHARE else command(rng)
            if example.text.lower() not in texts and example.combination not in taken:
                texts.add(example.text.lower())
                examples.append(example)
        taken |= {example.combination for example in examples}
        sets[name] = examples
    return sets


def command(rng: random.Random) -> Example:
    """A command, said in one of many ways."""
    intent = rng.choice(INTENTS)
    device = rng.choice(intent.devices)
    polite = not intent.wishes or rng.random() < 0.75
    phrasing = rng.choice(intent.orders if polite else intent.wishes)
    phrasing = phrasing.replace("{device}", rng.choice(DEVICES[device]))
    room = rng.choice(ROOMS) if "{room}" in phrasing else None
    value = rng.choice(intent.values) if intent.values else None
    time = some_time(rng) if rng.random() < 0.5 else None

    text = phrasing.format(room=room, value=value)
    before, after = (rng.choice(BEFORE), rng.choice(AFTER)) if polite else ("", "")
    # A room or a time that opens the sentence stays in lower case, so that it can be copied as it stands.
    lower = text.startswith(str(room))
    if time is None:
        text = f"{before}{text}{after}"
    elif not before and not after and rng.random() < 0.3:
        text, lower = f"{time} {text}", True
    else:
        text = f"{before}{text} {time}{after}"
    if not lower and rng.random() < 0.6:
        end = "?" if before in ("could you ", "can you ", "would you ") else rng.choice((".", ""))
        text = text[0].upper() + text[1:] + end

    answer = {"device": device, "room": room, "action": intent.action, "value": value, "time": time}
    return Example(text, answer, (phrasing, room) if room else (phrasing, value, time))


def some_time(rng: random.Random) -> str:
    """A time, as people say it."""
    hour, minute = rng.randint(1, 12), rng.randint(0, 59)
    return rng.choice(
        (
            f"at {hour} {rng.choice(('am', 'pm'))}",
            f"at {hour}:{minute:02d}",
            f"at {hour}:{minute:02d} {rng.choice(('am', 'pm'))}",
            f"in {rng.randint(2, 59)} minutes",
            f"in {rng.randint(2, 12)} hours",
            rng.choice(FIXED_TIMES),
            rng.choice(FIXED_TIMES),
        )
    )


def refused(rng: random.Random) -> Example:
    """Something that is no home command, some of it about homes."""
    text = rng.choice(REFUSED).format(**{slot: rng.choice(words) for slot, words in FILLERS.items()})
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return Example(text, dict(REFUSAL), (text.lower(),))


def main(folder: Path) -> None:
    """Write the three sets."""
    for name, examples in build().items():
        text = "".join(json.dumps(example.row()) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
