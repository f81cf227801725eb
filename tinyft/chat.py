"""Chat: a conversation as the one text that a language model was tuned to continue.

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = chat_prompt(messages, tokenizer)            in the format that the model's own file names
    prompt = chat_prompt(messages, "chatml")             in a format named here

A model's file holds its format as a program in the language Jinja, `chat_template`. Programs of files are not run here:
`template_of` recognises the formats of this module in its text, and refuses every other one.

    chatml    <|im_start|>user\nWhat is ...?<|im_end|>\n<|im_start|>assistant\n            SmolLM2, Qwen2
    llama3    <|start_header_id|>user<|end_header_id|>\n\nWhat is ...?<|eot_id|>...        Llama 3
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from . import checks
from .keywords import checked_keywords

__all__ = ["TEMPLATES", "ChatTemplate", "chat_end", "chat_prompt", "chatml", "llama3", "template_of"]

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, str]]


# ── the formats ──────────────────────────────────────────────────────────────────────────────────────────────────────
def chatml(messages: Messages, add_generation_prompt: bool = True) -> str:
    """Each message as "<|im_start|>role\\ncontent<|im_end|>\\n"; then, for the model to continue, the assistant's
    beginning."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"{text}<|im_start|>assistant\n" if add_generation_prompt else text


def llama3(messages: Messages, add_generation_prompt: bool = True) -> str:
    """Each message as "<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>", after <|begin_of_text|>.

    White space around a content is removed."""
    parts = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in messages]
    text = "<|begin_of_text|>" + "".join(parts)
    return f"{text}<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt else text


@dataclass(frozen=True)
class ChatTemplate:
    """A chat format.

    render  the function that writes messages: (messages, add_generation_prompt) -> text
    end     the token that ends a message: generation stops there
    system  the system message of a conversation that begins without one; None: there is none"""
    render: Callable[[Messages, bool], str]
    end: str
    system: str | None = None

    def __call__(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The conversation as one text, with the default system message if it begins without one."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.render(messages, add_generation_prompt)


CHATML = ChatTemplate(chatml, "<|im_end|>")
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": ChatTemplate(chatml, "<|im_end|>",
                            "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2": ChatTemplate(chatml, "<|im_end|>", "You are a helpful assistant."),
    "qwen2.5": ChatTemplate(chatml, "<|im_end|>",
                            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "llama3": ChatTemplate(llama3, "<|eot_id|>"),
}


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────
@checked_keywords
def chat_prompt(messages: Messages, template: Any = "chatml", *, add_generation_prompt: bool = True) -> str:
    """A conversation as the text that the model continues. Encode it without further special tokens.

    messages  [{"role": "user", "content": "Hello"}, ...]; the roles are system, user and assistant
    template  a name in TEMPLATES, a ChatTemplate, or a tokenizer: then the format that its model's file names
    add_generation_prompt  True: the text ends with the beginning of the assistant's next message

    TypeError or ValueError, in one sentence, for a conversation that is none: an empty list, an unknown role, a content
    that is no text, no message of the user. ValueError for a template that is not known."""
    template = find_template(template)
    checks.flag("chat_prompt: add_generation_prompt", add_generation_prompt)
    check_messages(messages)
    return template(messages, add_generation_prompt)


@checked_keywords
def chat_end(template: Any = "chatml") -> str:
    """The token that ends a message in this format. template: as for chat_prompt."""
    return find_template(template).end


def find_template(template: Any) -> ChatTemplate:
    """The ChatTemplate of a name, or of a tokenizer. TypeError for another kind of value, ValueError for an unknown
    template."""
    if isinstance(template, ChatTemplate):
        return template
    if isinstance(template, str):
        return TEMPLATES[checks.one_of("chat_prompt: template", template, tuple(TEMPLATES))]
    wanted = "the name of a template, a ChatTemplate or a tokenizer"
    checks.instance("chat_prompt: template", template, Tokenizer, wanted)
    text = getattr(template, "chat_template", None)
    if text is None:
        raise ValueError("chat_prompt wants a tokenizer whose files hold a chat_template, got one without: name the "
                         f"format, template= one of {', '.join(TEMPLATES)}")
    return template_of(text)


def check_messages(messages: Any) -> None:
    """Refuse what is no conversation."""
    checks.instance("chat_prompt", messages, (list, tuple), "a list of messages")
    if not messages:
        raise ValueError("chat_prompt wants at least one message, got an empty list")
    for number, message in enumerate(messages, start=1):
        name = f"chat_prompt: message {number}"
        checks.instance(name, message, Mapping, 'a dict {"role": ..., "content": ...}')
        if set(message) != {"role", "content"}:
            got = ", ".join(checks.brief(key) for key in message) or "none"
            raise ValueError(f"{name} wants the keys role and content alone, got {got}")
        checks.one_of(f"{name}: role", message["role"], ROLES)
        checks.instance(f"{name}: content", message["content"], str, "a text")
    if all(message["role"] != "user" for message in messages):
        raise ValueError("chat_prompt wants a message of the role user, got none")


# ── templates of files ───────────────────────────────────────────────────────────────────────────────────────────────
# The sum in Jinja that writes one message of ChatML, without white space, with single quotes and message.role.
CHATML_MESSAGE = r"'<|im_start|>'+message.role+'\n'+message.content+'<|im_end|>'"
CHATML_DEFAULT = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^<>{}'\"|]*)<\|im_end\|>")
LLAMA3_MESSAGE = r"'<|start_header_id|>'+message.role+'<|end_header_id|>\n\n'+message.content|trim+'<|eot_id|>'"
# Words of templates that depend on more than the messages: dates, thoughts that are cut out, and documents.
BEYOND = ("strftime_now", "date_string", "think", "reasoning", "documents")
# Words of templates that write more than ChatML: tokens at the ends, contents without the white space around them.
BEYOND_CHATML = ("bos_token", "eos_token", "trim", "strip")


def template_of(text: str) -> ChatTemplate:
    """The format that a template in Jinja writes, recognised by its markers. ValueError if it is none of this module.

    text: `chat_template` of a tokenizer_config.json, or tokenizer.chat_template of a GGUF file"""
    checks.instance("template_of", text, str, "the text of a chat template")
    plain = re.sub(r"message\[(['\"])(\w+)\1\]", r"message.\2", text)
    plain = re.sub(r"\s", "", plain.replace("\n", r"\n")).replace('"', "'")
    if "add_generation_prompt" in text and not any(word in text for word in BEYOND):
        if CHATML_MESSAGE in plain and not any(word in text for word in BEYOND_CHATML):
            return chatml_of(text)
        if LLAMA3_MESSAGE in plain:
            return TEMPLATES["llama3"]
    raise ValueError("the chat template of this model is not known here: name the format it has, template= one of "
                     f"{', '.join(TEMPLATES)}, or write the prompt yourself")


def chatml_of(text: str) -> ChatTemplate:
    """ChatML with the default system message that a template in Jinja holds; the last one, if it holds several.

    Before the last one, templates may hold the system message of conversations with tools."""
    defaults = CHATML_DEFAULT.findall(text)
    return ChatTemplate(chatml, "<|im_end|>", defaults[-1].replace("\\n", "\n")) if defaults else CHATML
