"""The one room that knows Celery, kombu and their keys in Redis.

Everything else calls its functions and classes: `make_app`, `Publisher`, `Chords`, `run_worker`, `register_batched`,
`register`, `Claims`, `lease`, `connect`. Nothing else imports kombu, or anything of Celery but the class `Celery` for
annotations. The room in turn knows of plans and segments only their ids and indices, and of the disk nothing.

Celery's public API has neither tasks that are computed in batches nor a consumer that outlives every message and every
state of Redis, and kombu's Redis transport loses the message that it has popped and not yet booked if it is killed just
then. So the room leans on internals of Celery 5.7 and kombu 5.7, which pyproject.toml pins:

* `transport`: kombu's `Channel`, `QoS`, `Message` and `Transport` for Redis, how they book a message that is in hand,
  and the JSON of a message. Fetches and books many messages in one script, and acknowledges them together.
* `batches`: a task's `Strategy`. Computes many messages at once, without requests and the tracer.
* `chord_parts`: how `RedisBackend` counts a chord's members. Stores the parts of a batch together.
* `publish`, `messages`: headers, body and envelope of a task. Writes tasks as Celery and kombu would, a round trip's
  worth at once; reads them back strictly; drops what another sender made up.
* `consumer`, `worker`, `outages`: `Consumer`, its `Blueprint`, its `strategies`, `worker.state`. Waits for Redis as
  long as it takes.
* `claims`: `qos._delivered` and `reserved_requests`. Renews the stamps of what this process holds.
* `chords`, `comparisons`: the keys of Celery's chords and of kombu's messages in hand. Say how far a plan is, and which
  panels nobody has.

`tests/pipeline/queue/test_contract.py` names each internal, and fails with its name if another release changes it
(`make contract`).

Every key in Redis, with the modules that write and read it; G is a gallery's id, P a plan's, S a segment's index, R a
group's id, `P.S.<digest of G and rows>`, PANEL a panel's number, key and threshold. All of it can be lost at any time:
the disk is the truth.

| key | holds | written by | read by | goes |
|---|---|---|---|---|
| `embed.G.p1` | list: messages, one per row | publish, transport | transport, chords | once fetched |
| `reduce.G.p1` | list: messages, one per segment | Celery, publish, transport | transport, chords | once fetched |
| `compare.G.p1` | list: messages, one per panel | comparisons | transport, comparisons | once fetched, 60 s |
| `ruiji:G:unacked` | hash by tag: message, exchange, queue | transport | transport, chords | once acknowledged |
| `ruiji:G:unacked_index` | sorted set: tags by stamp | transport, claims, chords | transport, chords | likewise |
| `ruiji:G:unacked_mutex` | lock of who gives back dead workers' messages | kombu | kombu | after 10 s |
| `celery-taskset-meta-R.s` | size of the chord | chords | Celery, chord_parts | with the body, the plan, 14 days |
| `celery-taskset-meta-R.d` | set: members that are through | Celery, chord_parts | Celery, chords | likewise |
| `celery-taskset-meta-R.j` | list: what the members returned | Celery, chord_parts | Celery | likewise |
| `celery-taskset-meta-R.t` | Celery's correction of the size, always 0 here | Celery | Celery | likewise |
| `celery-taskset-meta-R.c` | who sends the body; then `done` | Celery | Celery, chord_parts, chords | after 5 min |
| `ruiji:G:plan:P` | hash by S: group, size and age of what is armed | chords | chords | with the plan, 14 days |
| `ruiji:G:plan:P:failed:S` | set: ids of failed objects | chords | chords | with the shard, the plan, 14 days |
| `ruiji:G:compare:asked` | sorted set: panels that are waited for, until when | comparisons | comparisons | 30 s |
| `ruiji:G:compare:begun` | hash by panel: how often begun in vain | comparisons | comparisons | once done, 1 day |
| `ruiji:G:compare:faults` | hash by panel: what went wrong last | comparisons | comparisons | likewise |
| `ruiji:G:comparing:PANEL` | its pairs that are compared already | comparisons | comparisons | once done, 20 s |
| `ruiji:G:lease:arm` | token of who publishes | segments | segments | released, 30 s |
| `ruiji:G:lease:close` | token of who closes the plan | segments | segments | released, 10 s |
| `ruiji:G:lease:reduce.S` | token of who reduces the segment | segments | segments | released, 10 s |
| `ruiji:G:lease:compare` | token of who publishes panels | comparisons | comparisons | released, 10 s |
| `ruiji:G:worker:HOST:PID` | JSON: what a process reports of itself | heartbeat | status | with the process, 10 s |
| `ruiji:G:place` | JSON: host, folder and inode of the gallery | gallery | gallery | 14 days after the last look |
| `ruiji:slot:DEVICE:N` | host and process of the worker on a GPU | slots | slots | with the worker, 30 s |
"""
