"""The demo model's training text: dialogues about little stories, made from templates.

A story is a list of statements. Each statement comes from a ``Kind``, which knows several ways to say one
thing and the questions that it answers. Facts are drawn at random from wide lists, so the only way to answer
a question is to look the fact up in the conversation. The same templates read a story back
(``read_facts``): that is how the model's own stories are turned into questions with known answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from tidegate.engine.demo import phrases, words

BEGIN, USER, ASSISTANT, END = "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"

Message = dict[str, str]
"""``{"role": "user" | "assistant", "content": text}``, as chat templates take it."""


def render(messages: list[Message]) -> str:
    """The text of a dialogue, markers included. Earlier turns are an exact prefix of later ones."""
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in messages)
    return BEGIN + "".join(turns)


def _sentence(template: str, slots: Mapping[str, str]) -> str:
    """Fill a template; mend "a apple" and the first letter."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format_map(slots))
    return text[0].upper() + text[1:]


@dataclass
class Facts:
    """What a story has said so far."""

    slots: dict[str, str]
    kinds: list[str] = field(default_factory=list)

    def by_name(self) -> dict[str, str]:
        """The hero's two mention slots, by name."""
        return {"s": self.slots["hero"], "poss": self.slots["hero"] + "'s"}

    def by_pronoun(self) -> dict[str, str]:
        """The same by pronoun; by name where the pronoun is not known."""
        if "he" not in self.slots:
            return self.by_name()
        return {"s": self.slots["he"], "poss": self.slots["his"]}


def ask(
    facts: Facts, asks: tuple[phrases.Ask, ...], tense: Mapping[str, str], rng: Random
) -> tuple[str, str] | None:
    """A question about these facts and its one right answer; None if the drawn pair names an unknown slot.

    The question alone settles the form of the answer: it follows the question's tense (present, if that shows
    none) and its way of mentioning the hero (by name, if it mentions none).
    """
    asked = rng.choice(asks)
    question = rng.choice(asked.questions)
    if not any(f"{{{verb}}}" in question for verb in phrases.VERBS):
        tense = phrases.PRESENT
    if "{s}" in question or "{poss}" in question:
        mention = facts.by_name() if rng.random() < 0.5 else facts.by_pronoun()
    else:
        mention = facts.by_pronoun() if "{him}" in question or "{his}" in question else facts.by_name()
    slots = {**facts.slots, **tense, **mention}
    try:
        return _sentence(question, slots), _sentence(asked.answer, slots)
    except KeyError:
        return None


def ask_about_story(facts: Facts, rng: Random, *, past: bool = False) -> tuple[str, str] | None:
    """Draw a question about anything that the story said."""
    kind = rng.choice(facts.kinds)
    return ask(facts, phrases.KINDS[kind].asks, phrases.PAST if past else phrases.PRESENT, rng)


# --- reading a story back -----------------------------------------------------------------------------------

_NAME = "[A-Z][a-z]+"
_ANY = "[a-z][a-z -]*?"
_SPOT = f"(?:{'|'.join(words.NEAR)}) the [a-z]+ [a-z]+"
_COLOUR = "|".join(sorted(words.COLOURS, key=len, reverse=True))
_SLOT_PATTERNS = (
    dict.fromkeys(("hero", "friend", "helper", "petname", "town", "day"), _NAME)
    | dict.fromkeys(("spot", "homespot", "prizespot"), f"(?i:{_SPOT})")
    | dict.fromkeys(("colour", "petcolour", "doorcolour"), _COLOUR)
    | dict.fromkeys(("size", "thing", "job", "friendjob", "helperjob", "pet", "count", "lost"), "[a-z]+")
    | {verb: f"{present}|{phrases.PAST[verb]}" for verb, present in phrases.PRESENT.items()}
    | {
        "s": f"{_NAME}|she|he",
        "poss": f"{_NAME}'s|Her|His|her|his",
        "his": "her|his",
        "him": "her|him",
        "they": "They|She|He|they|she|he",
        "them": "them|her|him",
    }
)
_GENDERS = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
}


def _pattern(template: str) -> re.Pattern[str]:
    pieces = []
    for piece in re.split(r"(\{\w+\})", template[0].upper() + template[1:]):
        if piece.startswith("{"):
            slot = piece[1:-1]
            pieces.append(f"(?P<{slot}>{_SLOT_PATTERNS.get(slot, _ANY)})")
        else:
            pieces.append(re.sub(r"\b([Aa]) ", r"\1n? ", re.escape(piece).replace(r"\ ", " ")))
    return re.compile("".join(pieces))


_PATTERNS = [
    (name, _pattern(template)) for name, kind in phrases.KINDS.items() for template in kind.opens + kind.says
]


def read_facts(story: str) -> Facts | None:
    """Read a story's facts from its text; None if it says nothing, or two different things about one fact."""
    facts = Facts({})
    for sentence in re.split(r"(?<=[.])\s+", story.strip()):
        for name, pattern in _PATTERNS:
            match = pattern.fullmatch(sentence)
            if match is None:
                continue
            for slot, text in _facts_in(match.groupdict()):
                if facts.slots.setdefault(slot, text) != text:
                    return None
            facts.kinds.append(name)
            break
    return facts if facts.kinds and "hero" in facts.slots else None


def _facts_in(found: dict[str, str]) -> Iterator[tuple[str, str]]:
    for slot, text in found.items():
        if slot in phrases.PRESENT:
            continue
        if slot in ("s", "poss"):
            name = text.removesuffix("'s")
            gender = {"she": "she", "her": "she", "he": "he", "his": "he"}.get(name.lower())
            if gender is None:
                yield "hero", name
            else:
                yield from _GENDERS[gender].items()
        elif _SLOT_PATTERNS.get(slot) == _NAME:
            yield slot, text
        else:
            yield slot, text[0].lower() + text[1:]


# --- making a story -----------------------------------------------------------------------------------------


def made_up_word(rng: Random) -> str:
    """A word that no list holds, so that copying is learnt letter by letter too."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    word = "".join(rng.choice(words.ONSETS) + rng.choice(words.VOWELS) for _ in range(syllables))
    return word + rng.choice(words.CODAS)


def _made_up_name(rng: Random) -> str:
    return (rng.choice(words.ONSETS) + rng.choice(words.VOWELS) + rng.choice(words.ONSETS)).capitalize() + (
        rng.choice(words.NAME_ENDS)
    )


def _town(rng: Random) -> str:
    return (rng.choice(words.ONSETS) + rng.choice(words.VOWELS)).capitalize() + (
        rng.choice(words.CODAS) + rng.choice(words.TOWN_ENDS)
    )


LEANING = 0.4
"""How often a fact is the topic's favourite. Without favourites all names are equally likely, and the most
likely story, which greedy decoding tells, is the same one about everything."""


class Story:
    """A story being told: its facts, drawn up front, and which of them have been said."""

    def __init__(
        self,
        rng: Random,
        topic: str = "",
        opening: tuple[str, ...] = (),
        pinned: Mapping[str, str] | None = None,
    ) -> None:
        """``opening``: the kinds to tell first; ``pinned``: facts that the request has settled."""
        self._rng = rng
        self._topic = topic if topic in _KNOWN_TOPICS else topic[:1]
        self._opening = opening
        self.past = rng.random() < 0.35
        pinned = dict(pinned or {})
        gender = pinned.get("he") or self._pick("gender", ["she", "he"])
        self._companion = rng.random() < 0.5
        slots = self._draw(gender) | pinned
        while len({slots["hero"], slots["friend"], slots["helper"]}) < 3:
            slots = self._draw(gender) | pinned
        they, them = ("they", "them") if self._companion else (slots["he"], slots["him"])
        self.facts = Facts({**slots, "they": they, "them": them})
        self._by_name = True

    def _pick(self, slot: str, listed: list[str]) -> str:
        """Draw from a list, leaning towards the topic's favourite."""
        if self._rng.random() < LEANING:
            return listed[crc32(f"{self._topic}/{slot}".encode()) % len(listed)]
        return self._rng.choice(listed)

    def _name(self, slot: str, names: list[str]) -> str:
        return _made_up_name(self._rng) if self._rng.random() < 0.08 else self._pick(slot, names)

    def _place(self, slot: str) -> str:
        return f"{self._pick(slot + '/word', words.PLACE_WORDS)} {self._pick(slot, words.PLACES)}"

    def _spot(self, slot: str) -> str:
        return f"{self._pick(slot + '/near', words.NEAR)} the {self._place(slot)}"

    def _food(self, slot: str) -> str:
        kind, food = self._pick(slot + "/word", words.FOOD_WORDS), self._pick(slot, words.FOODS)
        return f"{kind} {food} with {self._pick(slot + '/with', words.WITHS)}"

    def _draw(self, gender: str) -> dict[str, str]:
        pick = self._pick
        names = {"she": words.HER_NAMES, "he": words.HIS_NAMES}
        relations = {"she": words.HER_RELATIONS, "he": words.HIS_RELATIONS}
        friend_gender, helper_gender = (
            pick("friend/gender", ["she", "he"]),
            pick("helper/gender", ["she", "he"]),
        )
        age = pick("tens", words.AGE_TENS)
        return _GENDERS[gender] | {
            "hero": self._name("hero", names[gender]),
            "friend": self._name("friend", names[friend_gender]),
            "helper": self._name("helper", names[helper_gender]),
            "job": pick("job", words.JOBS),
            "friendjob": pick("friendjob", words.JOBS),
            "helperjob": pick("helperjob", words.JOBS),
            "relation": pick("relation", relations[friend_gender]),
            "size": pick("size", words.SIZES),
            "colour": pick("colour", words.COLOURS),
            "petcolour": pick("petcolour", words.COLOURS),
            "doorcolour": pick("doorcolour", words.COLOURS),
            "thing": pick("thing", words.THINGS),
            "spot": self._spot("spot"),
            "house": pick("house", words.HOUSES),
            "homespot": self._spot("homespot"),
            "town": _town(self._rng),
            "pet": pick("pet", words.ANIMALS),
            "petname": self._name("petname", words.PET_NAMES),
            "hobby": pick("hobby", words.HOBBIES),
            "breakfast": self._food("breakfast"),
            "fear": pick("fear", words.FEARS),
            "age": age if self._rng.random() < 0.2 else f"{age}-{pick('ones', words.AGE_ONES)}",
            "day": pick("day", words.DAYS),
            "weather": pick("weather", words.WEATHERS),
            "time": pick("time", words.CLOCK),
            "dest": self._place("dest"),
            "count": pick("count", words.COUNTS),
            "seen": pick("seen", words.MANY),
            "lost": pick("lost", words.LOSABLE),
            "prize": f"{pick('material', words.MATERIALS)} {pick('prize', words.TREASURES)}",
            "prizespot": self._spot("prizespot"),
            "meal": self._food("meal"),
            "gift": pick("gift", words.GIFTS),
            "later": pick("later", words.PARTS_OF_DAY),
            "feeling": pick("feeling", words.FEELINGS),
        }

    def tell(self, descriptions: int, events: int, fillers: int = 0) -> str:
        """Go on with up to so many statements of either part; "" when all has been told."""
        sentences = []
        if not self.facts.kinds:
            sentences = [self._say(kind) for kind in self._opening]
            descriptions -= len(sentences)
        told = [self._say(kind) for kind in self._next(phrases.DESCRIPTIONS, descriptions)]
        sentences += self._mixed(told, fillers // 3)
        happened = [self._say(kind) for kind in self._next(phrases.EVENTS, events)]
        happened = self._mixed(happened, fillers - fillers // 3)
        if fillers:
            happened.append(self._rng.choice(phrases.ENDINGS))
        return ("\n\n" if fillers else " ").join(" ".join(part) for part in (sentences, happened) if part)

    def _mixed(self, sentences: list[str], fillers: int) -> list[str]:
        mixed = list(sentences)
        for filler in self._rng.sample(phrases.FILLERS, fillers):
            if self._rng.random() < 0.4:
                air, verb, place = map(self._rng.choice, (words.AIRS, words.AIR_VERBS, words.AIR_PLACES))
                filler = f"{air} {verb} {place}."
            mixed.insert(self._rng.randint(1, max(1, len(mixed))), filler)
        return mixed

    def _next(self, pool: dict[str, phrases.Kind], count: int) -> list[str]:
        """Choose kinds not told yet; descriptions in any order, events in theirs."""
        untold = [kind for kind in pool if kind not in self.facts.kinds]
        if not self._companion and "along" in untold:
            untold.remove("along")
        if not untold or count <= 0:
            return []
        if self._rng.random() < LEANING:
            untold.sort(key=lambda kind: crc32(f"{self._topic}/{kind}".encode()))
        else:
            self._rng.shuffle(untold)
        chosen = untold[:count]
        if pool is phrases.EVENTS:
            if self._companion and "along" in untold and "along" not in chosen:
                chosen.append("along")
            chosen.sort(key=list(pool).index)
        ordered: list[str] = []
        for kind in chosen:
            missing = [need for need in phrases.KINDS[kind].needs if need not in self.facts.kinds + ordered]
            ordered += [*missing, kind]
        return list(dict.fromkeys(ordered))

    def _say(self, kind: str) -> str:
        first = not self.facts.kinds
        templates = (
            phrases.KINDS[kind].opens * 2 + phrases.KINDS[kind].says if first else phrases.KINDS[kind].says
        )
        template = self._rng.choice(templates)
        if template.startswith("Once upon a time"):
            self.past = True
        # After a sentence about somebody else, a pronoun would point at the wrong person.
        by_name = self._by_name or self._rng.random() < 0.25
        mention = self.facts.by_name() if by_name else self.facts.by_pronoun()
        self._by_name = kind in ("friend", "along", "helper", "reward") or (
            first and "{hero}" not in template
        )
        self.facts.kinds.append(kind)
        return _sentence(
            template, {**self.facts.slots, **(phrases.PAST if self.past else phrases.PRESENT), **mention}
        )


# --- what users say -----------------------------------------------------------------------------------------


def _casual(text: str, rng: Random) -> str:
    """People do not type like books: loosen case, punctuation and spelling here and there."""
    if rng.random() < 0.12:
        text = text.replace("colour", "color")
    if rng.random() < 0.15:
        text = re.sub(r"^(What|Who|Where) is\b", r"\1's", text)
    if rng.random() < 0.05:
        at = rng.randrange(len(text))
        text = text[:at] + text[at + 1 :]
    draw = rng.random()
    if draw < 0.25:
        text = text.lower()
    elif draw < 0.35 and text:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.25:
        text = text.rstrip(".?!")
    return text or "?"


_KNOWN_TOPICS = frozenset(
    [title for title, _ in words.TITLES]
    + words.THINGS
    + words.ANIMALS
    + words.JOBS
    + words.PLACES
    + words.FOODS
    + words.HER_NAMES
    + words.HIS_NAMES
)


@dataclass(frozen=True)
class _Topic:
    """What a story shall be about."""

    about: str
    """The user's words."""
    key: str
    """The word that matters."""
    opening: tuple[str, ...]
    """The kinds to tell first."""
    pinned: dict[str, str]
    """The facts that the words settle."""


def _thing_topic(rng: Random) -> _Topic:
    thing = made_up_word(rng) if rng.random() < 0.3 else rng.choice(words.THINGS)
    colour, size = rng.choice(words.COLOURS), rng.choice(words.SIZES)
    about, more = rng.choice(
        (
            (f"a {thing}", {}),
            (f"a {thing}", {}),
            (f"a {thing}", {}),
            (f"the {thing}", {}),
            (f"{thing}s", {}),
            (f"a {colour} {thing}", {"colour": colour}),
            (f"a {size} {thing}", {"size": size}),
        )
    )
    return _Topic(about, thing, ("owns",), {"thing": thing, **more})


def _pet_topic(rng: Random) -> _Topic:
    pet, colour, name = rng.choice(words.ANIMALS), rng.choice(words.COLOURS), _any_name(rng, words.PET_NAMES)
    about, more = rng.choice(
        (
            (f"a {pet}", {}),
            (f"a {pet}", {}),
            (f"{pet}s", {}),
            (f"a {colour} {pet}", {"petcolour": colour}),
            (f"a {pet} called {name}", {"petname": name}),
            (f"a {pet} named {name}", {"petname": name}),
        )
    )
    return _Topic(about, pet, ("pet",), {"pet": pet, **more})


def _person_topic(rng: Random) -> _Topic:
    gender = rng.choice(("she", "he"))
    name = _any_name(rng, words.HER_NAMES if gender == "she" else words.HIS_NAMES)
    job, called = rng.choice(words.JOBS), rng.choice(("called", "named"))
    person = {"hero": name, **_GENDERS[gender]}
    draw = rng.random()
    if draw < 0.4:
        return _Topic(f"a {job}", job, ("job",), {"job": job})
    if draw < 0.5:
        title, gender = rng.choice(words.TITLES)
        return _Topic(f"a {title}", title, ("job",), {"job": title, **_GENDERS[gender]})
    if draw < 0.65:
        return _Topic(f"a {job} {called} {name}", job, ("job",), {"job": job, **person})
    who = rng.choice(("girl", "woman") if gender == "she" else ("boy", "man"))
    about = name if rng.random() < 0.6 else f"a {who} {called} {name}"
    return _Topic(about, name, (rng.choice(("job", "owns", "pet", "home")),), person)


def _place_topic(rng: Random) -> _Topic:
    place = rng.choice(words.PLACES)
    spot = f"{rng.choice(words.NEAR)} the {rng.choice(words.PLACE_WORDS)} {place}"
    return _Topic(f"{rng.choice(('a', 'the'))} {place}", place, ("home",), {"homespot": spot})


def _food_topic(rng: Random) -> _Topic:
    food = rng.choice(words.FOODS)
    meal = f"{rng.choice(words.FOOD_WORDS)} {food} with {rng.choice(words.WITHS)}"
    return _Topic(food, food, ("breakfast",), {"breakfast": meal})


def _double_topic(rng: Random) -> _Topic:
    listed = {"thing": words.THINGS, "pet": words.ANIMALS, "job": words.JOBS}
    first, second = rng.sample(list(listed), 2)
    pinned = {slot: rng.choice(listed[slot]) for slot in (first, second)}
    opening = tuple("owns" if slot == "thing" else slot for slot in pinned)
    return _Topic(f"a {pinned[first]} and a {pinned[second]}", pinned[first], opening, pinned)


_TOPICS = (
    *(_thing_topic,) * 6,
    *(_pet_topic,) * 4,
    *(_person_topic,) * 4,
    _place_topic,
    _food_topic,
    _double_topic,
)


def _any_name(rng: Random, names: list[str]) -> str:
    """Users choose names that no list holds as often as ones that a list does."""
    return _made_up_name(rng) if rng.random() < 0.5 else rng.choice(names)


def story_request(rng: Random, *, length: str | None = None) -> tuple[str, Story, str]:
    """A request for a story, the story, and its first part.

    ``length`` is "", "short " or "long "; drawn by chance if None.
    """
    if length is None:
        length = rng.choice(("", "", "", "short ", "long "))
    if rng.random() < 0.1:
        template = rng.choice(phrases.ANY_STORY_REQUESTS)
        topic = _Topic("", "", (rng.choice(("job", "owns", "pet", "home", "breakfast")),), {})
    else:
        template = rng.choice(phrases.STORY_REQUESTS)
        topic = rng.choice(_TOPICS)(rng)
    request = _sentence(template, {"length": length, "about": topic.about})
    story = Story(rng, topic.key, topic.opening, topic.pinned)
    if length == "long " and "{length}" in template:
        told = story.tell(rng.randint(6, 9), rng.randint(8, 12), rng.randint(3, 8))
    elif length == "short " and "{length}" in template:
        told = story.tell(rng.randint(2, 3), rng.randint(0, 2))
    else:
        told = story.tell(rng.randint(2, 5), rng.choice((0, 0, 2, 3, 4, 5)))
    return request, story, told


def _joined(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    """Two questions in one breath, with both answers."""
    question = f"{first[0].rstrip('.?')} and {second[0][0].lower()}{second[0][1:]}"
    return question, f"{first[1]} {second[1]}"


class _Dialogue:
    """A conversation being written, turn by turn."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.messages: list[Message] = []
        self._story: Story | None = None
        self._user_facts: list[tuple[str, str]] = []

    def say(self, user: str, assistant: str) -> None:
        self.messages.append({"role": "user", "content": _casual(user, self._rng)})
        self.messages.append({"role": "assistant", "content": assistant})

    def tell_story(self) -> None:
        request, self._story, told = story_request(self._rng)
        self.say(request, told)

    def exchange(self, talk: tuple[tuple[tuple[str, ...], str], ...]) -> None:
        questions, answer = self._rng.choice(talk)
        self.say(self._rng.choice(questions), answer)

    def off_topic(self) -> None:
        slots = Story(self._rng).facts.slots
        self.say(_sentence(self._rng.choice(phrases.OFF_TOPIC), slots), phrases.OFF_TOPIC_ANSWER)

    def user_fact(self) -> None:
        slots = Story(self._rng).facts.slots
        slots |= {
            "hero": _any_name(self._rng, words.HER_NAMES + words.HIS_NAMES),
            "petname": _any_name(self._rng, words.PET_NAMES),
            "word": made_up_word(self._rng),
        }
        statement, reply, question, answer = self._rng.choice(phrases.USER_FACTS)
        self.say(_sentence(statement, slots), _sentence(reply, slots))
        # A later statement may overtake an earlier one; only the latest answer holds.
        question = _sentence(question, slots)
        self._user_facts = [pair for pair in self._user_facts if pair[0] != question]
        self._user_facts.append((question, _sentence(answer, slots)))

    def echo(self) -> None:
        said = " ".join(made_up_word(self._rng) for _ in range(self._rng.randint(1, 4)))
        if self._rng.random() < 0.5:
            said = self._rng.choice(phrases.FILLERS).rstrip(".")
        template = self._rng.choice(("Repeat after me: {}", "Say: {}", "Please repeat: {}"))
        self.messages.append({"role": "user", "content": template.format(said)})
        self.messages.append({"role": "assistant", "content": said})

    def follow_up(self) -> None:
        """One more turn about what has been said."""
        draw = self._rng.random()
        if self._story is None or draw < 0.03:
            self.tell_story()
        elif draw < 0.05:
            self.exchange(phrases.THANKS)
        elif self._user_facts and draw < 0.2:
            self.say(*self._rng.choice(self._user_facts))
        elif pair := self._about(self._story):
            self.say(*pair)

    def _about(self, story: Story) -> tuple[str, str] | None:
        rng, facts = self._rng, story.facts
        past = rng.random() < (0.6 if story.past else 0.12)
        tense = phrases.PAST if past else phrases.PRESENT
        draw = rng.random()
        if draw < 0.68:
            return ask_about_story(facts, rng, past=past)
        if draw < 0.72:
            first, second = (ask_about_story(facts, rng, past=past) for _ in range(2))
            return _joined(first, second) if first and second else None
        if draw < 0.78:
            return self._yes_or_no(facts, tense)
        if draw < 0.82:
            return ask(facts, phrases.ABOUT, tense, rng)
        if draw < 0.87:
            if rng.random() < 0.2:
                return ask(facts, phrases.WHYS, tense, rng)
            untold = [kind for kind in phrases.KINDS if kind not in facts.kinds]
            pair = ask(facts, phrases.KINDS[rng.choice(untold)].asks, tense, rng) if untold else None
            return (pair[0], phrases.UNSAID) if pair else None
        if draw < 0.97:
            more = story.tell(rng.randint(0, 3), rng.randint(1, 5))
            return rng.choice(phrases.MORE_REQUESTS), more or "That is the end of the story."
        last = self.messages[-1]["content"]
        return rng.choice(("Say that again.", "Please repeat that.", "What did you say?")), last

    def _yes_or_no(self, facts: Facts, tense: Mapping[str, str]) -> tuple[str, str] | None:
        rng = self._rng
        choices = [
            (noun, slot, listed)
            for kind, noun, slot, listed in (
                ("owns", "the {thing}", "colour", words.COLOURS),
                ("pet", "the {pet}", "petcolour", words.COLOURS),
                ("door", "the door", "doorcolour", words.COLOURS),
                ("job", "{hero}", "job", words.JOBS),
            )
            if kind in facts.kinds
        ]
        if not choices:
            return None
        noun, slot, listed = rng.choice(choices)
        article = "a " if slot == "job" else ""
        guess = facts.slots[slot] if rng.random() < 0.5 else rng.choice(listed)
        yes = "Yes" if guess == facts.slots[slot] else "No"
        slots = {**facts.slots, **tense, "guess": guess}
        question = _sentence(f"{{is}} {noun} {article}{{guess}}?", slots)
        return question, _sentence(f"{yes}, {noun} {{is}} {article}{{{slot}}}.", slots)


def dialogue(rng: Random) -> list[Message]:
    """A conversation of two to six turns, mostly of many; now and then a long one of up to sixteen."""
    talk = _Dialogue(rng)
    turns = rng.randint(8, 16) if rng.random() < 0.1 else rng.choice((2, 3, 4, 5, 5, 6, 6, 6))
    if rng.random() < 0.1:
        talk.exchange(phrases.SMALL_TALK)
    if rng.random() < 0.2:
        talk.user_fact()
    if rng.random() < 0.04:
        talk.off_topic()
    if rng.random() < 0.04:
        talk.echo()
    if rng.random() < 0.94:
        talk.tell_story()
    while len(talk.messages) < 2 * turns:
        rare = rng.random()
        if rare < 0.02:
            talk.off_topic()
        elif rare < 0.04:
            talk.user_fact()
        else:
            talk.follow_up()
    return talk.messages


def document(rng: Random) -> str:
    """One training document: mostly a dialogue, else a bare story for prompts without a chat."""
    if rng.random() < 0.05:
        return BEGIN + story_request(rng, length="long ")[2] + END
    return render(dialogue(rng))
