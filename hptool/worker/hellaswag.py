"""HellaSwag and files of its form: a context, endings to choose from, and which one is right. Knows no framework.

One JSON object a line: `ctx` (or `ctx_a` and `ctx_b`), `endings`, and `label`, the number of the right ending from 0
(Zellers et al. 2019, arXiv:1905.07830).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hptool import files
from hptool.errors import InputError
from hptool.worker.text import Tokenizer

_FEWEST_ENDINGS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A context and its endings; `label` is the right one's number."""

    context: str
    endings: Sequence[str]
    label: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A context and one ending as tokens: the last `scored` of them are the ending's."""

    tokens: Sequence[int]
    scored: int


def read_questions(path: Path) -> list[Question]:
    """All questions of a file; InputError with every line that is none."""
    questions, problems = [], []
    for number, line in enumerate(files.read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line)))
        except ValueError as error:
            said = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
            problems.append(f"{path}: line {number}: {said}")
    if problems:
        raise InputError(*problems)
    if not questions:
        raise InputError(f"{path}: empty, allowed is one question or more, each a line of JSON")
    return questions


def _question(given: Any) -> Question:
    if not isinstance(given, Mapping):
        raise ValueError(f"{type(given).__name__} given, allowed is an object with ctx, endings and label")  # noqa: TRY004 (one kind of error for a line)
    if "ctx" in given:
        context = given["ctx"]
    elif "ctx_a" in given:
        context = f"{given['ctx_a']} {given.get('ctx_b', '')}"
    else:
        raise ValueError("ctx: required key is missing (or ctx_a and ctx_b)")
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f"ctx: {context!r} given, allowed is text")
    endings = given.get("endings")
    if (
        not isinstance(endings, list)
        or len(endings) < _FEWEST_ENDINGS
        or not all(isinstance(ending, str) and ending.strip() for ending in endings)
    ):
        raise ValueError(f"endings: {endings!r} given, allowed is a list of two texts or more")
    label = given.get("label")
    # The set's own files hold the label as a number or as a word, by where they were published.
    if not isinstance(label, int | str) or str(label) not in map(str, range(len(endings))):
        raise ValueError(f"label: {label!r} given, allowed is 0 to {len(endings) - 1}")
    return Question(context=context.strip(), endings=endings, label=int(label))


def choices(questions: Sequence[Question], tokenizer: Tokenizer, seq_length: int) -> list[Choice]:
    """Each question's endings behind its context, one after the other; of what is too long, the end.

    A sample is one token longer than `seq_length`, since the first of them is not predicted.
    """
    found = []
    for question in questions:
        context = tokenizer.encode(question.context)
        for ending in question.endings:
            end = tokenizer.encode(f" {ending.strip()}")
            tokens = (context + end)[-(seq_length + 1) :]
            found.append(Choice(tokens=tokens, scored=min(len(end), len(tokens) - 1)))
    return found


def accuracy(questions: Sequence[Question], scores: Sequence[float]) -> float:
    """The part of the questions whose right ending has the highest of their scores, given in the order of `choices`."""
    right, first = 0, 0
    for question in questions:
        own = scores[first : first + len(question.endings)]
        right += max(range(len(own)), key=own.__getitem__) == question.label
        first += len(question.endings)
    return right / len(questions)
