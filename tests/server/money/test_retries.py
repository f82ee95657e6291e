"""Attempts of one request do not pay twice."""

from __future__ import annotations

from server.money.pricing import Bill
from server.money.retries import KEEP_SECONDS, MAX_ATTEMPTS, Retries, attempt_name
from tests.server.fake_engine import FakeEngine
from tests.server.kit import client, completion_body, make_app, say

PATH = "/v1/completions"


def test_attempts_have_one_name() -> None:
    name = attempt_name("s", "/p", "k", b"body")
    assert name is not None
    assert name == attempt_name("s", "/p", "k", b"body")
    others = [
        ("x", "/p", "k", b"body"),
        ("s", "/x", "k", b"body"),
        ("s", "/p", "x", b"body"),
        ("s", "/p", "k", b"x"),
    ]
    assert name not in {attempt_name(*other) for other in others}
    assert attempt_name("s", "/p", None, b"body") is attempt_name("s", "/p", "", b"body") is None


def test_what_was_paid_is_remembered_for_a_while_and_a_few_attempts() -> None:
    now = [0.0]
    retries = Retries(lambda: now[0])
    retries.pay(None, 7)
    assert retries.paid(None) == retries.paid("a") == 0
    retries.pay("a", 7)
    retries.pay("a", 3)
    assert (retries.paid("a"), retries.paid("b")) == (10, 0)
    now[0] = KEEP_SECONDS + 1
    assert retries.paid("a") == 0
    for _ in range(MAX_ATTEMPTS):
        retries.pay("a", 1)
    assert retries.paid("a") == 0
    retries.pay("a", 2)
    assert retries.paid("a") == 2


def test_a_bill_without_what_was_paid() -> None:
    bill = Bill(10, {"prompt_uncached": 4, "completion": 6}, 50, 60, "v")
    assert bill.without(0) == bill
    assert bill.without(5) == Bill(5, {"prompt_uncached": 0, "completion": 5}, 50, 60, "v")
    assert bill.without(99).amount == 0


async def test_a_second_attempt_pays_what_is_left() -> None:
    lengths = iter((10, 30, 30))
    engine = FakeEngine(lambda submit: say("x" * next(lengths)))
    app = make_app(engine, model_name="deepseek-v3.2")
    async with client(app) as http:

        async def amount(key: str) -> int:
            answer = await http.post(
                PATH, json=completion_body("hi", model="deepseek-v3.2"), headers={"Idempotency-Key": key}
            )
            return int(answer.json()["usage"]["cost_details"]["amount"])

        first, second, other = await amount("a"), await amount("a"), await amount("b")
    assert 0 < first < other
    assert first + second == other
