"""What is asked while studying, and, from other templates, while evaluating."""

import random
from collections.abc import Callable, Iterator, Sequence

from ...core.types import Tokenizer

GENERIC = (
    "Summarize the text above in a few sentences.",
    "Write five quiz questions about the text, with their answers.",
    "Who or what is this text about, and what happens?",
    "Explain the main point of the text step by step.",
    "List the key facts that the text states.",
    "Rewrite the beginning of the text in simple English.",
    "Describe the setting or the subject of the text in detail.",
    "Quote the most important sentence of the text and explain it.",
    "Continue the text in the same style.",
    "Give an outline of the text with headings.",
    "Write the content of the text as structured JSON.",
    "Write a short review of the text.",
    "Which names, numbers and terms appear in the text? Explain each.",
    "What would a reader find most surprising in the text?",
    "Compare the first part of the text with the last part.",
    "Give three examples from the text and say what each shows.",
)
ABOUT = (
    'Explain this part of the text: "{passage}"',
    'Ask and answer three questions about this part: "{passage}"',
    'What comes right after this part: "{passage}"',
    'What comes before this part: "{passage}"',
    'Summarize this part: "{passage}"',
    'Who or what is meant in this part, and why: "{passage}"',
    'Which details surround this part: "{passage}"',
    'Repeat this part of the text and go on from there: "{passage}"',
    'Say in your own words: "{passage}"',
)
UNRELATED = (
    "Write a Python function that adds two matrices.",
    "What is the capital of Portugal?",
    "Translate 'good morning, my friend' into French.",
    "Explain how rain forms.",
    "Give me a recipe for tomato soup.",
    "What is 17 times 23? Explain the steps.",
    "Write a short poem about autumn.",
    "How do I tie a tie?",
    "Name five animals that live in the desert.",
    "What is the difference between a virus and a bacterium?",
    "Write an email that asks for a day off.",
    "Explain recursion to a child.",
)

HELD_OUT_GENERIC = (
    "What is the most important idea in this text?",
    "Tell me what I should remember after reading this.",
    "How does the text begin and how does it end?",
    "What problem is discussed in the text, and how is it solved?",
)
HELD_OUT_ABOUT = (
    'Why does the text say: "{passage}"?',
    'I did not understand "{passage}". Can you help?',
    'Where in the text does "{passage}" stand, and what is around it?',
    'What follows from "{passage}"?',
)
HELD_OUT_UNRELATED = (
    "Write a Python function that reverses a string.",
    "What is the capital of Italy and what is it known for?",
    "Explain photosynthesis in two sentences.",
    "Give me a recipe for pancakes.",
    "How do vaccines work?",
    "Who wrote Hamlet?",
    "Suggest a name for a small bakery.",
    "What is the boiling point of water in Fahrenheit?",
)

# What a finished fit is checked with: of neither kind above, most of them as short as what people ask.
CHECK_GENERIC = (
    "What is this text about?",
    "What happens in the middle of the text?",
    "Name the people or things that matter most in the text.",
    "How does the text end?",
)
CHECK_PHRASE = (
    'What does the text say about "{phrase}"?',
    'Who or what is "{phrase}"?',
    'When and where does "{phrase}" come up?',
    'In one sentence: what about "{phrase}"?',
)
CHECK_ABOUT = (
    'What led to this: "{passage}"?',
    'Is this in the text, and what does it tell us? "{passage}"',
    'Quote the sentences around this one: "{passage}"',
    'Go on from here, as the text does: "{passage}"',
)

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly, however many there are


def passage(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    rng: random.Random,
    at: float | None = None,
    *,
    tokens: tuple[int, int] = (20, 60),
) -> str:
    """Some of these tokens in a row, as text. at: where, in [0, 1) of the text; anywhere. tokens: how many, from and
    below."""
    length = rng.randrange(*tokens)
    room = max(1, len(ids) - length)
    start = rng.randrange(room) if at is None else int(at * room)
    return str(tokenizer.decode(ids[start : start + length], skip_special_tokens=True)).strip()


def training(passage: Callable[[random.Random, float], str], *, seed: int) -> Iterator[str]:
    """An endless mix: 12% generic, 83% about a passage, 5% that have nothing to do with the text. However few there
    are, their passages lie all over the text: drawn anywhere, they would leave a third of it out where they are
    together as long as it is."""
    rng = random.Random(seed)
    at = rng.random()
    while True:
        draw = rng.random()
        if draw < 0.05:
            yield rng.choice(UNRELATED)
        elif draw < 0.17:
            yield rng.choice(GENERIC)
        else:
            at = (at + GOLDEN) % 1
            yield rng.choice(ABOUT).format(passage=passage(rng, at))


def checking(passage: Callable[..., str], *, seed: int) -> Iterator[str]:
    """An endless mix: a quarter generic, a quarter about a phrase of a few tokens, a half about a passage."""
    rng = random.Random(seed)
    while True:
        yield rng.choice(CHECK_ABOUT).format(passage=passage(rng))
        yield rng.choice(CHECK_PHRASE).format(phrase=passage(rng, tokens=(3, 9)))
        yield rng.choice(CHECK_ABOUT).format(passage=passage(rng))
        yield rng.choice(CHECK_GENERIC)
