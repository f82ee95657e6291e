"""What a user gets from the default model who says nothing about sampling: right answers to easy questions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.serving import Server

ASKED = {
    "What is the capital of France?": "paris",
    "What is the capital of Germany?": "berlin",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of England?": "london",
    "What is the capital of Egypt?": "cairo",
    "What is the capital of Greece?": "athens",
    "What is the capital of Russia?": "moscow",
    "What is the capital of China?": "beijing",
    "Which planet is known as the Red Planet?": "mars",
    "What gas do humans need to breathe?": "oxygen",
    "What is the chemical symbol of water?": "h2o",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "What is the largest ocean on Earth?": "pacific",
    "In which continent is Brazil?": "south america",
    "In which continent is Kenya?": "africa",
    "What is the currency of Japan?": "yen",
    "What is the currency of the United States?": "dollar",
    "What language is spoken in Brazil?": "portuguese",
    "What is the tallest mountain in the world?": "everest",
    "Which organ pumps blood through the body?": "heart",
    "What is the opposite of hot?": "cold",
    "Who painted the Mona Lisa?": "leonardo",
    "What force pulls objects to the ground?": "gravity",
    "What is the capital of Austria?": "vienna",
    "What is the capital of Ireland?": "dublin",
    "What is the capital of Poland?": "warsaw",
    "What is the capital of India?": "delhi",
    "What is the capital of South Korea?": "seoul",
    "What is the capital of Hungary?": "budapest",
    "In which continent is India?": "asia",
    "In which continent is France?": "europe",
    "What do plants need to grow?": "water",
}
"""Questions that the model answers right when it is greedy, with the word that a right answer holds."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_easy_answers_hold_the_right_word(server: Server) -> None:
    def ask(numbered: tuple[int, str]) -> str:
        seed, question = numbered
        messages = [{"role": "user", "content": question}]
        answer = server.post("/v1/chat/completions", messages=messages, seed=seed, max_tokens=32).json()
        return str(answer["choices"][0]["message"]["content"]).lower().replace("\u2082", "2")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, enumerate(ASKED)))
    wrong = [(word, text) for word, text in zip(ASKED.values(), answers, strict=True) if word not in text]
    assert len(answers) == 32
    assert len(wrong) <= 4, wrong
