"""The rule-based mathematics reward of DAPO, which FIPO uses: the last `Answer: ...` line, normalised, compared as a string.

Two answers are equal only if their normalised strings are: `0.5` is not `1/2`. The normalisation is the one that the appendix
of Minerva (arXiv 2206.14858) gives for MATH, whose order matters: every step sees what the step before it left.
"""

import re

from megatron_fipo.tasks.problem import Problem
from megatron_fipo.tasks.score import NO_ANSWER, Score

SEARCHED_CHARACTERS = 300
"""The answer must start within the last characters of the response."""

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
"""Articles, spaces and spelling variants, replaced in this order."""

_REMOVED = (
    *(
        "square",
        "ways",
        "integers",
        "dollars",
        "mph",
        "inches",
        "hours",
        "km",
        "units",
        "\\ldots",
        "sue",
        "points",
        "feet",
    ),
    *("minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples"),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
"""Units and notation that say nothing about the value, removed in this order, wherever they stand."""

_REWRITTEN = (
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # only what stands between the first two dollar signs
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12 and \frac1b
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def score_dapo_math(response_text: str, problem: Problem, finish_reason: str) -> Score:
    """+1 if the last answer of the response equals the ground truth after normalisation, else -1."""
    found = _ANSWER.findall(response_text[-SEARCHED_CHARACTERS:])
    answer = normalize_answer(found[-1]) if found else NO_ANSWER
    correct = answer == normalize_answer(problem.ground_truth)
    return Score(reward=1.0 if correct else -1.0, accuracy=float(correct), answer=answer)


def normalize_answer(text: str) -> str:
    """The canonical string of a final answer: right of the last `=`, without units, wrappers, dollar signs and digit commas."""
    text = text.split("=")[-1]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for expression in _REMOVED:
        text = text.replace(expression, "")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return text.strip()
