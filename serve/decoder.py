"""The child that decodes what strangers send, and pictures for people: see `serve.decoders`.

A request is a line of JSON and, for an upload, its bytes; so is the answer. Nothing else is written to its stdout.
"""

import faulthandler
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ImageError, MachineFault
from pipeline.spec import ModelSpec
from pipeline.store import write_atomic
from search.views.thumbnail import make_thumbnail
from workers.decode.images import decode
from workers.suspects.alone import limit_memory

#: What the child writes first, once all that it needs is loaded.
READY = b"ready\n"


def _main() -> None:
    # The service keeps what is said last: where a library crashed, or the traceback of a bug.
    faulthandler.enable()
    limits = json.loads(sys.argv[1])
    requests = sys.stdin.buffer
    # C libraries write to stdout as they please.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limit_memory(limits["max_image_mb"])
    answers.write(READY)
    answers.flush()
    for line in requests:
        request = json.loads(line)
        head, body = _answer(request, requests, limits["max_pixels"])
        answers.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n")
        answers.write(body)
        answers.flush()


def _answer(request: dict[str, Any], requests: BinaryIO, max_pixels: int) -> tuple[dict[str, object], bytes]:
    try:
        if "bytes" in request:
            pixels = decode(
                io.BytesIO(requests.read(request["bytes"])), ModelSpec.from_values(request["spec"]), max_pixels
            )
            return {"shape": pixels.shape}, pixels.tobytes()
        made = make_thumbnail(Path(request["path"]), request["side"], max_pixels, request["inside"])
        if made is None:
            raise ImageError("its picture is missing, or cannot be decoded")
        return {"kind": made.kind, "unkept": _keep(request["file"], made.data)}, made.data
    except ImageError as error:
        return {"reason": error.reason, "message": str(error)}, b""
    except MachineFault as error:
        return {"fault": str(error)}, b""


def _keep(file: str, data: bytes) -> str | None:
    """Write a file; why that cannot be done, None if it is."""
    try:
        write_atomic(file, [data])
    except MachineFault as error:
        return str(error)
    return None


if __name__ == "__main__":
    _main()
