"""The reward function `dapo_math`: DAPO's rule-based mathematics reward, which FIPO uses.

The last `Answer: ...` line is normalized and compared as a string, so `0.5` does not equal `1/2`. The
normalization is that of the appendix of Minerva (arXiv 2206.14858) for MATH. Its order matters: each step
works on the result of the step before.
"""

import re
import unicodedata

from megatron_fipo.tasks.task import NO_ANSWER, Completion, Reward, Score

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
"""Units and notation that do not affect the value, removed in this order, at any position."""

_WRAPPERS = (
    re.compile(r"\\text\{(.*?)\}"),
    re.compile(r"\\textbf\{(.*?)\}"),
    re.compile(r"\\overline\{(.*?)\}"),
    re.compile(r"\\boxed\{(.*)\}"),
)
"""Replaced by their content, in this order, each on one line."""

_BRACED = (
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12 and \frac1b
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def score_dapo_math(completion: Completion) -> Score:
    """+1 if the last answer of the response equals the ground truth after normalization, else -1."""
    found = _ANSWER.findall(completion.text[-SEARCHED_CHARACTERS:])
    answer = normalize_answer(found[-1]) if found else NO_ANSWER
    correct = answer == normalize_answer(completion.problem.ground_truth)
    return Score(reward=1.0 if correct else -1.0, accuracy=float(correct), answer=answer)


def dapo_math_obstacle(ground_truth: str) -> str | None:
    """Why no response can be right for this ground truth; None if one can."""
    answer = ground_truth.strip()
    if "\n" in answer:
        return "has several lines, but an answer is one line; store the final answer alone"
    if len(answer) > SEARCHED_CHARACTERS - len("Answer: "):
        return (
            f"has {len(answer):,} characters, but answers are searched in the last {SEARCHED_CHARACTERS} of a "
            "response; remove the problem"
        )
    if _ANSWER.search(answer) or "####" in answer:
        return "contains the mark of an answer (`Answer:` or `####`); store what comes after it"
    if any(unicodedata.category(character) == "Cf" for character in answer):
        return "contains invisible characters; remove them"
    normalized = normalize_answer(ground_truth)
    if not normalized:
        return "is empty after normalization (only units or notation); store the value"
    if normalized == NO_ANSWER:
        return f"is {NO_ANSWER}, which stands for a response without an answer; store another text"
    if normalize_answer(answer) != normalized:
        return "has another meaning with its blanks at the end; remove them"
    return None


_DOUBTS = (
    ("a zero at the front", re.compile(r"0\d")),
    ("a full stop at the end", re.compile(r".*[^.]\.$")),
    ("delimiters or markup", re.compile(r".*(\\\(|\\\[|\*\*|</?\w+>)")),
    ("a sentence", re.compile(r"(?>[^\\{}]*?\b[A-Za-z]{2,}[ ,]+){4}")),  # atomic: else it may take seconds
    ("characters of another script than ASCII", re.compile(r".*[^\x00-\x7f]")),
)


def dapo_math_doubt(ground_truth: str) -> str | None:
    """What a model that solves the problem would probably write differently; None if nothing.

    Answers are compared as text after normalization: 073 is not 73, and `34.` is not 34.
    """
    answer = ground_truth.strip()
    return next((doubt for doubt, pattern in _DOUBTS if pattern.match(answer)), None)


def normalize_answer(text: str) -> str:
    """The canonical string of a final answer.

    The text after the last `=`, without units, wrappers, dollar signs and digit commas.
    """
    text = text.split("=")[-1]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for expression in _REMOVED:
        text = text.replace(expression, "")
    lines = [_between_dollars(line) for line in text.split("\n")]
    for wrapper in _WRAPPERS:
        lines = [_unwrapped(wrapper, line) for line in lines]
    text = "\n".join(lines)
    for pattern, replacement in _BRACED:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return text.strip()


def _between_dollars(line: str) -> str:
    """What is between the first two dollar signs, with them; the line if it has fewer."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line


def _unwrapped(wrapper: re.Pattern[str], line: str) -> str:
    """The line with each wrapper replaced by its content.

    Nothing after the last brace can match. Searching there would take quadratic time.
    """
    head, brace, tail = line.rpartition("}")
    return wrapper.sub(r"\1", head + brace) + tail


DAPO_MATH = Reward(
    score_dapo_math,
    obstacle=lambda problem: dapo_math_obstacle(problem.ground_truth),
    doubt=lambda problem: dapo_math_doubt(problem.ground_truth),
    reads_last=SEARCHED_CHARACTERS,
    reads_columns=False,
)
"""The reward `dapo_math`."""
