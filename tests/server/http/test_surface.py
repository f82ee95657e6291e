"""Models, health, the schema, and what importing the app brings along."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from server.http.protocol.chat import ChatCompletionBody
from server.http.protocol.completions import CompletionBody
from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, client, make_app, speaking


async def test_models() -> None:
    async with client(make_app(speaking())) as http:
        listed = (await http.get("/v1/models")).json()
        (model,) = listed["data"]
        assert listed["object"] == "list"
        assert (model["id"], model["object"], model["max_model_len"]) == ("fake-model", "model", 256)
        assert (await http.get("/v1/models/fake-model")).json() == model
        assert (await http.get("/v1/models/a/b")).json()["error"]["code"] == "model_not_found"


async def test_a_model_with_several_names() -> None:
    app = make_app(speaking("x"), model_aliases=("gpt-4o", "other"))
    async with client(app) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(model["id"], model["root"]) for model in listed] == [
            (name, "fake-model") for name in ("fake-model", "gpt-4o", "other")
        ]
        assert (await http.get("/v1/models/other")).json() == listed[2]
        answer = await http.post("/v1/chat/completions", json=chat_body(model="gpt-4o"))
        assert (answer.status_code, answer.json()["model"]) == (200, "fake-model")
        refused = (await http.post("/v1/chat/completions", json=chat_body(model="gpt-5"))).json()["error"]
        assert refused["message"].endswith("this server has 'fake-model' and 'gpt-4o' and 'other'")


async def test_a_batch_invariant_model_says_so_and_has_a_fingerprint_of_its_own() -> None:
    told = []
    for invariant in (False, True):
        engine: FakeEngine = speaking()
        known = engine.status.model
        assert known is not None
        model = msgspec.structs.replace(known, batch_invariant=invariant)
        engine._status = msgspec.structs.replace(engine.status, model=model)
        async with client(make_app(engine)) as http:
            (listed,) = (await http.get("/v1/models")).json()["data"]
            answer = (await http.post("/v1/chat/completions", json=chat_body())).json()
        assert listed["batch_invariant"] is invariant
        told.append(answer["system_fingerprint"])
    assert told[0] != told[1]


async def test_a_models_name_may_be_a_path() -> None:
    async with client(make_app(speaking(), model_name="org/name")) as http:
        assert (await http.get("/v1/models/org/name")).json()["id"] == "org/name"


async def test_ready() -> None:
    async with client(make_app(speaking())) as http:
        response = await http.get("/health/ready")
    assert (response.status_code, response.json()["state"]) == (200, "ready")
    assert response.json()["reason"] is None


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


async def test_the_schema() -> None:
    async with client(make_app(speaking())) as http:
        schema = (await http.get("/openapi.json")).json()
        assert (await http.get("/docs")).status_code == 200
    known = schema["components"]["schemas"]
    for reference in references(schema):
        assert reference.removeprefix("#/components/schemas/") in known, reference
    assert "HTTPValidationError" not in known
    for path, body in (("/v1/chat/completions", ChatCompletionBody), ("/v1/completions", CompletionBody)):
        operation = schema["paths"][path]["post"]
        content = operation["requestBody"]["content"]
        assert content == {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        assert set(known[body.__name__]["properties"]) == set(body.model_fields)
        assert known[body.__name__]["additionalProperties"] is True  # the answer's warnings name them
        assert {"400", "404", "413", "415", "429", "500", "503"} <= set(operation["responses"])
        for status, response in operation["responses"].items():
            if status != "200":
                expected = {"$ref": "#/components/schemas/ErrorResponse"}
                assert response["content"]["application/json"]["schema"] == expected
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "\\u0000" not in str(schema)
    assert set(schema["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages/count_tokens",
        "/inference/v1/generate",
        "/v1/models",
        "/v1/models/{model_id}",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/ping",
        "/version",
        "/load",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/admin/settings",
        "/admin/changes",
    }


async def test_the_schema_has_the_bounds_of_prompts() -> None:
    async with client(make_app(speaking())) as http:
        known = (await http.get("/openapi.json")).json()["components"]["schemas"]
    text, texts, token_ids, lists = known["CompletionBody"]["properties"]["prompt"]["oneOf"]
    token_id = {"type": "integer", "minimum": 0, "maximum": 258, "title": "TokenId"}
    assert token_ids["items"] == lists["items"]["items"] == token_id
    assert token_ids["minItems"] == texts["minItems"] == lists["minItems"] == lists["items"]["minItems"] == 1
    assert "minLength" not in text  # a token begins every sequence
    bias = known["CompletionBody"]["properties"]["logit_bias"]["anyOf"][0]
    assert bias["propertyNames"] == {"pattern": "^(0|[1-9][0-9]{0,8})$"}


@pytest.mark.process
@pytest.mark.parametrize("module", ["server.app", "tests.server.fake_engine"])
def test_importing_brings_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
