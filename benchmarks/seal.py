"""What a seal costs: making one and checking one, per message, for a body of a common size and a large one."""

import time
from statistics import median

from pydantic import SecretStr

from spakky.plugins.celery.seal import SEALED_HEADERS, SealedParts, Seals

ROUNDS, MESSAGES = 15, 5000


def measure(size: int) -> float:
    seals = Seals({"key": SecretStr("k" * 32)})
    headers = dict.fromkeys(SEALED_HEADERS, "x" * 36) | {"spakky.auth.context": "s" * 900}
    body = b"x" * size
    took = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        for _ in range(MESSAGES):
            parts = SealedParts(headers, "reply", "application/json", "utf-8", body)
            sealed = {**headers, "spakky.celery.seal": seals.seal(parts)}
            verdict = seals.check(SealedParts(sealed, "reply", "application/json", "utf-8", body))
        took.append((time.process_time() - begun) / MESSAGES * 1e6)
        assert verdict.problem is None
    return median(took)


for size in (200, 2_000, 20_000):
    print(f"{size:>6} bytes: {measure(size):5.1f} us to seal and check")
