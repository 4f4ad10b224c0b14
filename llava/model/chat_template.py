"""Our conversation templates as chat templates of transformers, and `<image>` as a token of a tokenizer."""

from __future__ import annotations

import json

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`, which is added where it is not there."""
    tokenizer.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))  # type: ignore[arg-type]


def own_text_behind(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """What goes between a special token and a text, so that the text is tokenised as one of its own: a space, or nothing.

    So LLaVA tokenises what stands behind an image, and every tokenizer what stands behind the bos that it writes itself. A SentencePiece
    vocabulary begins such a text with a space piece, which not every tokenizer puts behind a token.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    wanted = [*ids("a"), tokenizer.convert_tokens_to_ids(token), *ids("\nb")]
    fitting = [space for space in ("", " ") if ids(f"a{token}{space}\nb") == wanted]
    # Of two, the one behind which a text keeps the space that it begins with.
    return max(fitting, key=lambda space: len(ids(f"a{token}{space} \nb")), default="")


def text_begin(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a finished prompt begins with for those who tokenise it without special tokens: the bos, where the tokenizer writes one."""
    bos = tokenizer.bos_token
    if bos is None or list(tokenizer("").input_ids)[:1] != [tokenizer.bos_token_id]:
        return ""
    return bos + own_text_behind(tokenizer, bos)


def jinja_template(template: Conversation, begin: str = "", behind_image: str = "") -> str | None:
    """A chat template that writes what `Conversation.get_prompt` writes; `None` for one without roles.

    Images that stand together behind the words of their turn come first, as in `llava.messages.images_first`. A system turn in front
    replaces the template's own system text. Answers and what ends them are marked as generated, for `return_assistant_tokens_mask`.

    Args:
        begin: text in front of everything (`text_begin`). behind_image: text behind each `<image>` (`own_text_behind`), where no processor
            of ours puts it there.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return None
    image = json.dumps(DEFAULT_IMAGE_TOKEN + behind_image)
    content = (
        f"{{{{ {json.dumps(begin)} }}}}"
        "{%- macro text(message) -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- set images = message.content | selectattr('type', 'equalto', 'image') | list -%}"
        "{%- set words = message.content | rejectattr('type', 'equalto', 'image') | list -%}"
        "{%- for part in (images + words if message.content == words + images else message.content) -%}"
        f"{{%- if part.type == 'image' -%}}{{{{ {image} }}}}{{%- else -%}}{{{{ part.text }}}}{{%- endif -%}}"
        "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages -%}"
        "{%- set system = text(messages[0]) if messages and messages[0].role == 'system' else '' -%}"
        "{%- for message in turns -%}{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        "{{ raise_exception('The roles have to be user and assistant in alternation, behind at most one system turn.') }}"
        "{%- endif -%}{%- endfor -%}"
    )
    write = _jinja_llama_2 if template.sep_style is SeparatorStyle.LLAMA_2 else _jinja_roles
    return content + write(template)


def _around_system(template: Conversation) -> tuple[str, str]:
    """What `get_prompt` writes in front of a system text, and behind it."""
    probe, mark = template.copy(), "\x00"
    probe.set_system_message(mark)
    head, _, tail = probe.get_prompt().partition(mark)
    return head, tail


def _jinja_roles(template: Conversation) -> str:
    """Turns of role, text and separator, behind the system text and the template's own examples."""
    colon = "" if template.sep_style is SeparatorStyle.MPT else ":"
    gap = colon and ": "
    end = template.sep2 if template.sep_style is SeparatorStyle.TWO else template.sep
    user, assistant = template.roles
    head, tail = map(json.dumps, _around_system(template))
    return (
        f"{{%- if system | trim -%}}{{{{ {head} + system + {tail} }}}}{{%- else -%}}"
        f"{{{{ {json.dumps(template.get_prompt())} }}}}{{%- endif -%}}"
        "{%- for message in turns -%}{%- if message.role == 'user' -%}"
        f"{{{{ {json.dumps(user + gap)} + text(message) + {json.dumps(template.sep)} }}}}{{%- else -%}}"
        f"{{{{ {json.dumps(assistant + gap)} }}}}{{%- generation -%}}{{{{ text(message) + {json.dumps(end)} }}}}{{%- endgeneration -%}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {json.dumps(assistant + colon)} }}}}{{%- endif -%}}"
    )


def _jinja_llama_2(template: Conversation) -> str:
    """Instructions in brackets; the tokenizer writes the first separator, which is its bos."""
    own = json.dumps(template.system)
    return (
        f"{{%- set system = system if system | trim else {own} -%}}"
        "{%- for message in turns -%}{%- if message.role == 'user' -%}"
        f"{{{{ {json.dumps('[INST] ')} if loop.first else {json.dumps(template.sep + '[INST] ')} }}}}"
        "{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
        "{{ text(message) + ' [/INST]' }}{%- else -%}{{ ' ' }}"
        f"{{%- generation -%}}{{{{ text(message) + {json.dumps(f' {template.sep2}')} }}}}{{%- endgeneration -%}}"
        "{%- endif -%}{%- endfor -%}"
    )
