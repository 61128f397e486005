"""The texts of the word problems. <<a+b>> is a step of the solution: it is written `3 + 5 = 8`, and its result is r1, r2, ...

Letters a to d are the numbers of a problem, each from the range given with it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A family of problems that differ in names, things and numbers."""

    question: str
    solution: str
    """Its steps in order; the result of the last one is the answer."""
    ranges: dict[str, tuple[int, int]]
    """Least and largest value of each number."""


def _template(question: str, solution: str, **ranges: tuple[int, int]) -> Template:
    return Template(question, solution, ranges)


SUM, PART, FACTOR, GROUPS = (3, 20), (2, 12), (2, 9), (2, 5)

ONE_STEP = (
    _template(
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "{name} now has <<a+b>> {things}.",
        a=SUM,
        b=SUM,
    ),
    _template(
        "{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?",
        "{name} has <<a-b>> {things} left.",
        a=SUM,
        b=PART,
    ),
    _template(
        "There are {a} {things} in each {box}. How many {things} are in {b} of them?",
        "Together there are <<a*b>> {things}.",
        a=FACTOR,
        b=GROUPS,
    ),
    _template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "Each friend gets <<a/b>> {things}.",
        a=(4, 30),
        b=GROUPS,
    ),
    _template(
        "{name} found {a} {things} and {other} found {b}. How many {things} did they find together?",
        "Together they found <<a+b>> {things}.",
        a=SUM,
        b=SUM,
    ),
    _template(
        "A shop had {a} {things} in the morning and {b} in the evening. How many {things} did it sell?",
        "The shop sold <<a-b>> {things}.",
        a=SUM,
        b=PART,
    ),
    _template(
        "{name} is {a} years old. {other} is {b} years older. How old is {other}?",
        "{other} is <<a+b>> years old.",
        a=(4, 20),
        b=(2, 12),
    ),
    _template(
        "One {box} costs {a} dollars. How much do {b} of them cost, in dollars?",
        "They cost <<a*b>> dollars.",
        a=FACTOR,
        b=GROUPS,
    ),
    _template(
        "{name} needs {a} {things} for a party and already has {b}. How many more {things} does {name} need?",
        "{name} needs <<a-b>> more {things}.",
        a=SUM,
        b=PART,
    ),
    _template(
        "{name} walks {a} kilometers every day. How many kilometers does {name} walk in {b} days?",
        "{name} walks <<a*b>> kilometers.",
        a=FACTOR,
        b=GROUPS,
    ),
    _template(
        "{a} {things} are packed into {b} equal {boxes}. How many {things} are in each {box}?",
        "Each {box} has <<a/b>> {things}.",
        a=(4, 30),
        b=GROUPS,
    ),
    _template(
        "{other} has {a} {things}. {name} has {b} fewer than {other}. How many {things} does {name} have?",
        "{name} has <<a-b>> {things}.",
        a=SUM,
        b=PART,
    ),
)

TWO_STEPS = (
    _template(
        "{name} has {a} {things}, buys {b} more and then gives {c} to {other}. How many {things} does {name} have now?",
        "After buying, {name} has <<a+b>> {things}. Then {name} has <<r1-c>> {things} left.",
        a=SUM,
        b=PART,
        c=PART,
    ),
    _template(
        "{name} buys {a} {boxes} with {b} {things} each and uses {c} of the {things}. How many {things} are left?",
        "{name} buys <<a*b>> {things}. There are <<r1-c>> {things} left.",
        a=GROUPS,
        b=FACTOR,
        c=PART,
    ),
    _template(
        "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have together?",
        "{other} has <<a+b>> {things}. Together they have <<a+r1>> {things}.",
        a=(2, 15),
        b=(2, 10),
    ),
    _template(
        "{name} collects {a} {things} on Monday and {b} on Tuesday, and puts all of them into {c} equal {boxes}. "
        "How many {things} are in each {box}?",
        "{name} collects <<a+b>> {things}. Each {box} has <<r1/c>> {things}.",
        a=SUM,
        b=PART,
        c=GROUPS,
    ),
    _template(
        "A {box} costs {a} dollars. {name} buys {b} of them and pays with {c} dollars. How many dollars does {name} get back?",
        "The price is <<a*b>> dollars. {name} gets back <<c-r1>> dollars.",
        a=FACTOR,
        b=GROUPS,
        c=(10, 50),
    ),
    _template(
        "{name} reads {a} pages a day for {b} days, and then {c} pages on the last day. How many pages does {name} read?",
        "In {b} days {name} reads <<a*b>> pages. Altogether that is <<r1+c>> pages.",
        a=(3, 10),
        b=GROUPS,
        c=PART,
    ),
    _template(
        "{name} had {a} {things}. {name} lost {b} of them and {other} gave {name} {c} others. How many {things} does {name} have?",
        "After the loss {name} has <<a-b>> {things}. With the others {name} has <<r1+c>> {things}.",
        a=SUM,
        b=PART,
        c=PART,
    ),
    _template(
        "{name} and {other} each have {a} {things}. They give away {b} of all their {things}. How many do they have left together?",
        "Together they have <<2*a>> {things}. They have <<r1-b>> {things} left.",
        a=SUM,
        b=PART,
    ),
    _template(
        "There are {a} {boxes} with {b} {things} each and {c} {boxes} with {d} {things} each. How many {things} are there?",
        "The first have <<a*b>> {things}. The others have <<c*d>> {things}. Altogether there are <<r1+r2>> {things}.",
        a=GROUPS,
        b=FACTOR,
        c=GROUPS,
        d=FACTOR,
    ),
    _template(
        "{name} earns {a} dollars an hour and works {b} hours. Then {name} spends {c} dollars. How many dollars are left?",
        "{name} earns <<a*b>> dollars. Then <<r1-c>> dollars are left.",
        a=FACTOR,
        b=GROUPS,
        c=PART,
    ),
    _template(
        "A bus has {a} passengers. At a stop {b} get off and {c} get on. How many passengers are on the bus now?",
        "After {b} get off, there are <<a-b>> passengers. Then there are <<r1+c>> passengers.",
        a=SUM,
        b=PART,
        c=PART,
    ),
    _template(
        "{name} has {a} {things} and gives {b} to each of {c} friends. How many {things} does {name} keep?",
        "The friends get <<b*c>> {things}. {name} keeps <<a-r1>> {things}.",
        a=(10, 40),
        b=FACTOR,
        c=GROUPS,
    ),
)

NAMES = (
    *("Ada", "Ahmed", "Alice", "Anton", "Bella", "Ben", "Carlos", "Chloe", "Daniel", "Diana", "Elena"),
    *("Emma", "Fatima", "Felix", "Grace", "Hana", "Hugo", "Ivan", "Jack", "Julia", "Kenji", "Laura"),
    *("Leo", "Lina", "Maria", "Max", "Mia", "Nadia", "Noah", "Olga", "Omar", "Paul", "Priya", "Quinn"),
    *("Rosa", "Sam", "Sofia", "Tom", "Victor", "Wei", "Yara", "Zoe"),
)
THINGS = (
    *("apples", "balloons", "beads", "books", "buttons", "candles", "cards", "carrots", "coins"),
    *("cookies", "cupcakes", "dolls", "eggs", "erasers", "feathers", "flowers", "grapes", "keys"),
    *("lemons", "marbles", "mugs", "notebooks", "nuts", "oranges", "peaches", "pencils", "plums"),
    *("puzzles", "ribbons", "shells", "spoons", "stamps", "stickers", "stones", "tickets", "tomatoes"),
    *("tulips", "walnuts"),
)
BOXES = (
    *(("bag", "bags"), ("basket", "baskets"), ("box", "boxes"), ("crate", "crates"), ("drawer", "drawers")),
    *(("jar", "jars"), ("package", "packages"), ("shelf", "shelves"), ("tray", "trays")),
)
