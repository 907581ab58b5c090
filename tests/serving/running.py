"""A server in this process, for tests, and what a single run answers."""

import argparse
import http.client
import json
import threading
import time
from typing import Any

import mlx_lm
import openai

from nectar_mlx import Nectar, serve

QUESTIONS = [
    f"{who} is the {what}?" for who in ("who", "where", "why") for what in ("fox", "dog", "answer", "quick brown")
]
TOKENS = 10
ENDLESS = {"logit_bias": {"1": -100}}  # the token that ends an answer


def arguments(books, *extra: str) -> argparse.Namespace:
    return serve.make_parser().parse_args([*(str(b.path) for b in books), "--port", "0", *extra])


class Running:
    def __init__(self, args: argparse.Namespace):
        self.server = serve.start(args)
        self.engine, self.port = self.server.engine, self.server.port
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def client(self, key: str = "key") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=120)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
        """Status, body and headers. A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        found = response.status, response.read(), response.headers
        connection.close()
        return found

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, content, _ = self.request("POST", path, body, **headers)
        return status, json.loads(content)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()


def ask(client, model, question, **options):
    messages = [{"role": "user", "content": question}]
    options = {"max_tokens": TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=messages, **options)


def alone(book, messages, *, tokens: int = TOKENS, **cache) -> str:
    """What mlx-lm itself answers to one request."""
    model, tokenizer = mlx_lm.load(str(book.folder))
    nectar = Nectar.load(book.path, model, tokenizer)
    prompt = nectar.prompt(tokenizer, messages)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=tokens, prompt_cache=nectar.make_cache(**cache))


def wait_for(condition, seconds=60.0):
    """Whether it comes true. The time is for a busy machine: nothing that is right takes it."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
