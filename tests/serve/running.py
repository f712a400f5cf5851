"""A server in a thread of the test's process, and a client of it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import uvicorn

from bitwright.serve.app import Server
from bitwright.serve.server import bound
from bitwright.serve.service import Limits, Service

KEY = "secret"


def until(true: Callable[[], object]) -> None:
    """Wait for something that another thread does soon."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Running:
    """A server in a thread of this process."""

    def __init__(self, model: Path, key: str | None = KEY, limits: Limits | None = None, **options: Any) -> None:
        self.service = Service.open(model, name="tiny", limits=limits, **options)
        listening = bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(Server(self.service, key).app(), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=60)

    def busy(self) -> bool:
        """Whether the engine has anything to do."""
        return bool(self.service.engine.running or self.service.engine.waiting)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
