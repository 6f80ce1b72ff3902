"""The words of the evaluation: RULER's for models that read English, and those of a tiny model trained to recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Templates of one task. `message` has {context} and {key}, `needle` {key} and {value}.

    `reply_start` (with {key} and {count}, the number of references) is what the model's reply is made to begin with.
    """

    needle: str
    message: str
    reply_start: str = ""


@dataclass(frozen=True)
class Language:
    """Words to make haystacks of. A filler sentence takes one part of each slot of `filler`.

    `padding`: what may follow the last sentence to reach an exact number of tokens, costly units first.
    A reply may be as long as its references joined by `between`, and `spare_reply` tokens more.
    `chat`: asked through a chat template if there is one. `markers`: words that tell a vocabulary of this language.
    """

    name: str
    wordings: Mapping[str, Wording]
    keys: Sequence[str]
    values: Sequence[object]
    values_per_needle: int
    filler: tuple[Sequence[str], ...]
    padding: tuple[str, ...] = ()
    between: str = " "
    spare_reply: int = 0
    chat: bool = False
    markers: tuple[str, ...] = ()


_SUBJECTS = """The old gardener|A young teacher|The tired captain|Our neighbour|The village baker|A quiet student
The tall carpenter|My cousin|The night watchman|A travelling merchant|The museum guide|The postman|A retired doctor
The choir|A flock of sparrows|The ferryman|Her grandmother|The mountain guide|A stray cat|The young violinist
The miller|A group of hikers|The librarian|The lighthouse keeper"""
_ACTIONS = """carried a basket of apples|waited for the train|painted the garden fence|read a long letter
repaired the clock|crossed the wooden bridge|sang an old song|watched the clouds|sold fresh bread|counted the boats
looked for a lost glove|planted a row of tulips|told a story about the sea|drank a cup of tea
wrote a note to a friend|listened to the rain|swept the steps|followed the narrow path|mended a fishing net
lit the lamps|closed the shutters|borrowed a ladder|drew a map of the valley|boiled some potatoes|rang the bell
polished the silver|fed the horses|gathered dry wood|opened a window|bought a new hat|rested under the oak
walked around the lake"""
_CIRCUMSTANCES = """in the early morning.|before the shops opened.|near the harbour.|after a long winter.
behind the church.|on the way to the market.|without saying a word.|while the children played.
at the edge of the forest.|late in the evening.|on a windy afternoon.|at the end of the street.|under a grey sky.
between two meetings.|as the snow began to fall.|for the second time that week.|in spite of the heat.
next to the fountain.|with great patience.|far from the city.|during the summer holidays.|in the light of a candle.
because there was nothing else to do.|and then went home."""
_ADJECTIVES = """ancient bitter brave brisk calm clever cosmic crisp curious daring distant eager faint fancy fierce
gentle golden grand hollow honest humble icy jolly keen lively lonely lucky mellow mighty modest noble odd pale
plain proud quick rapid rare rough rustic shiny silent simple sleepy smooth stern sturdy subtle tender vivid"""
_NOUNS = """anchor arrow badge balloon barrel beacon blanket bottle bucket button cabin camera candle canyon carpet
castle cherry circle comet copper cradle crystal desert dragon engine falcon feather forest garden glacier guitar
hammer island jacket jungle kettle lantern lemon magnet marble meadow mirror needle orchard paddle pepper pillow
planet rocket saddle"""


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for line in text.splitlines() for part in line.split("|"))


_NUMBERS_ARE_HIDDEN = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{context}\n"
)
_ONE_NUMBER = Wording(
    needle="One of the special magic numbers for {key} is: {value}.",
    message=_NUMBERS_ARE_HIDDEN + "What is the special magic number for {key} mentioned in the provided text?",
    reply_start="The special magic number for {key} mentioned in the provided text is",
)

# The sentences of RULER (arXiv 2404.06654, scripts/data/synthetic/constants.py), without its worked example.
ENGLISH = Language(
    name="english",
    wordings={
        "niah_single": _ONE_NUMBER,
        "niah_multikey": _ONE_NUMBER,
        "niah_multivalue": Wording(
            needle=_ONE_NUMBER.needle,
            message=_NUMBERS_ARE_HIDDEN + "What are all the special magic numbers for {key} mentioned in the provided "
            "text?",
            reply_start="The special magic numbers for {key} mentioned in the provided text are",
        ),
        "variable_tracking": Wording(
            needle="VAR {key} = {value}.",
            message="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            "{context}\nQuestion: Find all variables that are assigned the value {key} in the text above.",
            reply_start="Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
            "are assigned the value {key}, they are:",
        ),
    },
    keys=tuple(f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()),
    values=range(1_000_000, 10_000_000),
    values_per_needle=1,
    filler=(_parts(_SUBJECTS), _parts(_ACTIONS), _parts(_CIRCUMSTANCES)),
    padding=(" And so on.", " So on", " So", ".", "!"),
    between=", and ",
    spare_reply=16,
    chat=True,
)

_RECALL_PAIR = Wording(needle="mark {key} {value}", message="{context} ask {key} is")

# The task of tests/recall: one token a word, a needle is a key with two values.
RECALL = Language(
    name="recall",
    wordings=dict.fromkeys(("niah_single", "niah_multikey", "niah_multivalue"), _RECALL_PAIR),
    keys=tuple(f"k{i}" for i in range(32)),
    values=tuple(f"v{i}" for i in range(32)),
    values_per_needle=2,
    filler=(tuple(f"w{i}" for i in range(64)),),
    markers=("mark", "ask", "is", "k0", "v0"),
)

LANGUAGES = {language.name: language for language in (ENGLISH, RECALL)}
