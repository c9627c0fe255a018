"""A server of chat completions on loopback: answers follow from the request, faults are told to it.

    with Loopback(answer=lambda body: "5", faults=["503", "reset"]) as server: ...server.url...

Faults are taken one a request, in turn, before the first answer: a status (with `;SECONDS` as Retry-After),
"reset" (the connection is cut), "hang" (no answer), "torn" (half an answer), "html" (no chat completion),
"detail" (status 400, the reason by another key than OpenAI's).
"""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Loopback(ThreadingHTTPServer):
    """The server; `answered` counts what was answered, by the question and seed, `asked` every request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any] = lambda body: "5",
        *,
        faults: Sequence[str] = (),
        fault: Callable[[dict[str, Any]], str | None] = lambda body: None,
        seconds: float = 0.0,
    ) -> None:
        """`answer`: the text, or the whole message; `fault`: of a request, besides those in turn."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults, self.fault, self.seconds = answer, list(faults), fault, seconds
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.answered: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.gate = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "Loopback":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone."""


class _Handler(BaseHTTPRequestHandler):
    server: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.gate:
            server.asked.append(body)
            server.headers.append({key.lower(): one for key, one in self.headers.items()})
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else server.fault(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.seconds)
            self.reply(fault, body)
        finally:
            with server.gate:
                server.at_once -= 1

    def reply(self, fault: str | None, body: dict[str, Any]) -> None:
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault == "hang":
            time.sleep(3)
        elif fault == "html":
            self.send(200, b"<html>welcome</html>", kind="text/html")
        elif fault == "detail":
            self.send(400, json.dumps({"detail": f"only serves another model, not {body['model']}"}).encode())
        elif fault in (None, "torn"):
            said = self.server.answer(body)
            message = said if isinstance(said, dict) else {"content": said}
            finish = message.pop("finish_reason", "stop")
            usage = {
                "prompt_tokens": 7,
                "completion_tokens": len(str(said)),
                "total_tokens": 7 + len(str(said)),
            }
            choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
            whole = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                     "choices": [choice], "usage": usage}  # fmt: skip
            text = json.dumps(whole).encode()
            if fault is None:
                with self.server.gate:
                    self.server.answered[json.dumps([body["model"], body["messages"], body.get("seed")])] += 1
                return self.send(200, text)
            self.send(200, text[: len(text) // 2], length=len(text))
            self.close_connection = True
        else:
            status, _, wait = fault.partition(";")
            error = {"error": {"message": f"fault {status}", "type": "fault", "param": None, "code": None}}
            self.send(int(status), json.dumps(error).encode(), **({"retry_after": wait} if wait else {}))

    def send(
        self, status: int, text: bytes, *, length: int | None = None, kind: str = "application/json",
        retry_after: str = "",
    ) -> None:  # fmt: skip
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length or len(text)))
        if retry_after:
            self.send_header("retry-after", retry_after)
        self.end_headers()
        self.wfile.write(text)
        self.wfile.flush()
