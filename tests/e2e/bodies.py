"""What agents and user interfaces send: one typical body for each, written from what their requests look like."""

from __future__ import annotations

from typing import Any

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USAGE = {"include_usage": True}
HI = [{"role": "user", "content": "Hi!"}]
SYSTEM = [{"role": "system", "content": "You are a helpful assistant."}, *HI]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "You edit code."}]},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rename x."}, {"type": "text", "text": "<file>a.py</file>"}],
    },
]


def tool(name: str, *, strict: bool | None = None, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function: dict[str, Any] = {"name": name, "description": f"Runs {name}.", "parameters": schema}
    if strict is not None:
        function["strict"] = strict
    return {"type": "function", "function": function}


STRING = {"type": "string", "description": "A text"}
READ = tool("read_file", path=STRING)
SEARCH = tool("search", query=STRING, limit={"type": "integer", "minimum": 1, "maximum": 50, "default": 10})
HASS = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on/opens a device or entity",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "area": {"type": "string"},
                "domain": {"type": "array", "items": {"type": "string"}},
            },
            "required": [],
        },
    },
}
NO_PARAMETERS = {"type": "function", "function": {"name": "get_time", "description": "Says the time."}}


def called(content: Any = None, *, name: str = "read_file", **extra: Any) -> list[dict[str, Any]]:
    call = {"id": "call_a1", "type": "function", "function": {"name": name, "arguments": '{"path": "a.py"}'}}
    return [
        *SYSTEM,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_a1", "content": "x = 1", **extra},
    ]


FLAT = {"type": "function", **READ["function"], "strict": False}
ITEM = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi!"}]}]
CLAUDE_TOOL = {
    "name": "Bash",
    "description": "Runs a command.",
    "input_schema": {"type": "object", "properties": {"command": STRING}, "required": ["command"]},
}
EPHEMERAL = {"type": "ephemeral"}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "open-webui": (CHAT, {"stream": True, "messages": SYSTEM, "stream_options": USAGE}),
    "open-webui, with its own fields": (
        CHAT,
        {
            "stream": True, "messages": HI, "params": {}, "features": {"web_search": False}, "session_id": "s",
            "chat_id": "c", "id": "m", "background_tasks": {"title_generation": True},
        },
    ),
    "open-webui, a title": (CHAT, {"stream": False, "messages": HI, "max_completion_tokens": 1000}),
    "open-webui, native tools": (CHAT, {"stream": True, "messages": SYSTEM, "tools": [SEARCH, NO_PARAMETERS]}),
    "librechat": (
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi!"}]}], "temperature": 1, "top_p": 1,
            "presence_penalty": 0, "frequency_penalty": 0, "stream": True, "stream_options": USAGE, "user": "65f0",
        },
    ),
    "librechat, agent": (CHAT, {"messages": SYSTEM, "stream": True, "tools": [SEARCH], "tool_choice": "auto", "n": 1}),
    "continue, chat": (CHAT, {"messages": PARTS, "max_tokens": 2048, "temperature": 0.5, "stream": True}),
    "continue, agent": (
        CHAT,
        {"messages": called(""), "tools": [READ | {"displayTitle": "Read"}], "parallel_tool_calls": False, "stream": True},
    ),
    "continue, completion": (
        TEXT,
        {"prompt": "def f(", "max_tokens": 64, "temperature": 0.01, "stream": True, "stop": ["\n\n", "```", "<|endoftext|>", "/src/"]},
    ),
    "cline": (CHAT, {"messages": PARTS, "temperature": 0, "stream": True, "stream_options": USAGE}),
    "cline, native tools": (CHAT, {"messages": called(None), "temperature": 0, "stream": True, "tools": [READ | {"strict": False}], "tool_choice": "auto"}),
    "roo": (CHAT, {"messages": PARTS, "temperature": 0, "stream": True, "stream_options": USAGE, "max_completion_tokens": 4096, "parallel_tool_calls": False, "tools": [tool("ask", strict=True, question=STRING)]}),
    "aider": (CHAT, {"messages": SYSTEM, "temperature": 0, "stream": True}),
    "aider, commit message": (CHAT, {"messages": SYSTEM, "stream": False, "temperature": 0, "timeout": 600}),
    "zed": (
        CHAT,
        {
            "messages": called("Reading."), "stream": True, "stream_options": USAGE, "stop": [], "temperature": 1.0,
            "tools": [READ], "tool_choice": "auto", "parallel_tool_calls": False, "prompt_cache_key": "thread",
            "max_completion_tokens": 4096,
        },
    ),
    "n8n": (
        CHAT,
        {
            "temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "stream": True,
            "stream_options": USAGE, "tools": [SEARCH], "messages": called(""),
        },
    ),
    "home assistant": (
        CHAT,
        {
            "messages": [{"role": "system", "content": "You control a house."}, {"role": "user", "content": "Light on"}],
            "tools": [HASS], "max_tokens": 150, "top_p": 1.0, "temperature": 1.0, "user": "01JABC", "stream": True,
            "parallel_tool_calls": True,
        },
    ),
    "home assistant, a result": (CHAT, {"messages": called(None, name="HassTurnOn"), "tools": [HASS], "max_tokens": 150}),
    "langchain": (CHAT, {"messages": called(None, name="search"), "stream": False, "tools": [SEARCH], "tool_choice": "auto", "parallel_tool_calls": True}),
    "langchain, structured": (
        CHAT,
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "A", "schema": SEARCH["function"]["parameters"], "strict": True}}},
    ),
    "llamaindex": (CHAT, {"messages": SYSTEM, "stream": False, "temperature": 0.1, "tool_choice": "required", "tools": [SEARCH]}),
    "autogen": (
        CHAT,
        {"messages": [SYSTEM[0], {"role": "user", "name": "user_proxy", "content": "Hi!"}], "stream": False, "tools": [SEARCH]},
    ),
    "crewai": (CHAT, {"messages": SYSTEM, "stop": ["\nObservation:"], "stream": False}),
    "smolagents": (CHAT, {"messages": PARTS, "stop": ["Observation:", "Calling tools:"], "tools": [SEARCH], "tool_choice": "required"}),
    "openhands": (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "You code.", "cache_control": EPHEMERAL}]},
                *called([{"type": "text", "text": "Reading."}], name="read_file")[1:3],
                {"role": "tool", "tool_call_id": "call_a1", "name": "read_file", "content": [{"type": "text", "text": "x = 1", "cache_control": EPHEMERAL}]},
            ],
            "tools": [READ], "temperature": 0.0, "top_p": 1.0, "max_completion_tokens": 4096, "drop_params": True,
        },
    ),
    "goose": (CHAT, {"messages": SYSTEM, "tools": [READ, SEARCH], "temperature": 0.0, "stream": True, "stream_options": USAGE, "max_tokens": 4096}),
    "semantic kernel": (CHAT, {"messages": SYSTEM, "tools": [SEARCH], "tool_choice": "auto", "max_tokens": 100, "temperature": 1, "top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "stop": [], "logit_bias": {}}),
    "vercel ai sdk": (CHAT, {"messages": PARTS, "tools": [READ], "tool_choice": "auto", "stream": True, "stream_options": USAGE, "max_tokens": 1000}),
    "sillytavern": (
        CHAT,
        {
            "messages": SYSTEM, "temperature": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "top_k": 0,
            "min_p": 0, "top_a": 0, "typical_p": 1, "tfs": 1, "repetition_penalty": 1, "logit_bias": {}, "stop": [], "stream": True, "max_tokens": 300, "seed": -1,
        },
    ),
    "anythingllm": (CHAT, {"messages": SYSTEM, "temperature": 0.7, "stream": True, "max_tokens": 1024}),
    "dify": (CHAT, {"messages": SYSTEM, "stream": True, "temperature": 0.7, "user": "u", "stream_options": USAGE, "response_format": {"type": "text"}}),
    "chatbox": (CHAT, {"messages": SYSTEM, "stream": True, "temperature": 0.7, "top_p": 1}),
    "jan": (CHAT, {"messages": SYSTEM, "stream": True, "max_tokens": 2048, "stop": [], "frequency_penalty": 0, "presence_penalty": 0, "temperature": 0.7, "top_p": 0.95}),
    "copilot": (CHAT, {"messages": SYSTEM, "temperature": 0, "top_p": 1, "max_tokens": 4096, "n": 1, "stream": True, "tools": [READ], "intent": False}),
    "jetbrains": (CHAT, {"messages": SYSTEM, "stream": True, "temperature": 0.0, "max_tokens": 8, "store": False}),
    "instructor": (CHAT, {"messages": HI, "tools": [SEARCH], "tool_choice": {"type": "function", "function": {"name": "search"}}}),
    "json mode": (CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "seed": 7}),
    "promptfoo": (CHAT, {"messages": HI, "max_tokens": 1024, "temperature": 0, "seed": 0, "stop": []}),
    "an answer with empty calls": (CHAT, {"messages": [*HI, {"role": "assistant", "content": "Hi", "tool_calls": [], "refusal": None, "reasoning_content": ""}, *HI]}),
    "codex": (
        RESPONSES,
        {
            "instructions": "You code.", "input": ITEM, "tools": [FLAT], "tool_choice": "auto", "parallel_tool_calls": False,
            "reasoning": None, "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s",
        },
    ),
    "openai-agents": (
        RESPONSES,
        {"input": [*ITEM, {"type": "function_call", "call_id": "c1", "name": "read_file", "arguments": '{"path": "a"}', "id": "fc_1", "status": "completed"}, {"type": "function_call_output", "call_id": "c1", "output": "x"}], "tools": [FLAT], "include": [], "text": {"format": {"type": "text"}}},
    ),
    "claude code": (
        MESSAGES,
        {
            "system": [{"type": "text", "text": "You code.", "cache_control": EPHEMERAL}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi!", "cache_control": EPHEMERAL}]}],
            "tools": [CLAUDE_TOOL], "metadata": {"user_id": "user_1"}, "max_tokens": 32000, "temperature": 1, "stream": True,
            "thinking": {"type": "adaptive"}, "context_management": {"edits": []},
        },
    ),
    "claude code, a result": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "List."},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}, {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a.py"}], "is_error": False, "cache_control": EPHEMERAL}]},
            ],
            "tools": [CLAUDE_TOOL], "tool_choice": {"type": "auto"}, "max_tokens": 32000, "stream": True,
        },
    ),
    "fill in the middle, no suffix": (TEXT, {"prompt": "x = ", "max_tokens": 16, "temperature": 0, "top_p": 1, "n": 1, "stop": ["\n"], "stream": True, "echo": False, "suffix": None, "best_of": 1, "logprobs": None}),
}  # fmt: skip
