"""Chat templates in the shape of published ones, written for these tests."""

HERMES = """{% if tools %}<system>
Tools in <tools></tools>:
<tools>
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% endif %}
{% for message in messages %}
[{{ message.role }}]{{ message.content }}
{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
"""

LLAMA = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}#system {{ message.content }}~
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call a message') }}{% endif %}
{%- set called = message.tool_calls[0].function -%}
#assistant {"name": "{{ called.name }}", "parameters": {{ called.arguments | tojson }}}~
{%- elif message.role in ['tool', 'ipython'] %}#ipython {{ message.content | tojson }}~
{%- else %}
{%- if tools and message.role == 'user' and loop.index0 == (1 if messages[0].role == 'system' else 0) -%}
#tools {% for tool in tools %}{{ tool | tojson }}{% endfor %}
 Respond as {"name": function name, "parameters": dictionary of argument name and its value}.~
{%- endif -%}
#{{ message.role }} {{ message.content }}~
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}#assistant {% endif %}
"""

PYTHONIC = """{%- if tools %}#tools {% for tool in tools %}{{ tool | tojson }}{% endfor %}
 Put calls as [func_name1(params_name1=params_value1), func_name2(params)].~
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}#assistant [
{%- for call in message.tool_calls %}{{ call.function.name }}(
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson }}{{ ', ' if not loop.last }}
{%- endfor %}){{ ', ' if not loop.last }}
{%- endfor %}]~
{%- else %}#{{ message.role }} {{ message.content }}~
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}#assistant {% endif %}
"""

_MISTRAL = """{%%- if messages[0].role == 'system' %%}{%% set system = messages[0].content %%}{%% set messages = messages[1:] %%}
{%%- else %%}{%% set system = '' %%}{%% endif %%}
{%%- for message in messages %%}
{%%- if message.role == 'user' %%}
{%%- if tools and loop.first %%}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{%% endif -%%}
[INST]{{ system + ' ' if loop.first and system }}{{ message.content }}[/INST]
{%%- elif message.tool_calls %%}%s
{%%- elif message.role == 'tool' %%}
{%%- if message.tool_call_id | length != 9 %%}{{ raise_exception('ids have nine letters') }}{%% endif -%%}
[TOOL_RESULTS]{{ message.tool_call_id }} {{ message.content }}[/TOOL_RESULTS]
{%%- else %%}{{ message.content }}{{ eos_token }}
{%%- endif %%}
{%%- endfor %%}
"""

MISTRAL_LIST = (
    _MISTRAL
    % """[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{{- ', ' if not loop.last }}
{%- endfor %}]{{ eos_token }}"""
)

MISTRAL = (
    _MISTRAL
    % """
{%- for call in message.tool_calls -%}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}{{ eos_token }}"""
)

PLAIN = """{% for message in messages %}
[{{ message.role }}]{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}
"""

GEMMA = """{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
[{{ message.role }}]{{ message.content }}
{%- endfor %}
{%- if add_generation_prompt %}[model]{% endif %}
"""

_TAGGED = """{%%- if tools %%}#tools {%% for tool in tools %%}{{ tool | tojson }}{%% endfor %%}
 %s~
{%%- endif %%}
{%%- for message in messages %%}
#{{ message.role }} {{ message.content }}
{%%- for call in message.tool_calls or [] %%}
%s
{%%- endfor %%}~
{%%- endfor %%}
{%%- if add_generation_prompt %%}
#assistant {%% endif %%}
"""

QWEN_CODER = _TAGGED % (
    "Call as <function=example>",
    """<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}
</function>
</tool_call>""",
)

GLM = _TAGGED % (
    "Call as <tool_call>{function-name}",
    """<tool_call>{{ call.function.name + "\\n" }}
{%- for key, value in call.function.arguments | items %}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}
</tool_call>""",
)
