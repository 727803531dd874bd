"""Runs 200 tasks at once on one worker process; all of them share at most ten connections of its HTTP client.

python examples/async_worker/run.py
"""

import asyncio
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from embedded import Interrupts, started, use_folder_as_broker  # noqa: E402  # it lies beside this example

TASKS = 200


class SlowPrices(BaseHTTPRequestHandler):
    """Answers each request after 50 ms, and counts connections."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def do_GET(self) -> None:
        time.sleep(0.05)
        body = self.path.rpartition("/")[2].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def main() -> int:
    interrupts = Interrupts()
    with tempfile.TemporaryDirectory(prefix="spakky-celery-") as name, ExitStack() as stack:
        folder = Path(name)
        use_folder_as_broker(folder, HERE)
        from app import Prices, create_app  # noqa: PLC0415  # it reads the environment that was just set

        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), SlowPrices))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        print("Starting a worker on a broker in a temporary folder ...")
        stack.enter_context(started(folder, "worker", "app:create_app", "--concurrency", str(TASKS), "-l", "INFO"))
        app = create_app().start()
        stack.callback(app.stop)
        stack.enter_context(interrupts.raised())
        prices = asyncio.run(fetch(app.container.get(Prices), f"http://127.0.0.1:{server.server_port}/"))
        print(f"  {len(prices)} tasks fetched prices from {min(prices):.0f} to {max(prices):.0f}")
        print(f"  over {SlowPrices.connections} connections of one client")
    print("The worker has stopped.")
    return 0


async def fetch(handler: object, url: str) -> list[float]:
    """Dispatch at once, wait together."""
    results = [await handler.fetch(f"{url}{number}") for number in range(TASKS)]  # type: ignore[attr-defined]  # imported late
    return list(await asyncio.gather(*(result.get_async() for result in results)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; the worker has stopped.")
        sys.exit(130)
