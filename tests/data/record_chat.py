"""Records what transformers makes of chat templates.

    python tests/data/record_chat.py     # rewrites tests/data/chat.json

The templates are written for this test, each with the constructs of some family's. Needs transformers and jinja2.
"""

import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    # A header and an end for each message.
    "turns": (
        "{% for message in messages %}"
        "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    ),
    # Trimmed contents, a first message that may be the system's, marks for what the assistant says.
    "headers": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" }}
{{- "Today: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if message.role == "assistant" and 'tool_calls' not in message %}
        {{- "<|header|>assistant<|/header|>\\n\\n" }}
        {% generation %}{{- message.content | trim + "<|eot|>" }}{% endgeneration %}
    {%- else %}
        {{- "<|header|>" + message['role'] + "<|/header|>\\n\\n" + message['content'] | trim + "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
""",
    # Roles must alternate; names of roles change; Python's methods.
    "alternate": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'].strip() }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '</turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<turn>model\n' }}
{%- endif -%}
""",
    # Tools as JSON, a namespace, a reversed walk, thoughts that are cut away.
    "namespace": """{%- if tools %}
    {{- '<|start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not message.content.startswith('<tool>') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|start|>' ~ message.role ~ '\\n' ~ content ~ '<|end|>' ~ '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and loop.last %}
            {{- '<|start|>' + message.role + '\\n<think>\\n\\n</think>\\n\\n' + content.rstrip() }}
        {%- else %}
            {{- '<|start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # Macros, filters with arguments, break, slices, trimming of lines.
    "macros": """{% macro show(name, text, upper=false) %}
[{{ name|upper if upper else name|capitalize }}] {{ text|replace('\t', ' ')|trim }}
{% endmacro %}
{% set seen = [] %}
{% for message in messages if message.role != 'tool' %}
    {% if message.content|length > 200 %}
        {% break %}
    {% endif %}
{{ show(message.role, message['content'], upper=loop.first) }}
    {% if not loop.last %}
---
    {% endif %}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} of {{ messages|length }}
{% if add_generation_prompt %}
[{{ 'assistant'.title() }}]{% endif %}
""",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up: 'a' < \"b\" & c > d, ünï.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "n": 1.5, "none": None, "yes": True},
        },
    }
]

USER = {"role": "user", "content": "  What is\ta tape?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA list of what was done. \n"}
SYSTEM = {"role": "system", "content": " You are brief.\n"}
CONVERSATIONS = [
    [USER],
    [USER, ANSWER],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, {"role": "user", "content": "Und „so“? {{ 1 + 1 }} {% if x %}"}],
    [SYSTEM, USER, ANSWER, {"role": "user", "content": "And so on?"}, {"role": "assistant", "content": ""}],
    [USER, USER],
    [{"role": "system", "content": [{"type": "text", "text": "As parts."}]}, USER],
    [{"role": "user", "content": "x" * 201}],
]


def main() -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = []
    for name, template in TEMPLATES.items():
        for messages in CONVERSATIONS:
            for tools, prompt in [(None, True), (None, False), (TOOLS, True)]:
                case = {"template": name, "messages": messages, "tools": tools, "prompt": prompt}
                try:
                    (case["text"],), _ = render_jinja_template(
                        conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **tokens
                    )
                except Exception as error:
                    case["error"] = str(error)
                cases.append(case)
    recorded = {"transformers": transformers.__version__, "tokens": tokens, "templates": TEMPLATES, "cases": cases}
    path = Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(recorded, ensure_ascii=False, indent=1) + "\n")
    print(len(cases), "cases,", sum("error" in case for case in cases), "of them errors:", {c["error"] for c in cases if "error" in c})


if __name__ == "__main__":
    main()
