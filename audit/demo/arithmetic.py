"""Generated arithmetic problems with worked steps (domain ``math``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

from audit.documents import Document

Problem = tuple[str, list[str], str]  # question, steps, answer

_GOODS = ("apples", "pencils", "tickets", "bricks", "stamps", "lamps", "chairs", "bottles", "books", "shirts")
_PEOPLE = ("Ana", "Ben", "Chen", "Dina", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Julia", "Kofi", "Lena")
_PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions")


def problems(count: int, seed: int = 0) -> Iterator[Document]:
    """The given number of problems, the templates in turn; the same under every Python for the same seed."""
    rng = Random(seed)
    for number in range(count):
        template = _TEMPLATES[number % len(_TEMPLATES)]
        question, steps, answer = template(rng)
        lines = [f"Problem: {question}", *(f"Step {i}: {step}" for i, step in enumerate(steps, 1)), f"Answer: {answer}"]
        yield Document(f"arithmetic.{template.__name__.strip('_')}.{number}", "math", "\n".join(lines) + "\n")


def _pick(rng: Random, options: tuple[str, ...]) -> str:
    return options[rng.randrange(len(options))]


def _addition(rng: Random) -> Problem:
    a, b = rng.randrange(1_000, 1_000_000), rng.randrange(1_000, 1_000_000)
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        so_far = (a % 10 ** (place + 1) + b % 10 ** (place + 1)) % 10 ** (place + 1)
        steps.append(f"{_PLACES[place]}: {x} + {y}{carried} = {total}, carry {carry}, written so far {so_far}.")
    return f"Add {a} and {b}.", steps, f"{a} + {b} = {a + b}."


def _subtraction(rng: Random) -> Problem:
    b = rng.randrange(1_000, 500_000)
    a = b + rng.randrange(1_000, 500_000)
    steps, borrow = [], 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10 - borrow, b // 10**place % 10
        borrow = int(x < y)
        so_far = (a - b) % 10 ** (place + 1)
        borrowed = f" borrow 10, {x + 10} - {y} = {x + 10 - y}" if borrow else f" {x} - {y} = {x - y}"
        steps.append(f"{_PLACES[place]}:{borrowed}, written so far {so_far}.")
    return f"Subtract {b} from {a}.", steps, f"{a} - {b} = {a - b}."


def _multiplication(rng: Random) -> Problem:
    a, b = rng.randrange(100, 10_000), rng.randrange(12, 1_000)
    steps, running = [], 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        steps.append(f"{a} * {digit} = {a * int(digit)}, in the {_PLACES[place]} that is {part}.")
        if place:
            steps.append(f"{running} + {part} = {running + part}.")
        running += part
    return f"Multiply {a} by {b}.", steps, f"{a} * {b} = {running}."


def _division(rng: Random) -> Problem:
    divisor = rng.randrange(3, 60)
    dividend = rng.randrange(1_000, 1_000_000)
    steps, rest = [], 0
    for digit in str(dividend):
        number = 10 * rest + int(digit)
        quotient, rest = divmod(number, divisor)
        steps.append(
            f"Bring down {digit}: {number} / {divisor} = {quotient}, {number} - {quotient * divisor} = {rest}."
        )
    answer = f"{dividend} = {divisor} * {dividend // divisor} + {rest}, remainder {rest}."
    return f"Divide {dividend} by {divisor} with remainder.", steps, answer


def _linear_equation(rng: Random) -> Problem:
    a, x, b = rng.randrange(2, 40), rng.randrange(2, 200), rng.randrange(3, 900)
    c = a * x + b
    steps = [
        f"Subtract {b} from both sides: {a}x = {c} - {b} = {c - b}.",
        f"Divide both sides by {a}: x = {c - b} / {a} = {x}.",
        f"Check: {a} * {x} + {b} = {a * x} + {b} = {c}.",
    ]
    return f"Solve {a}x + {b} = {c} for x.", steps, f"x = {x}."


def _linear_system(rng: Random) -> Problem:
    x, y = rng.randrange(5, 400), rng.randrange(5, 400)
    p, q = rng.randrange(2, 9), rng.randrange(2, 9)
    total, mixed = x + y, p * x - q * y
    steps = [
        f"From the first equation y = {total} - x.",
        f"Put it into the second: {p}x - {q} * ({total} - x) = {mixed}.",
        f"Expand: {p}x - {q * total} + {q}x = {mixed}, so {p + q}x = {mixed} + {q * total} = {mixed + q * total}.",
        f"Divide by {p + q}: x = {x}.",
        f"Then y = {total} - {x} = {y}.",
    ]
    return f"Solve x + y = {total} and {p}x - {q}y = {mixed}.", steps, f"x = {x}, y = {y}."


def _fractions(rng: Random) -> Problem:
    b, d = rng.randrange(3, 60), rng.randrange(3, 60)
    a, c = rng.randrange(1, b), rng.randrange(1, d)
    common = math.lcm(b, d)
    left, right = a * common // b, c * common // d
    shared = math.gcd(left + right, common)
    steps = [
        f"The least common multiple of {b} and {d} is {common}.",
        f"{a}/{b} = {left}/{common} and {c}/{d} = {right}/{common}.",
        f"{left} + {right} = {left + right}, so the sum is {left + right}/{common}.",
        f"The greatest common divisor of {left + right} and {common} is {shared}.",
    ]
    return f"Add {a}/{b} and {c}/{d}.", steps, f"{(left + right) // shared}/{common // shared}."


def _percentage(rng: Random) -> Problem:
    percent, price = rng.randrange(2, 95), 100 * rng.randrange(3, 900)
    off = percent * price // 100
    steps = [
        f"1 % of {price} is {price} / 100 = {price // 100}.",
        f"{percent} % of {price} is {percent} * {price // 100} = {off}.",
        f"{price} - {off} = {price - off}.",
    ]
    question = f"A price of {price} falls by {percent} %. What is the new price?"
    return question, steps, f"The new price is {price - off}."


def _speed(rng: Random) -> Problem:
    speed, minutes = rng.randrange(40, 2_000), rng.randrange(12, 600)
    name = _pick(rng, _PEOPLE)
    steps = [
        f"{minutes} minutes are {minutes // 60} hours and {minutes % 60} minutes.",
        f"In {minutes} minutes that is {minutes} * {speed} = {minutes * speed} metres.",
        f"In 60 minutes it is 60 * {speed} = {60 * speed} metres.",
    ]
    question = f"{name} drives {speed} metres a minute for {minutes} minutes. How far is that, and how far in an hour?"
    return question, steps, f"{name} drives {minutes * speed} metres, in an hour {60 * speed} metres."


def _sequence(rng: Random) -> Problem:
    first, step, n = rng.randrange(2, 900), rng.randrange(2, 90), rng.randrange(10, 90)
    last = first + (n - 1) * step
    shown = ", ".join(str(first + i * step) for i in range(4))
    steps = [
        f"{first + step} - {first} = {step}.",
        f"Term {n} is {first} + {n - 1} * {step} = {first} + {(n - 1) * step} = {last}.",
        f"The sum is {n} * ({first} + {last}) / 2 = {n} * {first + last} / 2.",
        f"{n} * {first + last} = {n * (first + last)}, half of it is {n * (first + last) // 2}.",
    ]
    question = f"Find term {n} and the sum of {n} terms of {shown} and so on."
    return question, steps, f"Term {n} is {last}, the sum is {n * (first + last) // 2}."


def _common_divisor(rng: Random) -> Problem:
    shared = rng.randrange(2, 120)
    a, b = shared * rng.randrange(50, 400), shared * rng.randrange(5, 300)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    question = f"Find the greatest common divisor of {a} and {b}."
    return question, steps, f"The greatest common divisor is {x}."


def _shopping(rng: Random) -> Problem:
    name, first, second = _pick(rng, _PEOPLE), _pick(rng, _GOODS), _pick(rng, _GOODS)
    n, m, price, other = (rng.randrange(2, 80) for _ in range(4))
    total = n * price + m * other
    paid = 100 * (total // 100 + 1)
    steps = [
        f"{n} {first} cost {n} * {price} = {n * price}.",
        f"{m} {second} cost {m} * {other} = {m * other}.",
        f"Together {n * price} + {m * other} = {total}.",
        f"The change is {paid} - {total} = {paid - total}.",
    ]
    question = (
        f"{name} buys {n} {first} at {price} each and {m} {second} at {other} each and pays {paid}. What is the change?"
    )
    return question, steps, f"{name} gets {paid - total} back."


def _mean(rng: Random) -> Problem:
    count = rng.randrange(4, 10)
    values = [rng.randrange(1, 900) for _ in range(count - 1)]
    values.append(count * (max(values) + rng.randrange(1, 50)) - sum(values))
    steps, running = [], values[0]
    for value in values[1:]:
        steps.append(f"{running} + {value} = {running + value}.")
        running += value
    steps.append(f"There are {count} numbers: {running} / {count} = {running // count}.")
    return f"Find the mean of {', '.join(map(str, values))}.", steps, f"The mean is {running // count}."


def _binary(rng: Random) -> Problem:
    number = rng.randrange(300, 200_000)
    steps, rest, digits = [], number, ""
    while rest:
        digits = f"{rest % 2}{digits}"
        steps.append(f"{rest} / 2 = {rest // 2}, digits so far {digits}.")
        rest //= 2
    return f"Write {number} in base 2.", steps, f"{number} is {digits} in base 2."


def _prime_factors(rng: Random) -> Problem:
    number = math.prod((2, 3, 5, 7, 11, 13, 17, 19, 23)[rng.randrange(9)] for _ in range(rng.randrange(4, 7)))
    steps, rest, divisor, factors = [], number, 2, []
    while rest > 1:
        if rest % divisor:
            divisor += 1
            continue
        steps.append(f"{rest} / {divisor} = {rest // divisor}.")
        factors.append(divisor)
        rest //= divisor
    return f"Write {number} as a product of primes.", steps, f"{number} = {' * '.join(map(str, factors))}."


def _rectangle(rng: Random) -> Problem:
    width, height, price = rng.randrange(5, 300), rng.randrange(5, 300), rng.randrange(2, 40)
    fence = 2 * (width + height)
    steps = [
        f"The perimeter is 2 * ({width} + {height}) = 2 * {width + height} = {fence} metres.",
        f"The fence costs {fence} * {price} = {fence * price}.",
        f"The area is {width} * {height} = {width * height} square metres.",
    ]
    question = (
        f"A field is {width} metres wide and {height} metres long. A metre of fence costs {price}. Find cost and area."
    )
    return question, steps, f"The fence costs {fence * price}, the area is {width * height} square metres."


_TEMPLATES: tuple[Callable[[Random], Problem], ...] = (
    _addition,
    _subtraction,
    _multiplication,
    _division,
    _linear_equation,
    _linear_system,
    _fractions,
    _percentage,
    _speed,
    _sequence,
    _common_divisor,
    _shopping,
    _mean,
    _binary,
    _prime_factors,
    _rectangle,
)
