"""Marks what the assistant says in the chat templates of Qwen3 and its descendants, SDAR and TraDo among them."""

_BRANCH = '{%- elif message.role == "assistant" %}'
_NEXT_BRANCH = '{%- elif message.role == "tool" %}'
_HEADER = "'<|im_start|>' + message.role + '\\n"
_BODY = "{%- if loop.index0 > ns.last_query_index %}"
_END = "{{- '<|im_end|>\\n' }}"


def mark_assistant(chat_template: str | None) -> str | None:
    r"""
    The same template with `{% generation %}` around the assistant's turns, which `assistant_only_loss` needs.

    TRL has training templates for exact texts of templates only, and SDAR's is not among them. What is rendered does
    not change.

    Args:
        chat_template (`str`, *optional*):
            Chat template of a tokenizer.

    Returns:
        `str` or `None`: The marked template, `None` if this one is built differently.
    """
    if chat_template is None or not isinstance(chat_template, str):
        return None
    before, found, rest = chat_template.partition(_BRANCH)
    branch, found_next, after = rest.partition(_NEXT_BRANCH)
    if not (found and found_next and branch.count(_BODY) == 1 and branch.count(_END) == 1 and _HEADER in branch):
        return None
    # The turn's header comes first, then all that the assistant says, in one block.
    branch = branch.replace(f"{_HEADER}' + ", "").replace(_HEADER, "'")
    branch = branch.replace(_BODY, f"{{{{- {_HEADER}' }}}}\n        {{%- generation %}}\n        {_BODY}")
    branch = branch.replace(_END, f"{_END}\n        {{%- endgeneration %}}")
    return before + found + branch + found_next + after
