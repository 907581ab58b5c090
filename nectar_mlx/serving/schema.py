"""What requests may hold. msgspec checks types, so a bool is no number and there is no NaN; bounds are here and in
`answering`. null is the default everywhere, and fields that are not named are ignored."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ..answering import MAX_STOP_LENGTH, MAX_STOPS, Sampling
from ..core.types import JsonObject
from .errors import ApiError, refused
from .messages import MAX_MESSAGES, InputItems, Message, Messages, Name, from_items
from .tools import MAX_TOOLS, Choice, Tool

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Stop = Annotated[str, Meta(max_length=MAX_STOP_LENGTH)]
Offered = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None
Stops = Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | Stop | None


class TemplateOptions(Struct, forbid_unknown_fields=True):
    """What a request may tell the chat template."""

    enable_thinking: bool | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class StreamOptions(Struct):
    include_usage: bool | None = None


_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "repetition_penalty"),
    *("repetition_context_size", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
)


class Generation(Struct, kw_only=True):
    """What all kinds of requests have in common, under OpenAI's and mlx-lm's names."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repetition_penalty: float | None = None
    repetition_context_size: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], Meta(max_length=1024)] | None = None
    seed: int | None = None
    stop: Stops = None
    exact: Share | None = None
    whole: bool | None = None
    sources: bool | None = None
    recall: bool | None = None
    n: Count | None = None
    best_of: Count | None = None
    adapters: Any = None
    draft_model: Any = None
    role_mapping: Any = None

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """The request's numbers over the server's; `SamplingError` for one out of its bounds."""
        names = {"repetition_context_size": "penalty_window"}
        given = {names.get(name, name): value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        return Sampling(**{**defaults, **given})

    def stops(self) -> list[str]:
        """The stop strings; an empty one is none."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    def check(self) -> None:
        """Refuses by name what is not supported."""
        for name in ("n", "best_of"):
            if (getattr(self, name) or 1) > 1:
                raise refused(name, "only one answer a request is supported")
        for name in ("adapters", "draft_model", "role_mapping"):
            if getattr(self, name):
                raise refused(name, "cannot be chosen by a request")


class JsonSchema(Struct):
    schema: dict[str, Any] | None = None


class ResponseFormat(Struct):
    """OpenAI's two forms: with `json_schema`, or (in /v1/responses) the schema beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None

    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer; None for text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        schema = self.json_schema.schema if self.json_schema else self.schema
        if schema is None:
            raise ApiError(400, "response_format has no schema", code="invalid_value", param="response_format")
        return schema


class ChatRequest(Generation, kw_only=True):
    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Offered = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    def check(self) -> None:
        super().check()
        if self.functions:
            raise refused("functions", "not supported: tools are")
        if any(modality != "text" for modality in self.modalities or []):
            raise refused("modalities", "only text is supported")


class CompletionRequest(Generation, kw_only=True):
    prompt: Annotated[str, Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | bool | None = None
    echo: bool | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.echo:
            raise refused("echo", "not supported")
        if self.suffix:
            raise refused("suffix", "not supported")


class TextSettings(Struct):
    format: ResponseFormat | None = None


class ResponsesRequest(Generation, kw_only=True):
    input: str | InputItems
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextSettings | None = None
    tools: Offered = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def messages(self) -> list[JsonObject]:
        """As chat templates take them."""
        told = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*told, {"role": "user", "content": self.input}]
        return told + from_items(self.input)

    def check(self) -> None:
        super().check()
        if self.previous_response_id:
            raise refused("previous_response_id", "answers are not stored: send the whole conversation as input")
        if self.background:
            raise refused("background", "not supported")


class EmbeddingsRequest(Struct, kw_only=True):
    input: Annotated[str, Meta(min_length=1)] | Annotated[list[str], Meta(min_length=1, max_length=256)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Any = None


class OllamaOptions(Struct):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_predict: int | None = None
    stop: Stops = None


class OllamaRequest(Struct, kw_only=True):
    model: Name | None = None
    stream: bool | None = None
    options: OllamaOptions | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None


class OllamaChat(OllamaRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: Offered = None


class OllamaGenerate(OllamaRequest, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: Any = None
    suffix: str | None = None


class OllamaShow(Struct, kw_only=True):
    model: Name | None = None
    name: Name | None = None


_PLACE = re.compile(r"^(.*) - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_decoders: dict[type, Any] = {}


def parse(body: bytes, kind: type[T]) -> T:
    """A request's body; ApiError 400 that names the field where it is not of its kind."""
    if kind not in _decoders:
        _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        request: T = _decoders[kind].decode(body)
    except msgspec.ValidationError as error:
        message, param = str(error), None
        if place := _PLACE.match(message):
            message, param = place[1], place[2] or None
            message = f"{param}: {message}" if param else message
        raise ApiError(400, message, code="invalid_value", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except (RecursionError, ValueError, OverflowError):
        raise ApiError(400, "the body is not valid JSON: too deep, or a number too long", code="invalid_json") from None
    return request
