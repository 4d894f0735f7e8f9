"""What the server tells of itself, as pydantic models: its health, its versions, its KV cache."""

from typing import Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    """The server would serve a request now."""

    status: Literal["ok"] = Field(default="ok", description="always this word")


class Version(BaseModel):
    """Of the server, and of what it computes with."""

    version: str = Field(description="of the server")
    jax: str = Field(description="version of JAX")


class Page(BaseModel):
    """One page of the KV cache that is in use."""

    page: int = Field(description="number of the page")
    holders: list[tuple[int, int]] = Field(
        description="(request, sample) of each sequence that has the page in its table"
    )
    cached: bool = Field(description="other prompts can find it")


class Pool(BaseModel):
    """The pages of the KV cache, and who holds them."""

    pages: int = Field(description="in the pool; page 0 is the null page")
    page_size: int = Field(description="tokens of a page")
    running: int = Field(description="sequences that have pages")
    waiting: int = Field(description="sequences in the queue")
    queried_tokens: int = Field(description="prompt tokens since the start")
    hit_tokens: int = Field(description="of them, those found in the prefix cache")
    requests: dict[int, str] = Field(description="X-Request-Id of each request that has not ended")
    used: list[Page] = Field(description="all other pages are free and empty")
