"""What the server tells of itself, as pydantic models: its health, its versions, its KV cache."""

from typing import Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    """The server would serve a request now."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Of the server, and of what it computes with."""

    version: str
    jax: str


class Page(BaseModel):
    """One page of the KV cache that is in use."""

    page: int
    holders: list[tuple[int, int]] = Field(
        description="(request, sample) of each sequence that has the page in its table"
    )
    cached: bool = Field(description="other prompts can find it")


class Pool(BaseModel):
    """The pages of the KV cache, and who holds them."""

    pages: int = Field(description="in the pool; page 0 is the null page")
    page_size: int
    running: int
    waiting: int
    requests: dict[int, str] = Field(description="X-Request-Id of each request that has not ended")
    used: list[Page] = Field(description="all other pages are free and empty")
