"""instructor: structured answers by tools and by JSON schema. Run as a program: the server's URL, the model."""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class City(BaseModel):
    """A city. Nothing else is allowed in it, else a small model may go on to other fields up to its limit."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Paris", "Rome"]
    people: Literal[1, 2]


def main(url: str, model: str) -> None:
    for mode in (instructor.Mode.TOOLS_STRICT, instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode
        )
        city = client.chat.completions.create(
            model=model, response_model=City, messages=[{"role": "user", "content": "Paris"}], max_tokens=400,
            temperature=0, max_retries=1,
        )  # fmt: skip
        assert isinstance(city, City), mode


main(*sys.argv[1:])
