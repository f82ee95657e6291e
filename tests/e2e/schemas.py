"""Whatever /openapi.json allows or forbids is sent to a live server, and no answer may be one that it does not promise.

`python -m tests.e2e.schemas` needs schemathesis (`pip install '.[fuzz]'`), which makes requests from the schema: half of the
bodies are valid by it, half are broken at one place. They go to `dsa serve` with the default model twice: to a server
without keys, and to one with keys, with a plain key and each tenth with a wrong one. An answer is a fault if:

- it is not there within `HANG_SECONDS`, or the connection breaks
- its status is 500 or more, or a stream says that the server or its engine failed
- /openapi.json does not name the status for this operation, or the body is not of the named type and schema
- it opens an admin's route to somebody else, or any route but the probes to a wrong key

The context is short and requests have little time, so that thousands of them get an answer. `--cases 20000` of each server
are split evenly over the operations that take any input; the others are asked once. Everything comes from `--seed`, but for
the time that the machine needs. It prints each fault with its request, and a table; the exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from server.http.access import PROBES
from tests.e2e.serving import Server
from tests.server.access.kit import write_keys

HANG_SECONDS = 30.0
FLAGS = ("--max-model-len", "128", "--request-seconds", "1", "--max-queue-tokens", "4096")
AT_ONCE = 200
"""Cases that one process makes before it takes others."""
_FAILED_STREAM = ('"type":"server_error"', '"type":"engine_error"', '"type":"api_error"')


class Task(NamedTuple):
    """Cases of one operation."""

    label: str  # such as "POST /v1/completions"
    valid: bool  # by the schema
    cases: int
    seed: int


@dataclass
class Found:
    """What came of them."""

    label: str
    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.cases += other.cases
        self.statuses += other.statuses
        self.slowest = max(self.slowest, other.slowest)
        self.faults += other.faults


def judge(path: str, status: int, seconds: float, text: str, *, keys: bool, wrong_key: bool) -> list[str]:
    """What is wrong with an answer, whatever the schema says.

    Args:
        path: of the operation, as the schema writes it.
        status: of the answer.
        seconds: that it took.
        text: its body.
        keys: the server has keys.
        wrong_key: the request has none of them. Else it has that of a plain caller.
    """
    faults = []
    if seconds > HANG_SECONDS:
        faults.append(f"the answer took {seconds:.0f} s")
    if status >= 500:
        faults.append(f"status {status}")
    if status == 200 and any(sign in text for sign in _FAILED_STREAM):
        faults.append("the stream ends with a fault of the server")
    if keys and wrong_key and path not in PROBES:
        if status != 401:
            faults.append(f"status {status} for a wrong key")
    elif path.startswith("/admin") and status not in (401, 403):
        faults.append(f"status {status} for somebody who is no admin")
    return faults


@functools.cache
def schema_of(url: str, secret: str) -> Any:
    """The schema of a server, as schemathesis has read it; once in each process."""
    import schemathesis

    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    schema = schemathesis.openapi.from_url(
        f"{url}/openapi.json", headers=headers, wait_for_schema=HANG_SECONDS
    )
    schema.config.output.sanitization.update(
        enabled=False
    )  # else `token_ids` of a fault cannot be sent again
    return schema


def operations(url: str, secret: str) -> dict[str, Any]:
    """All operations by their labels."""
    return {found.ok().label: found.ok() for found in schema_of(url, secret).get_all_operations()}


def split(url: str, secret: str, cases: int, seed: int) -> Iterator[Task]:
    """Divide so many cases."""
    bodies: list[str] = []
    paths: list[str] = []
    fixed: list[str] = []
    for label, operation in operations(url, secret).items():
        inputs = [*operation.path_parameters, *operation.query]
        (bodies if operation.body else paths if inputs else fixed).append(label)
    each = -(-cases // len(bodies + paths))
    wanted = [(label, True, 1) for label in fixed] + [(label, True, each) for label in paths]
    for label in bodies:
        wanted += [(label, True, each - each // 2), (label, False, each // 2)]
    for label, valid, count in wanted:
        for part in range(0, count, AT_ONCE):
            yield Task(label, valid, min(AT_ONCE, count - part), seed + part)


def examine(url: str, secret: str, task: Task) -> Found:
    """Send the cases of one task. Runs in a process of its own."""
    import requests
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis import GenerationMode
    from schemathesis.core.failures import Failure, FailureGroup
    from schemathesis.specs.openapi import checks

    operation = operations(url, secret)[task.label]
    named = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    mode = GenerationMode.POSITIVE if task.valid else GenerationMode.NEGATIVE
    found = Found(task.label)

    @seeded(task.seed)
    @settings(
        max_examples=task.cases, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        found.cases += 1
        wrong_key = bool(secret) and found.cases % 10 == 0
        headers = {"authorization": f"Bearer {'no-such-secret' if wrong_key else secret}"} if secret else {}
        faults = []
        try:
            response = case.call(headers=headers, timeout=HANG_SECONDS)
        except requests.RequestException as error:
            faults.append(f"no answer: {error!r}")
        else:
            seconds = response.elapsed  # without the time that the client takes to write a body of some MB
            found.slowest = max(found.slowest, seconds)
            found.statuses[response.status_code] += 1
            text = response.content.decode("utf-8", "replace")
            path = operation.path
            faults += judge(path, response.status_code, seconds, text, keys=bool(secret), wrong_key=wrong_key)
            try:
                case.validate_response(response, checks=named)
            except FailureGroup as group:
                faults += [f"{failure.title}: {failure.message}" for failure in group.exceptions]
            except Failure as failure:
                faults.append(f"{failure.title}: {failure.message}")
        if faults:
            found.faults.append(f"{'; '.join(faults)}\n    {case.as_curl_command(headers=headers)}")

    send()
    return found


def run(server: Server, secret: str, options: argparse.Namespace) -> dict[str, Found]:
    """Send all cases to a server. Returns what was found, by operation."""
    total: dict[str, Found] = {}
    tasks = list(split(server.url, secret, options.cases, options.seed))
    tasks.sort(key=lambda task: task.seed)  # a run that is cut short has seen every operation
    context = multiprocessing.get_context("spawn")
    begun = said = time.monotonic()
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        waiting = [pool.submit(examine, server.url, secret, task) for task in tasks]
        for done in as_completed(waiting):
            if done.cancelled():
                continue
            found = done.result()
            total.setdefault(found.label, Found(found.label)).add(found)
            for fault in found.faults:
                print(f"{found.label}: {fault}", flush=True)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                cases, faults = _sums(total)
                print(f"{said - begun:.0f} s: {cases} cases, {faults} faults", flush=True)
            if options.minutes and time.monotonic() - begun > 60 * options.minutes:
                for rest in waiting:
                    rest.cancel()
    if server.get("/health/live").status_code != 200 or server.process.poll() is not None:
        raise RuntimeError(f"the server is gone: {server.errors}")
    return total


def _sums(total: dict[str, Found]) -> tuple[int, int]:
    return sum(found.cases for found in total.values()), sum(len(found.faults) for found in total.values())


def show(title: str, total: dict[str, Found], seconds: float) -> None:
    """Print a table of one server."""
    cases, faults = _sums(total)
    print(f"\n{title}: {cases} cases in {seconds:.0f} s, {faults} faults\n")
    print("| operation | cases | statuses | slowest, s | faults |\n|---|--:|---|--:|--:|")
    for found in sorted(total.values(), key=lambda found: found.label.split()[::-1]):
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(found.statuses.items()))
        print(f"| {found.label} | {found.cases} | {statuses} | {found.slowest:.1f} | {len(found.faults)} |")
    sys.stdout.flush()


def main() -> None:
    """Examine both servers, print, and say whether all was as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="for each of the two servers (%(default)d)")
    parser.add_argument(
        "--only", choices=["open", "keys"], help="one of the servers: without keys, or with keys"
    )
    parser.add_argument("--workers", type=int, default=4, help="processes that make requests (%(default)d)")
    parser.add_argument(
        "--minutes", type=float, help="end early: begin nothing new after so many, for each server"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        keys = write_keys(Path(folder) / "keys.yaml", user={}, root={"role": "admin"})
        kinds = {
            "open": ("without keys", "", ()),
            "keys": ("with keys", "secret-user", ("--keys", str(keys))),
        }
        for title, secret, flags in [kinds[options.only]] if options.only else kinds.values():
            begun = time.monotonic()
            server = Server(*FLAGS, *flags)
            try:
                total = run(server.wait_ready(), secret, options)
            finally:
                server.close()
            show(title, total, time.monotonic() - begun)
            faults += _sums(total)[1]
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
