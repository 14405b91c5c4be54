"""Celery's Redis backend, which counts a chord's members, with a way to count many at once, for workers.

Leans on internals of Celery 5.7's chords.
"""

import copy
from collections.abc import Sequence
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from msgspec.json import encode as quoted

from pipeline.queue.connection import AFTER_FAILOVER
from pipeline.queue.messages import Task

#: The first half of Celery's own script, for many members of one chord: notes each member's part once, by its task id
#: and index, unless the body was sent already. KEYS: the chord's results, members, claim, size. ARGV: seconds after
#: which these expire, then member, part, … Returns 0 if there is no such chord: the part of a cancelled plan, or a
#: forged one, would stay for ever. Returns 1 if all are noted and others are missing still. Else the last of ARGV is
#: not noted here, and 2 returned: it completes the chord, or did before.
_NOTE = """
local size = redis.call('GET', KEYS[4])
if not size or redis.call('GET', KEYS[3]) == 'done' then return 0 end
local members, new, parts, own = {}, {}, {}, {}
for i = 2, #ARGV, 2 do members[#members + 1] = ARGV[i] end
local known, last_is_new = redis.call('SMISMEMBER', KEYS[2], unpack(members)), false
for i, member in ipairs(members) do
  last_is_new = known[i] == 0 and not own[member]
  if last_is_new then
    own[member] = true
    new[#new + 1] = member
    parts[#parts + 1] = ARGV[2 * i + 1]
  end
end
local missing = redis.call('LLEN', KEYS[1]) + #new < (tonumber(size) or 0)
if last_is_new and not missing then
  table.remove(new)
  table.remove(parts)
end
if new[1] then
  redis.call('SADD', KEYS[2], unpack(new))
  redis.call('RPUSH', KEYS[1], unpack(parts))
end
for _, key in ipairs({KEYS[1], KEYS[2], KEYS[4]}) do redis.call('EXPIRE', key, ARGV[1]) end
return missing and 1 or 2
"""


class Backend(RedisBackend):  # type: ignore[misc]
    """Stores the chord parts of a batch together.

    One script notes them. Only the one that completes a chord goes Celery's own way, which counts again and sends the
    body. For chords without order (`result_chord_ordered` off).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connparams["retry"] = AFTER_FAILOVER

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
        for group, members in groups.items():
            arguments: list[str | bytes | int] = [self.chord_expires]
            for task, result in members:
                # `encode` of Celery, whose encoder takes as long as a fifth of the tracer.
                part_of = b'[1, %b, "%b", %b]' % (quoted(task.id), states.SUCCESS.encode(), quoted(result))
                arguments += [f"{task.id}:{task.group_index}", part_of]
            keys = [self.get_key_for_group(group, ending) for ending in (".j", ".d", ".c", ".s")]
            if note(keys=keys, args=arguments) == 2:
                last, result = members[-1]
                # Celery takes the chord's body apart.
                self.on_chord_part_return(last._replace(chord=copy.deepcopy(last.chord)), states.SUCCESS, result)
