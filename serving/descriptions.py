"""What the API's page says of each field: the OpenAPI schema's descriptions.

A field that protocol.py describes itself keeps its words; the sampling parameters have those of
SamplingParams, so that they are said once; the others are in the tables here.
"""

from typing import Any

from flags import field_docstrings
from sequence import SamplingParams

FIELDS = {
    "stream": "Whether the answer comes in pieces, as server-sent events, ending with [DONE].",
    "stream_options": "What a stream has besides the choices.",
    "messages": "The turns of the conversation, the oldest first.",
    "role": "Who speaks.",
    "type": "The kind of thing this is.",
    "text": "The text.",
    "prompt": "The text.",
    "tokens": "Token ids.",
    "count": "How many tokens there are.",
    "max_model_len": "Tokens that the model's context has.",
    "model": "The model's name, as /v1/models gives it.",
    "id": "A name of its own.",
    "object": "The kind of object, in OpenAI's words.",
    "created": "Seconds since 1970.",
    "owned_by": "Who serves it.",
    "data": "The model, in a list of one.",
    "choices": "One for each sample; of a stream, what is new.",
    "usage": "The tokens of the request; in a stream only where stream_options ask for it.",
    "prompt_tokens": "Tokens of the prompts.",
    "completion_tokens": "New tokens.",
    "total_tokens": "Both together.",
    "index": "Number of the sample.",
    "message": "What the assistant says.",
    "delta": "What the assistant goes on to say.",
    "content": "What is said; of logprobs, an entry for each token.",
    "logprobs": "The logprobs of its tokens, if they were asked for.",
    "finish_reason": "stop: the model or a stop string ended it; length: max_tokens did; "
    "tool_calls: it stopped, and has called functions.",
    "token_ids": "The new tokens, if return_token_ids asks for them.",
    "prompt_token_ids": "The prompt's tokens, if return_token_ids asks for them.",
    "prompt_logprobs": "An entry for each token of the prompt, if they were asked for; the first "
    "is null.",
    "token_logprobs": "The logprob of each token.",
    "top_logprobs": "The likeliest tokens at each position, with their logprobs.",
    "logprob": "The natural logarithm of its probability.",
    "bytes": "The token's bytes.",
    "decoded_token": "The token's text.",
    "function": "A function, by its name.",
    "name": "The function's name.",
    "arguments": "What it is called with, a JSON object as text.",
    "error": "What is wrong.",
    "param": "The field of the request that is wrong.",
    "code": "OpenAI's word for what has happened.",
}

FIELDS_OF = {
    "ChatRequest": {"logprobs": "Whether each new token comes with its logprob."},
    "ErrorDetail": {"message": "A sentence that says what is wrong, and the way out."},
    "TokenizeRequest": {"prompt": "The text; or messages in its place."},
}
"""Where a field means something else than FIELDS says, by the schema's name."""

REQUESTS = ("CompletionRequest", "ChatRequest")


def describe(schema: dict[str, Any]) -> None:
    """Give a description to each field of an OpenAPI schema that has none, in place."""
    sampling = field_docstrings(SamplingParams)
    for name, definition in schema["components"]["schemas"].items():
        known = FIELDS | (sampling if name in REQUESTS else {}) | FIELDS_OF.get(name, {})
        for field, properties in definition.get("properties", {}).items():
            if field in known:
                properties.setdefault("description", known[field])
