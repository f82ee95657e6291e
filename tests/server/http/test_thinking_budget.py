"""The server's budget of reasoning, where the model's own template has no place for one."""

from __future__ import annotations

from server.app import create_app
from server.chat.jinja import JinjaFormat
from tests.server.chat.kit import EOS, VOCABULARY, ids, user
from tests.server.http.test_deepseek import engine_of
from tests.server.kit import client, make_config


async def test_reasoning_that_the_model_opens_itself_has_the_servers_budget() -> None:
    engine = engine_of("<think>on and on and on", f"Two.{EOS}")
    chat = JinjaFormat("{% for m in messages %}{{ m.content }}{% endfor %}", reasons=True)
    app = create_app(make_config(thinking_budget=4), engine, VOCABULARY, chat)
    async with client(app) as http:
        reply = await http.post("/v1/chat/completions", json={"messages": [user("?")]})
    message = reply.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("on a", "Two.")
    assert engine.submitted[1].prompt_token_ids[-1] == ids("</think>")[0]
