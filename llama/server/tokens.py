"""Texts as tokens and back: /tokenize, /detokenize, /apply-template and /tokenizer_info."""

from llama.chat.prompts import UNSAFE_ERROR, has_tags
from llama.chat.roles import prompt_tokens
from llama.server import schemas_tokens as schemas
from llama.server.dialogs import chat_options
from llama.server.errors import ApiError
from llama.server.schemas_chat import ChatRequest
from llama.server.scores import token_bytes, token_text
from llama.server.service import Service
from llama.server.tasks import chosen_adapter
from llama.tokenizer import BaseTokenizer, Tokenizer


def tokenize(service: Service, body: schemas.TokenizeRequest) -> schemas.Tokenized:
    """Return a text's tokens, or those of a dialog's prompt."""
    chosen_adapter(service, body.model or None)
    ids = _ids(service, body)
    # There may be a million, of which each is described once and none is validated.
    found = schemas.Tokenized.model_construct(
        count=len(ids), max_model_len=service.max_tokens, tokens=ids
    )
    if body.with_pieces:
        pieces = {i: schemas.TokenPiece(id=i, piece=_piece(service, i)) for i in set(ids)}
        found.tokens = [pieces[i] for i in ids]
    if body.return_token_strs:
        texts = {i: service.llama.tokenizer.token_piece(i) for i in set(ids)}
        found.token_strs = [texts[i] for i in ids]
    return found


def _ids(service: Service, body: schemas.TokenizeRequest) -> list[int]:
    tokenizer, chat = service.llama.tokenizer, body.chat
    is_added = body.add_special if body.add_special_tokens is None else body.add_special_tokens
    if is_added is None:
        is_added = body.prompt is not None
    bos = is_added and tokenizer.add_bos
    if chat is not None:
        return [tokenizer.bos_id] * bos + _prompt(service, chat)
    text = body.content if body.prompt is None else body.prompt
    assert text is not None
    if body.parse_special is False:
        return tokenizer.encode(text, bos=bos, eos=False)
    return service.spellings.encode(text, bos=bos)


def _piece(service: Service, token: int) -> str | list[int]:
    tokenizer = service.llama.tokenizer
    text = token_text(tokenizer, token)
    found = token_bytes(tokenizer, token) if "\ufffd" in text else None
    return text if found is None else found


def detokenize(service: Service, body: schemas.DetokenizeRequest) -> schemas.Detokenized:
    """Return the text of tokens."""
    chosen_adapter(service, body.model or None)
    n_words = service.llama.tokenizer.n_words
    if max(body.tokens, default=0) >= n_words:
        raise ApiError(400, f"tokens: token ids end with {n_words - 1}", "tokens")
    text = service.spellings.decode(body.tokens)
    return schemas.Detokenized(content=text, prompt=text)


def apply_template(service: Service, body: ChatRequest) -> schemas.AppliedTemplate:
    """Return the prompt that a request for chat has, as a text."""
    chosen_adapter(service, body.model)
    return schemas.AppliedTemplate(prompt=service.spellings.decode(_prompt(service, body)))


def _prompt(service: Service, body: ChatRequest) -> list[int]:
    """Return the ids of the prompt that a request for chat has.

    Raises:
        ApiError: the chat format can't hold the dialog.
    """
    llama, dialog = service.llama, body.dialog
    options = chat_options(service, body.options)
    if has_tags(dialog, llama.chat.tags):
        raise ApiError(400, UNSAFE_ERROR, "messages")
    try:
        return prompt_tokens(llama.chat, llama.tokenizer, dialog, options)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), "messages") from error


def tokenizer_info(service: Service) -> schemas.TokenizerInfo:
    """Return what a client needs to write prompts for the tokenizer."""
    llama = service.llama
    tokenizer = llama.tokenizer
    is_model = isinstance(tokenizer, Tokenizer)
    return schemas.TokenizerInfo(
        tokenizer_class="LlamaTokenizer" if is_model else "PreTrainedTokenizerFast",
        bos_token=_named(tokenizer, tokenizer.bos_id),
        eos_token=_named(tokenizer, tokenizer.eos_id),
        pad_token=_named(tokenizer, tokenizer.pad_id),
        add_bos_token=tokenizer.add_bos,
        model_max_length=service.max_tokens,
        chat_template=llama.chat.template,
    )


def _named(tokenizer: BaseTokenizer, token: int) -> str | None:
    return tokenizer.token_piece(token) if token >= 0 else None
