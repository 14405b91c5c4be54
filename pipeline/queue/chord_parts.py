"""Celery's Redis backend, which counts a chord's members, with a way to count many at once, for workers.

Leans on internals of Celery 5.7's chords.
"""

import copy
from collections.abc import Sequence
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from msgspec.json import encode as quoted

from pipeline.queue.messages import Task

#: The first half of Celery's own script, for many members of one chord: notes each member's part once, by its task id
#: and index, unless the body was sent already. KEYS: the chord's results, members, claim, size. ARGV: member, part, …
#: Returns 0 if there is no such chord: the part of a cancelled plan, or a forged one, would stay for ever.
_NOTE = """
if redis.call('EXISTS', KEYS[4]) == 0 or redis.call('GET', KEYS[3]) == 'done' then return 0 end
local members, new, parts, own = {}, {}, {}, {}
for i = 1, #ARGV, 2 do members[#members + 1] = ARGV[i] end
if not members[1] then return 1 end
local known = redis.call('SMISMEMBER', KEYS[2], unpack(members))
for i, member in ipairs(members) do
  if known[i] == 0 and not own[member] then
    own[member] = true
    new[#new + 1] = member
    parts[#parts + 1] = ARGV[2 * i]
  end
end
if new[1] then
  redis.call('SADD', KEYS[2], unpack(new))
  redis.call('RPUSH', KEYS[1], unpack(parts))
end
return 1
"""


class Backend(RedisBackend):  # type: ignore[misc]
    """Stores the chord parts of a batch together.

    All but the last are noted by one script; the last goes Celery's own way, which also counts, and sends the body when
    the chord is complete. For chords without order (`result_chord_ordered` off). Expiry of the chord's keys is the
    arming's: it set them long.
    """

    def _unpack_chord_result(self, tup: Any, decode: Any, *args: Any, **kwargs: Any) -> None:
        # Celery gives the body what its members returned. Ours takes nothing, and to decode ten thousand words in JSON
        # takes as long as reducing a tenth of the segment.
        return None

    def store_parts(self, parts: Sequence[tuple[Task, str]]) -> None:
        """Store what members of chords returned; running it again after a failure changes nothing that is stored.

        Raises:
            redis.RedisError: Redis is away.
        """
        groups: dict[str, list[tuple[Task, str]]] = {}
        for part in parts:
            if part[0].group is not None:
                groups.setdefault(part[0].group, []).append(part)
        note = self.client.register_script(_NOTE)
        for group, (*most, (last, last_result)) in groups.items():
            arguments: list[str | bytes] = []
            for task, result in most:
                # `encode` of Celery, whose encoder takes as long as a fifth of the tracer.
                part_of = b'[1, %b, "%b", %b]' % (quoted(task.id), states.SUCCESS.encode(), quoted(result))
                arguments += [f"{task.id}:{task.group_index}", part_of]
            keys = [self.get_key_for_group(group, ending) for ending in (".j", ".d", ".c", ".s")]
            if note(keys=keys, args=arguments):
                # It takes the chord's body apart.
                last = last._replace(chord=copy.deepcopy(last.chord))
                self.on_chord_part_return(last, states.SUCCESS, last_result)
