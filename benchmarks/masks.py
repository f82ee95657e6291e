"""What structured output costs, as a client sees it: streams under a JSON schema beside free ones, turn by turn.

`python -m benchmarks.masks http://127.0.0.1:8000` asks a server that runs. It prints the ratio of decode speed, and how much
later the first token comes, each the median of its rounds, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3, "maxLength": 24},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "kind": {"enum": ["small", "medium", "large"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "count", "kind", "tags"],
        "additionalProperties": False,
    },
}
"""It has no end before the token limit, so that all answers are of one length."""

FREE: dict[str, Any] = {"ignore_eos": True}
HELD: dict[str, Any] = {"structured_outputs": {"json": SCHEMA}}


@dataclass(frozen=True, slots=True)
class Times:
    """When the events of one answer came, in seconds after the request."""

    first: float
    last: float


def ask(client: httpx.Client, url: str, prompt: str, tokens: int, fields: dict[str, Any]) -> Times:
    """Stream one answer of so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "stream": True} | fields
    began, times = time.perf_counter(), []
    with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"the server refused: {reply.read().decode()}")
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(f"the answer failed: {event['error']['message']}")
                times.append(time.perf_counter() - began)
    return Times(times[0], times[-1])


def decode_seconds(
    client: httpx.Client, url: str, streams: int, tokens: int, fields: dict[str, Any]
) -> float:
    """Seconds from the last stream's first token to the end of all."""
    with ThreadPoolExecutor(streams) as threads:
        prompts = [f"List {number}: a list of things as JSON. " for number in range(streams)]
        found = list(threads.map(lambda prompt: ask(client, url, prompt, tokens, fields), prompts))
    return max(one.last for one in found) - max(one.first for one in found)


def spread(values: list[float]) -> dict[str, float]:
    """The median, and what lies around it."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(url: str, *, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Ask in turns, each time another kind first."""
    slower, later = [], []
    with httpx.Client(timeout=600) as client:
        for fields in (FREE, HELD):  # the first answers compile the grammar and warm the server up
            decode_seconds(client, url, streams, 8, fields)
        for number in range(rounds):
            kinds = (FREE, HELD) if number % 2 else (HELD, FREE)
            took = {id(fields): decode_seconds(client, url, streams, tokens, fields) for fields in kinds}
            slower.append(took[id(HELD)] / took[id(FREE)])
            firsts = {}
            for fields in kinds:
                prompt = f"Round {number} {id(fields)}: things as JSON. "
                firsts[id(fields)] = ask(client, url, prompt, 2, fields).first
            later.append(1000 * (firsts[id(HELD)] - firsts[id(FREE)]))
    return {
        "streams": streams,
        "tokens": tokens,
        "rounds": rounds,
        "time under a schema / free": spread(slower),
        "first token later, ms": spread(later),
    }


def main() -> None:
    """Read the command line, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    found = measure(args.url.rstrip("/"), streams=args.streams, tokens=args.tokens, rounds=args.rounds)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
