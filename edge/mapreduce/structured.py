"""What passes between the stages: extracted information, rationale, answer and confidence, asked for and read back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NO_INFORMATION = "[NO INFORMATION]"
MOST_CONFIDENCE = 5.0
# A reply's first words, with which a model is helped to begin.
FINDING_OPENING, ANSWER_OPENING = "Extracted Information:", "Rationale:"
_FORMAT = "Extracted Information:\nRationale:\nAnswer:\nConfidence Score:"
_SCALE = (
    f"a confidence score from 0 to {MOST_CONFIDENCE:.0f}: {MOST_CONFIDENCE:.0f} if the text says it outright, about 3 "
    "if it is inferred, 0 if the text does not support it"
)
_MAP = (
    "You read one part of a longer document in order to answer a question. The part alone may not be enough.\n\n"
    "Question: {question}\n\n"
    "Do the following, from this part only:\n"
    "1. Extract the information that bears on the question.\n"
    "2. Explain in a short rationale how it answers the question, and what is inferred.\n"
    f"3. Answer the question. If the part holds nothing about it, the answer is {NO_INFORMATION}.\n"
    f"4. Give {_SCALE}.\n\n"
    "The part is from {name}:\n---\n{text}\n---\n\n"
    f"Write exactly this:\n{_FORMAT}"
)
_COLLAPSE = (
    "A document is too long to be read at once, so its parts were read one by one in order to answer a question. Here "
    "is what was found in some of them, each with an answer and a confidence score out of 5.\n\n"
    "Question: {question}\n\n{findings}\n\n"
    "Put these findings together into one:\n"
    "1. Keep all information that bears on the question; where findings contradict each other, trust the more "
    "confident.\n"
    "2. Explain in a short rationale how it answers the question.\n"
    f"3. Answer the question. If nothing found bears on it, the answer is {NO_INFORMATION}.\n"
    f"4. Give {_SCALE}.\n\n"
    f"Write exactly this:\n{_FORMAT}"
)
_REDUCE = (
    "A document is too long to be read at once, so its parts were read one by one in order to answer a question. Here "
    "is what was found in all of them, each with an answer and a confidence score out of 5. Since every part is "
    "incomplete, answers may differ: weigh them by their confidence and rationale.\n\n"
    "Question: {question}\n\n{findings}\n\n"
    f"Give the final answer, with {_SCALE}.\n\n"
    "Write exactly this:\nRationale:\nAnswer:\nConfidence Score:"
)
_HEADINGS = {
    "extracted information": "information",
    "rationale": "rationale",
    "answer": "answer",
    "final answer": "answer",
    "confidence score": "confidence",
    "confidence": "confidence",
}
# A heading may be numbered, a title or bold, and may be followed by its text.
_HEADING = re.compile(
    rf"^[ \t]*(?:[#>*_\-]+[ \t]*|\d+[.)][ \t]*)*({'|'.join(sorted(_HEADINGS, key=len, reverse=True))})"
    r"[ \t]*[*_]*[ \t]*[:：][ \t]*[*_]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(r"(\d+(?:[.,]\d+)?)\s*(%|(?:/|out\s+of)\s*(\d+(?:\.\d+)?))?", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What one reply says; `confidence` is from 0 to 5, None if it gives none, and `chunks` are what it is based on."""

    information: str
    rationale: str
    answer: str
    confidence: float | None
    chunks: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing that bears on the question was found."""
        if not self.answer:
            return not self.information
        return "no information" in self.answer.lower() and len(self.answer) <= 2 * len(NO_INFORMATION)


def parse_finding(reply: str, chunks: tuple[int, ...] = ()) -> Finding:
    """Read a reply leniently: parts in any order, repeated or missing; a reply without parts is an answer."""
    parts = dict.fromkeys(("information", "rationale", "answer", "confidence"), "")
    headings = list(_HEADING.finditer(reply))
    ends = [*(heading.start() for heading in headings[1:]), len(reply)]
    for heading, end in zip(headings, ends, strict=False):
        text = reply[heading.end() : end].strip()
        name = _HEADINGS[heading[1].lower()]
        parts[name] = "\n".join(filter(None, (parts[name], text)))
    if not headings:
        parts["answer"] = reply.strip()
    confidence = parse_confidence(parts["confidence"])
    return Finding(parts["information"], parts["rationale"], parts["answer"], confidence, chunks)


def parse_confidence(text: str) -> float | None:
    """'4', '4.5/5', '8 out of 10' or '80%' as a number from 0 to 5; None if there is no number."""
    match = _NUMBER.search(text)
    if match is None:
        return None
    most = 100.0 if match[2] == "%" else float(match[3] or MOST_CONFIDENCE)
    value = float(match[1].replace(",", ".")) / (most or 1.0) * MOST_CONFIDENCE
    return min(MOST_CONFIDENCE, value)


def map_prompt(question: str, name: str, text: str) -> str:
    """Asks what one chunk says."""
    return _MAP.format(question=question, name=name, text=text)


def collapse_prompt(question: str, findings: Sequence[Finding]) -> str:
    """Asks for one finding in the place of several."""
    return _COLLAPSE.format(question=question, findings=write_findings(findings))


def reduce_prompt(question: str, findings: Sequence[Finding]) -> str:
    """Asks for the answer."""
    return _REDUCE.format(question=question, findings=write_findings(findings))


def write_findings(findings: Sequence[Finding]) -> str:
    """Findings as the model reads them."""
    return "\n\n".join(f"Finding {i}:\n{_write(finding)}" for i, finding in enumerate(findings, 1))


def _write(finding: Finding) -> str:
    score = "not given" if finding.confidence is None else f"{finding.confidence:g}"
    return (
        f"Extracted Information: {finding.information}\nRationale: {finding.rationale}\n"
        f"Answer: {finding.answer}\nConfidence Score: {score}"
    )
