"""The chat format as a Jinja template, for programs that open our checkpoints.

out: rendered by transformers and tokenised without adding special tokens, the ids of
`render_chat`; a picture is `<|image|>`, which the processor replaces by the picture's block
"""

CHAT_TEMPLATE = """\
{#- One message: <|header_start|>ROLE<|header_end|>, two newlines, the content, <|eot|>. -#}
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
    {%- if role not in ['system', 'user', 'assistant', 'ipython'] -%}
        {{- raise_exception('unknown role ' ~ role) -}}
    {%- endif -%}
    {%- set body = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set body.text = message['content'] -%}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {%- set body.text = body.text ~ item['text'] -%}
            {%- elif item['type'] == 'image' and role != 'system' -%}
                {%- set body.text = body.text ~ '<|image|>' -%}
            {%- else -%}
                {{- raise_exception(role ~ ' message with a ' ~ item['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|header_start|>' ~ role ~ '<|header_end|>\\n\\n' -}}
    {{- (body.text | trim if role == 'system' else body.text) ~ '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' -}}
{%- endif -%}
"""
