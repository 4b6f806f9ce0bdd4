"""`chorus-moe serve MODEL`: transformers' own server and its answers, around our queue.

Unusual here:
- one model, loaded before the first request; `model` of a request names it or one of its adapters;
- only the addresses in `ADDRESSES` exist: those that load, unload or download models would be open to every client;
- requests are read whole, up to a size and within a time, before anything else sees them;
- media are decoded in a thread of their own, so the event loop answers the health address meanwhile.
"""

import asyncio
import inspect
import socket
import sys
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from copy import deepcopy
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState
from transformers.utils import logging

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.batches import BatchManager, one_line
from chorus_moe.serving.requests import check_request
from chorus_moe.serving.voices import Voice
from chorus_moe.training.loading import base_model

logger = logging.get_logger(__name__)

ADDRESSES = ("/v1/chat/completions", "/v1/models", "/health")
# What is parsed as a call depends on the tools from transformers 5.23 on.
TAKES_TOOLS = "tools" in inspect.signature(ChatCompletionHandler._streaming).parameters
# transformers' server writes as many where a client says nothing.
DEFAULT_NEW_TOKENS = 1024


class ServedModels:
    """What transformers' server asks of its model manager: the names, and nothing to unload."""

    def __init__(self, voices: Mapping[str, Voice]):
        self.voices = voices

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": 0, "owned_by": "chorus-moe"} for name in self.voices]

    # Its name from transformers 5.24 on.
    list_models = get_gen_models

    def shutdown(self) -> None:
        """Nothing to unload: the model ends with the process."""

    def find(self, name: object) -> Voice:
        """The voice of this name; for None the first.

        Raises:
            HTTPException: 404, names those that there are.
        """
        if name is None:
            return next(iter(self.voices.values()))
        if not isinstance(name, str) or name not in self.voices:
            raise HTTPException(404, f"no model {name!r:.80} here; choose from {', '.join(self.voices)}")
        return self.voices[name]


class ChatHandler(ChatCompletionHandler):
    """transformers' chat completions, whose requests are checked, prepared off the event loop, and queued."""

    def __init__(self, models: ServedModels, processor: ChorusProcessor, manager: BatchManager):
        super().__init__(models, GenerationState())
        self.models, self.processor, self.manager = models, processor, manager
        # One: a fast tokenizer must not be set up for two texts at once.
        self._preparing = ThreadPoolExecutor(1, "prepare")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        try:
            self._validate_request(body)
            check_request(body)
            voice = self.models.find(body.get("model"))
            loop = asyncio.get_running_loop()
            inputs = await loop.run_in_executor(self._preparing, partial(self._prepare, body))
            config = self._configure(body, voice, inputs["input_ids"].shape[1])
            answer = partial(
                self._streaming if body.get("stream") else self._non_streaming,
                request_id, voice, self.manager.processor, voice.name, inputs, config,
                gen_manager=self.manager, **({"tools": body.get("tools")} if TAKES_TOOLS else {}),
            )  # fmt: skip
            return answer() if body.get("stream") else await answer()
        except (ValueError, TypeError) as error:
            # What the processor or `generate` refuses, in its own one line.
            raise HTTPException(400, one_line(error)) from error

    def _streaming(self, *arguments: Any, **options: Any) -> StreamingResponse:
        response = super()._streaming(*arguments, **options)
        response.body_iterator = with_readable_errors(response.body_iterator)
        return response

    def _prepare(self, body: dict[str, Any]) -> Mapping[str, Any]:
        return self.processor.apply_chat_template(
            body["messages"],
            add_generation_prompt=True,
            tools=body.get("tools"),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **(body.get("chat_template_kwargs") or {}),
        )

    def _configure(self, body: dict[str, Any], voice: Voice, prompt_length: int) -> GenerationConfig:
        """The settings of one request.

        Raises:
            ValueError: prompt and answer are longer than the model's context.
        """
        model = base_model(voice.model)
        # transformers would set the seed here and now, for whatever the model does at this moment.
        config = self._build_generation_config(body | {"seed": None}, model.generation_config)
        config.seed = body.get("seed")
        if config.sequence_bias is not None:
            # JSON's whole numbers, which the processor of biases refuses.
            config.sequence_bias = {token: float(bias) for token, bias in config.sequence_bias.items()}
        if body.get("temperature") or body.get("top_p") is not None:
            # It sets the temperature alone, which without drawing has no effect.
            config.do_sample = body.get("temperature") != 0
        context = model.config.get_text_config().max_position_embeddings
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        wanted = asked or min(DEFAULT_NEW_TOKENS, context - prompt_length)
        if prompt_length + max(wanted, 1) > context:
            raise ValueError(
                f"the prompt has {prompt_length} tokens and the answer up to {max(wanted, 1)}, the context of the "
                f"model is {context}; shorten the conversation or lower max_tokens"
            )
        config.max_new_tokens = wanted
        return config


async def with_readable_errors(lines: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """An error in the middle of a stream as OpenAI's clients read it; transformers writes its text alone."""
    mark, end = 'data: {"error": "', '"}\n\n'
    # Closed with this one: then it cancels the request of a client that has gone.
    async with aclosing(lines):
        async for text in lines:
            # In the words of an answer the quotes are escaped.
            before, found, message = text.rpartition(mark)
            if found:
                text = f'{before}data: {{"error": {{"message": "{message.removesuffix(end)}"}}}}\n\n'
            yield text


class WholeRequests:
    """Reads a request to its end before the application sees it: neither too much nor for too long."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(self.seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        refusal = problem(413, f"over {len(body)} bytes, the limit of a request is {self.max_bytes}")
                        await refusal(scope, receive, send)
                        return
                    is_whole = not message.get("more_body", False)
        except TimeoutError:
            refusal = problem(408, f"{len(body)} bytes in {self.seconds:g} seconds, and no end of the request")
            await refusal(scope, receive, send)
            return
        pieces = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        del body

        async def replay() -> dict[str, Any]:
            return pieces.pop() if pieces else await receive()

        await self.app(scope, replay, send)


def problem(status: int, text: str) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": text, "type": kind, "code": status}}, status_code=status)


def build_app(
    voices: Mapping[str, Voice],
    processor: ChorusProcessor,
    *,
    max_batch: int = 8,
    max_request_bytes: int = 64 * 2**20,
    body_seconds: float = 30.0,
) -> FastAPI:
    """The application: `ADDRESSES` of transformers' server, answered by `voices`.

    Args:
        max_batch: requests that the model answers at once.
        max_request_bytes: size of a request; base64 takes 4 bytes for 3 of a file.
        body_seconds: within which a request must arrive.
    """
    manager = BatchManager(deepcopy(processor), max_batch)
    models = ServedModels(voices)
    app = build_server(
        models, ChatHandler(models, processor, manager), *[None] * 4, generation_state=manager, enable_cors=False
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ADDRESSES]
    app.add_middleware(WholeRequests, max_bytes=max_request_bytes, seconds=body_seconds)

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> Response:
        return problem(400, "the body is no JSON object: " + "; ".join(entry["msg"] for entry in error.errors()))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return problem(500, f"{type(error).__name__}; the server's log says more")

    return app


class Server(uvicorn.Server):
    """Says where it listens, also when the system chose the port."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                print(
                    f"serving on http://{f'[{host}]' if ':' in host else host}:{port}/v1", file=sys.stderr, flush=True
                )


def run_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, drain_seconds: int = 30) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that have begun are answered, for up to `drain_seconds`."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=drain_seconds, lifespan="on"
    )
    Server(config).run()
