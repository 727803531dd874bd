"""Runs the quickstart: a worker and a beat process on a broker in a temporary folder, and a few calls.

Everything it started has ended when it returns, also after Ctrl-C.
"""

import asyncio
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from embedded import Interrupts, started, use_folder_as_broker  # noqa: E402  # it lies beside this example


def main() -> int:
    interrupts = Interrupts()
    with tempfile.TemporaryDirectory(prefix="spakky-celery-") as name, ExitStack() as stack:
        folder = Path(name)
        use_folder_as_broker(folder, HERE)
        from app import Mailer, create_app  # noqa: PLC0415  # it reads the environment that was just set

        print("Starting a worker and beat on a broker in a temporary folder ...")
        worker = stack.enter_context(
            started(folder, "worker", "app:create_app", "--pool", "threads", "--concurrency", "4", "-l", "INFO"),
        )
        beat = stack.enter_context(started(folder, "beat", "app:create_app"))

        app = create_app().start()
        stack.callback(app.stop)
        stack.enter_context(interrupts.raised())
        mailer = app.container.get(Mailer)

        written = mailer.write("Ada", text="your engine is ready.")
        print(f"\n  mailer.write('Ada', ...)       dispatched as {written.task_id}")
        print(f"      -> {written.get()!r}")
        for result in asyncio.run(send_to(mailer, "Ada", "Grace", "Edsger")):
            print(f"  await mailer.send(...)         -> {result!r}")

        reports = folder / "reports.txt"
        deadline = time.monotonic() + 30
        while not reports.exists() or len(reports.read_text().split()) < 2:  # noqa: PLR2004  # two are a rhythm
            if worker.poll() is not None or beat.poll() is not None or time.monotonic() > deadline:
                print((folder / "worker.log").read_text(), (folder / "beat.log").read_text(), file=sys.stderr)
                return 1
            time.sleep(0.1)
        print(f"  @schedule(every second)        -> beat ran report() at {', '.join(reports.read_text().split())}")
    print("\nWorker and beat have stopped.")
    return 0


async def send_to(mailer: object, *names: str) -> list[str]:
    """Dispatch at once, wait together."""
    results = await asyncio.gather(*(mailer.send(name) for name in names))  # type: ignore[attr-defined]  # imported late
    return list(await asyncio.gather(*(result.get_async() for result in results)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted; worker and beat have stopped.")
        sys.exit(130)
