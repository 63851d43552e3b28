"""The generated problems: every equation in them holds, and every Python generates the same ones."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

from audit.demo.arithmetic import problems

_TERM = r"[(]?-?\d+[)]?"
_SIDE = rf"{_TERM}(?: [+*/-] {_TERM})*"
# whole equations of numbers: not the tail of one with an unknown or a fraction in it
_EQUATION = re.compile(rf"(?<![+*/-] )(?<![\w/(-]){_SIDE}(?: = {_SIDE})+(?![\d/x])")


def _value(expression: str) -> Fraction:
    """The value of an expression of integers and + - * / ( ), by exact arithmetic."""
    exact = re.sub(r"\d+", lambda match: f"Fraction({match.group()})", expression)
    return Fraction(eval(exact, {"Fraction": Fraction}))


def test_every_equation_holds() -> None:
    checked: Counter[str] = Counter()
    for document in problems(800, seed=1):
        template = document.name.split(".")[1]
        for equation in _EQUATION.findall(document.text):
            sides = [_value(side) for side in equation.split(" = ")]
            for left, right in pairwise(sides):
                # the quotients written down in long division and in base 2 are whole numbers, rounded down
                assert left == right or (template in ("division", "binary") and left // 1 == right), equation
            checked[template] += 1
    assert len(checked) == 16
    assert min(checked.values()) >= 50


def test_answers_of_problems_solved_independently() -> None:
    for document in problems(320, seed=2):
        numbers = [int(number) for number in re.findall(r"-?\d+", document.text.split("\n")[0])]
        answer = [int(number) for number in re.findall(r"-?\d+", document.text.strip().split("Answer: ")[1])]
        match document.name.split(".")[1]:
            case "addition":
                assert answer[-1] == sum(numbers)
            case "subtraction":
                assert answer[-1] == numbers[1] - numbers[0]
            case "multiplication":
                assert answer[-1] == numbers[0] * numbers[1]
            case "division":
                assert answer[-1] == numbers[0] % numbers[1]
            case "fractions":
                a, b, c, d = numbers
                assert Fraction(a, b) + Fraction(c, d) == Fraction(*answer)
                assert Fraction(*answer).denominator == answer[1]
            case "percentage":
                assert 100 * answer[0] == numbers[0] * (100 - numbers[1])
            case "sequence":
                n, _, first, second = numbers[:4]
                terms = [first + i * (second - first) for i in range(n)]
                assert answer[1:] == [terms[-1], sum(terms)]
            case "shopping":
                n, price, m, other, paid = numbers
                assert answer[-1] == paid - n * price - m * other >= 0
            case "mean":
                assert answer[-1] * len(numbers) == sum(numbers)
            case "binary":
                assert int(str(answer[1]), 2) == answer[0] == numbers[0]


def test_problems_are_the_same_under_every_python() -> None:
    text = "".join(document.text for document in problems(64))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "edeab3edfb5cbc668242fff1ab541ab2617b227f89b04f75eccaefca2e2e052d"
    )
    assert text != "".join(document.text for document in problems(64, seed=1))
