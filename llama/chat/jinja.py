"""Meta's formats of plain dialogs in Jinja's language, for other libraries and for clients.

This library writes their tokens itself (``llama.chat.prompts``, ``llama.chat.llama3``). Calls of
tools need a template of the checkpoint's own.
"""

from llama.chat.prompts import B_INST, B_SYS, E_INST, E_SYS

_SYSTEM = "{%- if messages[0]['role'] in ['system', 'developer'] -%}"
# A message's text, which may be in parts, or none beside calls of tools.
_TEXT = (
    "{%- if 'tool_calls' in message and message['tool_calls'] -%}"
    "{{- raise_exception('this format has no calls of tools') -}}{%- endif -%}"
    "{%- set text = message['content'] -%}"
    "{%- if text is none -%}{%- set text = '' -%}"
    "{%- elif text is not string -%}{%- set text = text | map(attribute='text') | join -%}"
    "{%- endif -%}"
)
_IN_TURNS = (
    "{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    "{{- raise_exception('expected messages of user and assistant in turns, after one of the "
    "system or none') -}}{%- endif -%}"
)

# lm-eval gives templates no control pieces.
INST = (
    "{%- set bos_token, eos_token = bos_token | default('<s>'), eos_token | default('</s>') -%}"
    f"{_SYSTEM}{{%- set message, turns = messages[0], messages[1:] -%}}{_TEXT}"
    f"{{%- set system = {B_SYS!r} + text + {E_SYS!r} -%}}"
    "{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}"
    f"{{%- for message in turns -%}}{_IN_TURNS}{_TEXT}"
    "{%- set text = ((system if loop.first else '') + text) | trim -%}"
    "{%- if message['role'] == 'user' -%}"
    f"{{{{- bos_token + '{B_INST} ' + text + ' {E_INST}' -}}}}"
    "{%- else -%}{{- ' ' + text + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

LLAMA3 = (
    "{{- bos_token | default('<|begin_of_text|>') -}}"
    f"{_SYSTEM}{{%- set message, turns = messages[0], messages[1:] -%}}{_TEXT}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}{{- text -}}{{- '<|eot_id|>' -}}"
    "{%- else -%}{%- set turns = messages -%}{%- endif -%}"
    f"{{%- for message in turns -%}}{_IN_TURNS}{_TEXT}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- text -}}{{- '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
