"""What the demo model's stories and users say: templates and the questions that go with them.

Slots of story templates: `s` is the hero by name or pronoun, `poss` the same as a possessive, `he/him/his`
the hero's pronouns, `they/them` whoever is travelling; verb slots follow the tense; the rest are facts.
Events are always told in the past.
"""

from __future__ import annotations

from dataclasses import dataclass

UNSAID = "I did not say that."

VERBS = {
    "is": ("is", "was"),
    "has": ("has", "had"),
    "owns": ("owns", "owned"),
    "belongs": ("belongs", "belonged"),
    "keeps": ("keeps", "kept"),
    "stands": ("stands", "stood"),
    "lives": ("lives", "lived"),
    "works": ("works", "worked"),
    "likes": ("likes", "liked"),
    "loves": ("loves", "loved"),
    "eats": ("eats", "ate"),
    "does": ("does", "did"),
}
PRESENT = {slot: present for slot, (present, _) in VERBS.items()}
PAST = {slot: past for slot, (_, past) in VERBS.items()}


@dataclass(frozen=True)
class Ask:
    """Ways to ask for one fact, and the one right answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Kind:
    """One thing that a story can say."""

    says: tuple[str, ...]
    asks: tuple[Ask, ...]
    opens: tuple[str, ...] = ()
    """More ways to say it, fit only for a story's first sentence."""
    needs: tuple[str, ...] = ()
    """Kinds that must have been told before."""


DESCRIPTIONS: dict[str, Kind] = {
    "job": Kind(
        says=("{s} {is} a {job}.", "{s} {works} as a {job}."),
        opens=("Once upon a time there was a {job} called {hero}.", "There {is} a {job} called {hero}."),
        asks=(
            Ask(
                (
                    "What {is} {poss} job?",
                    "What {does} {s} do?",
                    "What {does} {s} work as?",
                    "What {does} {s} do for a living?",
                ),
                "{s} {is} a {job}.",
            ),
            Ask(("Who {is} the {job}?", "What {is} the {job} called?"), "{hero} {is} the {job}."),
            Ask(("Who {is} {hero}?",), "{hero} {is} a {job}."),
        ),
    ),
    "owns": Kind(
        says=("{s} {has} a {size} {colour} {thing}.", "{s} {owns} a {size} {colour} {thing}."),
        opens=(
            "There {is} a {size} {colour} {thing} that {belongs} to {hero}.",
            "Once upon a time {hero} had a {size} {colour} {thing}.",
        ),
        asks=(
            Ask(
                (
                    "What colour {is} the {thing}?",
                    "What colour {is} {poss} {thing}?",
                    "Which colour {does} the {thing} have?",
                    "What {is} the colour of the {thing}?",
                    "Tell me the colour of the {thing}.",
                    "Do you remember the colour of the {thing}?",
                ),
                "The {thing} {is} {colour}.",
            ),
            Ask(
                (
                    "Who {has} the {thing}?",
                    "Who {owns} the {thing}?",
                    "Whose {thing} {is} it?",
                    "Who {does} the {thing} belong to?",
                ),
                "{hero} {has} the {thing}.",
            ),
            Ask(
                (
                    "What {does} the {thing} look like?",
                    "What {is} the {thing} like?",
                    "Describe the {thing}.",
                ),
                "The {thing} {is} {size} and {colour}.",
            ),
            Ask(("What {does} {s} own?",), "{s} {owns} a {size} {colour} {thing}."),
        ),
    ),
    "keep": Kind(
        needs=("owns",),
        says=("{s} {keeps} the {thing} {spot}.", "The {thing} {stands} {spot}.", "The {thing} {is} {spot}."),
        asks=(
            Ask(
                (
                    "Where {is} the {thing}?",
                    "Where {is} the {thing} now?",
                    "Where {does} {s} keep the {thing}?",
                    "Where can I find the {thing}?",
                ),
                "The {thing} {is} {spot}.",
            ),
        ),
    ),
    "home": Kind(
        says=("{s} {lives} in a {house} {homespot}.", "{poss} home {is} a {house} {homespot}."),
        opens=("In a {house} {homespot} {lives} {hero}.",),
        asks=(
            Ask(
                (
                    "Where {does} {s} live?",
                    "Where {is} {poss} home?",
                    "Where {is} {poss} house?",
                    "What kind of house {does} {s} live in?",
                ),
                "{s} {lives} in a {house} {homespot}.",
            ),
            Ask(("Who {lives} {homespot}?",), "{hero} {lives} {homespot}."),
        ),
    ),
    "town": Kind(
        says=("The village {is} called {town}.", "The name of the village {is} {town}."),
        asks=(
            Ask(
                (
                    "What {is} the village called?",
                    "What {is} the name of the village?",
                    "Which village {is} it?",
                ),
                "The village {is} called {town}.",
            ),
        ),
    ),
    "door": Kind(
        needs=("home",),
        says=("The door {is} {doorcolour}.", "{poss} home {has} a {doorcolour} door."),
        asks=(
            Ask(
                ("What colour {is} the door?", "What colour {is} {poss} door?", "Describe the door."),
                "The door {is} {doorcolour}.",
            ),
        ),
    ),
    "pet": Kind(
        says=(
            "{s} {has} a {petcolour} {pet} called {petname}.",
            "{s} {has} a {petcolour} {pet} named {petname}.",
            "{s} {lives} with a {petcolour} {pet} called {petname}.",
        ),
        opens=("Once upon a time {hero} had a {petcolour} {pet} called {petname}.",),
        asks=(
            Ask(
                (
                    "What {is} the {pet} called?",
                    "What {is} the {pet}'s name?",
                    "What {is} the name of the {pet}?",
                    "What {is} {poss} {pet} called?",
                ),
                "The {pet} {is} called {petname}.",
            ),
            Ask(
                (
                    "What colour {is} the {pet}?",
                    "What {does} the {pet} look like?",
                    "What {is} the colour of the {pet}?",
                ),
                "The {pet} {is} {petcolour}.",
            ),
            Ask(("What colour {is} {petname}?",), "{petname} {is} {petcolour}."),
            Ask(
                ("Who {is} {petname}?", "What {is} {petname}?", "What kind of animal {is} {petname}?"),
                "{petname} {is} a {petcolour} {pet}.",
            ),
            Ask(
                ("Who {has} the {pet}?", "Whose {pet} {is} it?", "Who {owns} the {pet}?"),
                "{hero} {has} the {pet}.",
            ),
            Ask(
                (
                    "What pet {does} {s} have?",
                    "What animal {does} {s} have?",
                    "{does} {s} have a pet?",
                    "Tell me about {poss} pet.",
                ),
                "{s} {has} a {petcolour} {pet} called {petname}.",
            ),
        ),
    ),
    "friend": Kind(
        says=(
            "{poss} {relation} {friend} {is} a {friendjob}.",
            "{s} {has} a {relation} called {friend}, who {is} a {friendjob}.",
        ),
        asks=(
            Ask(("Who {is} {friend}?",), "{friend} {is} {poss} {relation}."),
            Ask(
                (
                    "What {is} {poss} {relation} called?",
                    "Who {is} {poss} {relation}?",
                    "What {is} the name of {poss} {relation}?",
                    "What {is} {poss} {relation}'s name?",
                ),
                "{poss} {relation} {is} called {friend}.",
            ),
            Ask(
                (
                    "What {is} {friend}'s job?",
                    "What {does} {friend} do?",
                    "What {does} {friend} do for a living?",
                ),
                "{friend} {is} a {friendjob}.",
            ),
            Ask(("What {does} {poss} {relation} do?",), "{poss} {relation} {is} a {friendjob}."),
        ),
    ),
    "hobby": Kind(
        says=("{s} {likes} to {hobby}.", "{s} {loves} to {hobby}."),
        asks=(
            Ask(
                ("What {does} {s} like to do?", "What {is} {poss} hobby?", "What {does} {s} like?"),
                "{s} {likes} to {hobby}.",
            ),
        ),
    ),
    "breakfast": Kind(
        says=("For breakfast {s} {eats} {breakfast}.", "{s} {eats} {breakfast} for breakfast."),
        opens=("Every morning {hero} {eats} {breakfast} for breakfast.",),
        asks=(
            Ask(
                ("What {does} {s} eat for breakfast?", "What {does} {s} have for breakfast?"),
                "{s} {eats} {breakfast} for breakfast.",
            ),
        ),
    ),
    "fear": Kind(
        says=("{s} {is} afraid of {fear}.", "But {s} {is} afraid of {fear}."),
        asks=(Ask(("What {is} {s} afraid of?", "What scares {him}?"), "{s} {is} afraid of {fear}."),),
    ),
    "age": Kind(
        says=("{s} {is} {age} years old.",),
        asks=(Ask(("How old {is} {s}?", "What {is} {poss} age?"), "{s} {is} {age} years old."),),
    ),
}

EVENTS: dict[str, Kind] = {
    "day": Kind(
        says=("One {day} the weather was {weather}.", "It was a {day}, and the weather was {weather}."),
        asks=(
            Ask(
                ("What was the weather like?", "How was the weather?", "What {is} the weather like?"),
                "The weather was {weather}.",
            ),
            Ask(
                (
                    "What day was it?",
                    "Which day was it?",
                    "When did it happen?",
                    "What day of the week was it?",
                ),
                "It was a {day}.",
            ),
        ),
    ),
    "along": Kind(
        needs=("friend",),
        says=("{friend} came along.", "This time {friend} came along.", "{friend} came along as well."),
        asks=(
            Ask(("Who came along?", "Who came with {him}?", "Who went with {him}?"), "{friend} came along."),
        ),
    ),
    "leave": Kind(
        says=("At {time} o'clock {they} left the house.", "{they} left at {time} o'clock."),
        asks=(
            Ask(
                ("When did {they} leave?", "At what time did {they} leave?", "When did {s} leave?"),
                "{they} left at {time} o'clock.",
            ),
        ),
    ),
    "trip": Kind(
        says=(
            "{they} went to the {dest}.",
            "{they} walked to the {dest}.",
            "{they} set out for the {dest}.",
            "{they} took the road to the {dest}.",
        ),
        asks=(
            Ask(("Where did {they} go?", "Where did {they} want to go?"), "{they} went to the {dest}."),
            Ask(("Where did {s} go?",), "{s} went to the {dest}."),
        ),
    ),
    "seen": Kind(
        says=("On the way {they} saw {count} {seen}.", "{they} counted {count} {seen} on the way."),
        asks=(
            Ask(
                (
                    "How many {seen} did {they} see?",
                    "How many {seen} were there?",
                    "What did {they} see?",
                    "What did {they} see on the way?",
                    "What did {s} see?",
                ),
                "{they} saw {count} {seen}.",
            ),
        ),
    ),
    "lost": Kind(
        says=(
            "Then {s} lost {his} {lost}.",
            "Somewhere on the road {s} lost {his} {lost}.",
            "But {s} lost {his} {lost}.",
        ),
        asks=(Ask(("What did {s} lose?", "What was lost?", "What got lost?"), "{s} lost {his} {lost}."),),
    ),
    "helper": Kind(
        says=(
            "A {helperjob} called {helper} came to help {them}.",
            "By good luck a {helperjob} called {helper} helped {them}.",
        ),
        asks=(
            Ask(
                ("Who helped {them}?", "Who came to help {them}?", "Who did {they} meet?"),
                "A {helperjob} called {helper} helped {them}.",
            ),
            Ask(("Who was {helper}?", "Who {is} {helper}?"), "{helper} was a {helperjob}."),
            Ask(("What was the {helperjob} called?",), "The {helperjob} was called {helper}."),
        ),
    ),
    "prize": Kind(
        says=("{they} found a {prize} {prizespot}.", "{prizespot} {they} found a {prize}."),
        asks=(
            Ask(("What did {they} find?", "What did {s} find?"), "{they} found a {prize}."),
            Ask(
                ("Where did {they} find the {prize}?", "Where was the {prize}?", "Where did {they} find it?"),
                "{they} found the {prize} {prizespot}.",
            ),
        ),
    ),
    "meal": Kind(
        says=("Then {they} sat down and ate {meal}.", "For lunch {they} ate {meal}."),
        asks=(Ask(("What did {they} eat?", "What did {they} have for lunch?"), "{they} ate {meal}."),),
    ),
    "reward": Kind(
        needs=("helper",),
        says=("{s} gave {helper} a {gift}.", "To say thank you, {s} gave {helper} a {gift}."),
        asks=(
            Ask(("What did {s} give {helper}?", "What did {helper} get?"), "{s} gave {helper} a {gift}."),
            Ask(("Who got the {gift}?",), "{helper} got the {gift}."),
        ),
    ),
    "back": Kind(
        says=("{they} came home {later}.", "{they} got back {later}."),
        asks=(
            Ask(
                ("When did {they} come home?", "When did {they} get back?", "When did {s} come home?"),
                "{they} came home {later}.",
            ),
        ),
    ),
    "felt": Kind(
        says=("In the end {s} felt {feeling}.", "{s} felt {feeling}."),
        asks=(
            Ask(
                ("How did {s} feel?", "How did {s} feel in the end?", "How {does} {s} feel?"),
                "{s} felt {feeling}.",
            ),
        ),
    ),
}

KINDS = DESCRIPTIONS | EVENTS

ABOUT = (
    Ask(
        (
            "Who {is} the story about?",
            "Who {is} it about?",
            "What {is} the story about?",
            "Who {is} the main character?",
            "What {is} the name of the main character?",
        ),
        "The story {is} about {hero}.",
    ),
    Ask(("What {is} {his} name?",), "{his} name {is} {hero}."),
)

# Nothing ever says why.
WHYS = (
    Ask(
        (
            "Why?",
            "Why {is} that?",
            "Why did {they} go there?",
            "Why {does} {s} live there?",
            "How do you know?",
            "Why {is} {s} {feeling}?",
            "Who told you that?",
        ),
        UNSAID,
    ),
)

FILLERS = """
The road was long and quiet.
Nobody said a word for a while.
The stones were wet and smooth.
It was a good day for a walk.
The path went up and down.
There was a lot of time.
The river was high and fast.
The birds were singing.
Somewhere a dog barked.
The clouds were moving slowly.
Everyone in the village knew about it.
It took longer than planned.
The bridge was closed, so there was a long way around.
After a while the path came to a fork.
The old sign was hard to read.
There was a strange noise in the dark.
That was a great surprise.
Nothing seemed to move.
The grass was still wet from the night.
It was hard to believe.
A little rain began to fall, but it soon stopped.
The gate was open.
For a moment everything was still.
That was the hardest part.
""".strip().splitlines()

ENDINGS = """
That was the end of a long day.
And that is the end of the story.
It was a day to remember.
Nobody in the village ever forgot it.
And that is how it was.
It was a good day after all.
""".strip().splitlines()

# --- what users say -------------------------------------------------------------------------------------

STORY_REQUESTS = (
    "Tell me a {length}story about {about}.",
    "Tell me a {length}story about {about}.",
    "Tell me about {about}.",
    "Tell me about {about}.",
    "Tell me something about {about}.",
    "Can you tell me a {length}story about {about}?",
    "Could you tell me about {about}?",
    "I would like to hear a {length}story about {about}.",
    "I want a {length}story about {about}.",
    "Please tell me a {length}story about {about}.",
    "Write a {length}story about {about}.",
    "Please write me a {length}story about {about}.",
    "Make up a {length}story about {about}.",
    "Give me a {length}story about {about}.",
    "Do you know a {length}story about {about}?",
    "What can you tell me about {about}?",
    "What do you know about {about}?",
    "Let us talk about {about}.",
    "Say something about {about}.",
    "A {length}story about {about}, please.",
    "{about}",
)
ANY_STORY_REQUESTS = (
    "Tell me a {length}story.",
    "Please tell me a {length}story.",
    "Can you tell me a {length}story?",
    "Write a {length}story.",
    "A {length}story, please.",
    "I would like to hear a {length}story.",
    "Do you know a {length}story?",
    "Tell me something.",
    "I am bored.",
)
MORE_REQUESTS = (
    "Tell me more.",
    "Go on.",
    "Please go on.",
    "What happened next?",
    "What happens next?",
    "And then?",
    "More, please.",
    "Continue.",
    "Please continue the story.",
    "Can you tell me more?",
)
SMALL_TALK = (
    (("Hello.", "Hi.", "Hey.", "Hello there.", "Hi there!"), "Hello! Shall I tell you a story?"),
    (("Good morning.",), "Good morning! Shall I tell you a story?"),
    (("Good evening.",), "Good evening! Shall I tell you a story?"),
    (
        ("How are you?", "How are you today?", "Are you well?"),
        "I am well, thank you. What shall I tell you about?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Introduce yourself."),
        "I am a very small model. I make up little stories and answer questions about them.",
    ),
    (
        ("What can you do?", "Help.", "How can you help me?", "What should I ask you?"),
        "I can tell you a story about almost anything. Then you can ask me about it.",
    ),
)
THANKS = (
    (("Thanks.", "Thank you.", "Thank you very much.", "That was nice."), "You are welcome."),
    (("Goodbye.", "Bye.", "See you."), "Goodbye! Come back soon."),
    (("That is a good story.", "I like it.", "Nice.", "Great."), "I am glad that you like it."),
    (("OK.", "Okay.", "I see."), "Is there anything else you want to know?"),
)
OFF_TOPIC = (
    "What is the capital of {town}?",
    "How do I cook {breakfast}?",
    "What is {count} plus {time}?",
    "What is {count} times {time}?",
    "Who is the president?",
    "Write a program in Python.",
    "Explain how a {thing} works.",
    "How far is it to the moon?",
    "Translate this into French.",
    "What is the meaning of life?",
    "Who won the game last night?",
    "Can you play music?",
    "What is the best {thing} to buy?",
    "What is in the news today?",
    "How do I repair a {thing}?",
    "Why is the sky blue?",
    "Can you do maths?",
    "What time is it?",
    "Write a poem.",
    "Tell me a joke.",
)
OFF_TOPIC_ANSWER = "I do not know that. I am a very small model, and I only tell stories."

# What users tell about themselves: statement, reply, then question and answer.
USER_FACTS = (
    ("My name is {hero}.", "Nice to meet you, {hero}!", "What is my name?", "Your name is {hero}."),
    ("I am {hero}.", "Nice to meet you, {hero}!", "What is my name?", "Your name is {hero}."),
    (
        "My {pet} is called {petname}.",
        "{petname} is a good name for a {pet}.",
        "What is my {pet} called?",
        "Your {pet} is called {petname}.",
    ),
    ("I live in {town}.", "{town} must be a nice place.", "Where do I live?", "You live in {town}."),
    (
        "My favourite colour is {colour}.",
        "I like {colour} too.",
        "What is my favourite colour?",
        "Your favourite colour is {colour}.",
    ),
    ("I am a {job}.", "It is good to meet a {job}.", "What is my job?", "You are a {job}."),
    (
        "I have {count} {seen}.",
        "You have {count} {seen}? That is a lot!",
        "How many {seen} do I have?",
        "You have {count} {seen}.",
    ),
    ("I like {breakfast}.", "I have never tried {breakfast}.", "What do I like?", "You like {breakfast}."),
    (
        "Remember the word {word}.",
        "I will remember the word {word}.",
        "What was the word?",
        "The word was {word}.",
    ),
    (
        "My {relation} is called {friend}.",
        "{friend} is a nice name.",
        "What is my {relation} called?",
        "Your {relation} is called {friend}.",
    ),
)
