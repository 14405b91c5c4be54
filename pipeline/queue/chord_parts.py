"""Celery's Redis backend, which counts a chord's members, with a way to count many at once, for workers.

Leans on internals of Celery 5.7's chords.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.backends.redis import RedisBackend

#: The first half of Celery's own script, for many members of one chord: notes each member's part once, by its task id
#: and index, unless the body was sent already. KEYS: the chord's results, members, claim, size. ARGV: member, part, …
#: Returns 0 if there is no such chord: the part of a cancelled plan, or a forged one, would stay for ever.
_NOTE = """
if redis.call('EXISTS', KEYS[4]) == 0 or redis.call('GET', KEYS[3]) == 'done' then return 0 end
for i = 1, #ARGV, 2 do
  if redis.call('SADD', KEYS[2], ARGV[i]) == 1 then redis.call('RPUSH', KEYS[1], ARGV[i + 1]) end
end
return 1
"""


class Backend(RedisBackend):  # type: ignore[misc]
    """Stores the chord parts of a batch together.

    All but the last are noted by one script; the last goes Celery's own way, which also counts, and sends the body when
    the chord is complete. For chords without order (`result_chord_ordered` off). Expiry of the chord's keys is the
    arming's: it set them long.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._collected = threading.local()

    @contextmanager
    def collected_parts(self) -> Iterator[list[tuple[Any, str, Any]]]:
        """While this is open, this thread's chord parts are collected instead of stored."""
        parts: list[tuple[Any, str, Any]] = []
        self._collected.parts = parts
        try:
            yield parts
        finally:
            self._collected.parts = None

    def on_chord_part_return(self, request: Any, state: str, result: Any, propagate: Any = None, **kwargs: Any) -> None:
        """Celery's hook for each member that ends."""
        parts = getattr(self._collected, "parts", None)
        if parts is None:
            super().on_chord_part_return(request, state, result, propagate, **kwargs)
        else:
            parts.append((request, state, result))

    def store_parts(self, parts: list[tuple[Any, str, Any]]) -> None:
        """Store collected parts; running it again after a failure changes nothing that is stored.

        Raises:
            redis.RedisError: Redis is away.
        """
        groups: dict[str, list[tuple[Any, str, Any]]] = {}
        for part in parts:
            groups.setdefault(part[0].group, []).append(part)
        note = self.client.register_script(_NOTE)
        for group, (*most, last) in groups.items():
            arguments: list[str | bytes] = []
            for request, state, result in most:
                part = self.encode([1, request.id, state, self.encode_result(result, state)])
                arguments += [f"{request.id}:{request.group_index}", part]
            keys = [self.get_key_for_group(group, ending) for ending in (".j", ".d", ".c", ".s")]
            if note(keys=keys, args=arguments):
                super().on_chord_part_return(*last)
