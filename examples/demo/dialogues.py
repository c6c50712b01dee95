"""Small conversations with a single right answer per question: the demo's training and test data.

Six families. Every question has a key, and `is_held_out` splits the keys in two. Training
conversations contain no held-out key; the last question of a test conversation always has one. So
the model cannot have memorized the tested answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from sftstream.records import Conversation, Message, ToolCall, ToolCalls

CAPITALS = {
    "Austria": "Vienna",
    "Cuba": "Havana",
    "Egypt": "Cairo",
    "France": "Paris",
    "Greece": "Athens",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Spain": "Madrid",
}
CITIES = tuple(CAPITALS.values())
NAMES = ("Ada", "Ben", "Eva", "Lea", "Max", "Mia", "Sam", "Tom")
GOODS = ("bread", "cheese", "honey", "milk", "rice", "salt", "soap", "tea")
COLOURS = ("black", "blue", "green", "red", "white", "yellow")
PETS = ("cat", "dog", "horse", "parrot", "rabbit", "turtle")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SKIES = ("cloudy", "foggy", "rainy", "sunny", "windy")
UNITS = (
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("years", "months", 12),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("kilometres", "metres", 1000),
)


class Question(NamedTuple):
    """A question: `key` for the split into training and test, and the answer in every form."""

    key: str
    ask: str
    sentence: str
    value: str = ""
    as_json: str = ""


class Dialogue(NamedTuple):
    """A conversation and the keys of its questions, in order."""

    conversation: Conversation
    keys: tuple[str, ...]


FORMS: dict[str, Callable[[Question], str]] = {
    "": lambda question: question.sentence,
    "Answer in capital letters.": lambda question: question.sentence.upper(),
    "Answer with the value alone.": lambda question: question.value,
    "Answer in JSON.": lambda question: question.as_json,
}
"""System prompt ("" for none) -> form of the answers."""


def is_held_out(key: str) -> bool:
    """Return True for one key in eight, by a hash independent of seeds."""
    return hashlib.sha256(key.encode()).digest()[0] < 32


def draw(rng: Random, family: str, *, held_out: bool) -> Conversation:
    """Draw a conversation with its last question on the wanted side, all earlier ones on
    training's."""
    while True:
        conversation, keys = FAMILIES[family](rng)
        *earlier, last = map(is_held_out, keys)
        if last == held_out and not any(earlier):
            return conversation


def arithmetic(rng: Random) -> Dialogue:
    """Ask sums and differences of two-digit numbers, solved digit by digit, some chained."""
    first = _calculation(rng, rng.randint(10, 99), *CALCULATIONS)
    if rng.random() < 0.5:
        return _answered([first])
    result = int(first.value)
    if result >= 10 and rng.random() < 0.5:
        return _answered([first, _calculation(rng, result, *FOLLOW_UPS)])
    return _answered([first, _calculation(rng, rng.randint(10, 99), *CALCULATIONS)])


CALCULATIONS = (("What is {a} + {b}?", "Add {a} and {b}."), ("What is {a} - {b}?", "From {a} take {b}."))
FOLLOW_UPS = (("Now add {b}.",), ("Now take {b} away.",))


def _calculation(rng: Random, a: int, sums: Sequence[str], differences: Sequence[str]) -> Question:
    """Draw two-digit operands with a result from 0 to 99."""
    if a < 90 and rng.random() < 0.5:
        b = rng.randint(10, 99 - a)
        return _sum(a, b, rng.choice(sums).format(a=a, b=b))
    b = rng.randint(10, a)
    return _difference(a, b, rng.choice(differences).format(a=a, b=b))


def _sum(a: int, b: int, ask: str) -> Question:
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = units // 10
    steps = f"{a % 10} + {b % 10} = {units}, {a // 10} + {b // 10}{' + 1' * carry} = {tens + carry}"
    return Question(f"{a} + {b}", ask, f"{steps}, so {a} + {b} = {a + b}.", str(a + b))


def _difference(a: int, b: int, ask: str) -> Question:
    borrow = int(a % 10 < b % 10)
    units, tens = a % 10 + 10 * borrow, a // 10 - b // 10
    steps = f"{units} - {b % 10} = {units - b % 10}, {a // 10} - {b // 10}{' - 1' * borrow} = {tens - borrow}"
    return Question(f"{a} - {b}", ask, f"{steps}, so {a} - {b} = {a - b}.", str(a - b))


def conversion(rng: Random) -> Dialogue:
    """Ask conversions of units; a test asks in a phrase unseen for the number in training."""
    return _answered([_conversion(rng) for _ in range(rng.randint(1, 3))], _any_form(rng))


def _conversion(rng: Random) -> Question:
    large, small, factor = rng.choice(UNITS)
    count = rng.randint(2, 12)
    phrases = (
        f"How many {small} are {count} {large}?",
        f"Convert {count} {large} to {small}.",
        f"What are {count} {large} in {small}?",
    )
    ask, total = rng.choice(phrases), count * factor
    return Question(ask, ask, f"{count} {large} are {total} {small}.", str(total), json.dumps({small: total}))


def capital(rng: Random) -> Dialogue:
    """Ask facts; a test asks in a phrase and form unseen for the country in training."""
    form = _any_form(rng)
    return _answered([_capital(rng, form) for _ in range(rng.randint(1, 3))], form)


def _capital(rng: Random, form: str) -> Question:
    country, city = rng.choice(tuple(CAPITALS.items()))
    phrases = (
        f"What is the capital of {country}?",
        f"Which city is the capital of {country}?",
        f"Name the capital of {country}.",
    )
    ask = rng.choice(phrases)
    return Question(f"{form} {ask}", ask, f"The capital of {country} is {city}.", city, json.dumps({"capital": city}))


def lookup(rng: Random) -> Dialogue:
    """Give a short list and ask for its entries in random order."""
    heading, names, values, ask, sentence = rng.choice(TABLES)
    table = {name: rng.choice(values) for name in rng.sample(names, rng.randint(2, 3))}
    entries = f"{heading}: {', '.join(f'{name} {value}' for name, value in table.items())}."
    asked = rng.sample(sorted(table), len(table))
    questions = [Question(f"{entries} {name}", ask.format(name), sentence.format(name, table[name])) for name in asked]
    return _answered(questions, context=f"{entries} ")


TABLES: tuple[tuple[str, Sequence[str], Sequence[Any], str, str], ...] = (
    ("Prices", GOODS, range(2, 10), "What does {} cost?", "{} costs {}."),
    ("Colours", NAMES, COLOURS, "Which colour does {} like?", "{} likes {}."),
    ("Homes", NAMES, CITIES, "Where does {} live?", "{} lives in {}."),
)


def memory(rng: Random) -> Dialogue:
    """Let the user tell personal facts and ask for some in later turns."""
    name, city, colour = rng.choice(NAMES), rng.choice(CITIES), rng.choice(COLOURS)
    pets = f"{rng.randint(2, 9)} {rng.choice(PETS)}s"
    facts = (
        (f"My name is {name}.", f"Hello {name}!", "What is my name?", f"Your name is {name}."),
        (f"I live in {city}.", f"{city} is nice.", "Where do I live?", f"You live in {city}."),
        (f"I have {pets}.", f"{pets}!", "Which pets do I have?", f"You have {pets}."),
        (f"I like {colour}.", "Good choice.", "Which colour do I like?", f"You like {colour}."),
    )
    told = rng.sample(facts, rng.randint(2, 3))
    asked = rng.sample(told, rng.randint(1, 2))
    turns = [(say, reply) for say, reply, _, _ in told] + [(ask, answer) for _, _, ask, answer in asked]
    key = " ".join(say for say, *_ in told)
    return Dialogue(_conversation(turns), (key,))


class Errand(NamedTuple):
    """A request, the matching call, the tool's result and the final answer."""

    key: str
    ask: str
    tool: dict[str, Any]
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str


def tool(rng: Random) -> Dialogue:
    """Ask for a tool call with the request's words as arguments; some conversations end with the
    call."""
    errand = rng.choice((_weather, _timer, _stock))(rng)
    call = ToolCall(errand.tool["function"]["name"], errand.arguments, "call_1")
    messages = [Message("user", errand.ask), Message("assistant", tool_calls=ToolCalls((call,)))]
    if rng.random() < 0.7:
        messages += [
            Message("tool", json.dumps(errand.result), tool_call_id=call.id),
            Message("assistant", errand.answer),
        ]
    offered = tuple(tool for tool in TOOLS if tool is errand.tool or rng.random() < 0.15)
    return Dialogue(Conversation(tuple(messages), offered), (errand.key,))


def _function(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, kind in parameters.items()}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = _function("get_weather", "The weather of a city on a day", city="string", day="string")
TIMER = _function("set_timer", "Starts a timer", minutes="integer")
STOCK = _function("get_stock", "How much of a good is left in a city", good="string", city="string")
TOOLS = (WEATHER, TIMER, STOCK)


def _weather(rng: Random) -> Errand:
    city, day, degrees, sky = rng.choice(CITIES), rng.choice(DAYS), rng.randint(10, 35), rng.choice(SKIES)
    ask = rng.choice((f"How is the weather in {city} on {day}?", f"{day} in {city}: how is the weather?"))
    result = {"degrees": degrees, "sky": sky}
    answer = f"It is {sky} at {degrees} degrees."
    return Errand(f"{day} {city}", ask, WEATHER, {"city": city, "day": day}, result, answer)


def _timer(rng: Random) -> Errand:
    minutes = rng.randint(10, 99)
    ask = rng.choice((f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes."))
    answer = f"The timer is set to {minutes} minutes."
    return Errand(f"timer {minutes}", ask, TIMER, {"minutes": minutes}, {"running": True}, answer)


def _stock(rng: Random) -> Errand:
    good, city, left = rng.choice(GOODS), rng.choice(CITIES), rng.randint(10, 99)
    ask = rng.choice((f"How much {good} is left in {city}?", f"Does {city} have any {good} left?"))
    answer = f"There are {left} left."
    return Errand(f"{good} {city}", ask, STOCK, {"good": good, "city": city}, {"left": left}, answer)


def _any_form(rng: Random) -> str:
    return rng.choice(("", "", "", *FORMS))


def _answered(questions: Sequence[Question], form: str = "", context: str = "") -> Dialogue:
    """Ask the questions in turn, `context` before the first, answered in the system prompt's
    `form`."""
    first = questions[0]
    asks = [context + first.ask, *(question.ask for question in questions[1:])]
    answers = [FORMS[form](question) for question in questions]
    conversation = _conversation(list(zip(asks, answers, strict=True)), form)
    return Dialogue(conversation, tuple(question.key for question in questions))


def _conversation(turns: Sequence[tuple[str, str]], system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for ask, answer in turns:
        messages += [Message("user", ask), Message("assistant", answer)]
    return Conversation(tuple(messages))


FAMILIES: dict[str, Callable[[Random], Dialogue]] = {
    "arithmetic": arithmetic,
    "conversion": conversion,
    "capital": capital,
    "lookup": lookup,
    "memory": memory,
    "tool": tool,
}
SHARES = {"arithmetic": 26, "conversion": 14, "capital": 8, "lookup": 32, "memory": 8, "tool": 12}
"""Percent of the training conversations; harder families come more often."""
