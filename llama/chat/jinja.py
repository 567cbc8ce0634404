"""Meta's chat formats as templates in Jinja's language, for other libraries and for clients.

This library writes their tokens itself (``llama.chat.prompts``, ``llama.chat.llama3``). Tools need
a template of the checkpoint's own.
"""

from llama.chat.prompts import B_INST, B_SYS, E_INST, E_SYS

INST = (
    "{%- if messages[0]['role'] == 'system' -%}"
    f"{{%- set system, turns = {B_SYS!r} + messages[0]['content'] + {E_SYS!r}, messages[1:] -%}}"
    "{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    "{{- raise_exception('expected messages of user and assistant in turns, after one of the "
    "system or none') -}}{%- endif -%}"
    "{%- if loop.first -%}{%- set content = (system + message['content']) | trim -%}"
    "{%- else -%}{%- set content = message['content'] | trim -%}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}"
    f"{{{{- bos_token + '{B_INST} ' + content + ' {E_INST}' -}}}}"
    "{%- else -%}{{- ' ' + content + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

LLAMA3 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- message['content'] + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    "{%- endif -%}"
)
