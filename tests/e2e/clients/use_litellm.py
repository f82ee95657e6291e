"""litellm: chat, a stream, tools, Responses and Anthropic's interface. Run as a program: the server's URL, the model."""

import sys

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "Weather in Rio?"}]


def main(url: str, model: str) -> None:
    own = {
        "model": f"openai/{model}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "temperature": 0,
        "num_retries": 0,
    }
    assert litellm.completion(messages=ASK, max_tokens=20, **own).choices[0].message.content
    chunks = list(litellm.completion(messages=ASK, max_tokens=20, stream=True, **own))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    named = {"type": "function", "function": {"name": "weather"}}
    answer = litellm.completion(messages=ASK, tools=[TOOL], tool_choice=named, max_tokens=60, **own)
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert litellm.text_completion(
        prompt="x =", max_tokens=5, **own | {"model": f"text-completion-openai/{model}"}
    ).choices
    assert litellm.responses(input="Hi", max_output_tokens=10, **own).output


main(*sys.argv[1:])
