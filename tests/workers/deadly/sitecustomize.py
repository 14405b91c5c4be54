"""Python runs this at its start: making some shards goes wrong. See `tests/workers/test_stuck.py`.

`DEADLY_SHARDS` ends the process that makes them, as the kernel does where memory runs out. Of `LOST_SHARDS` no feature
is ever seen again, and for `FULL_SHARDS` the disk is full.
"""

import errno
import importlib.util
import os
import signal
import sys
from importlib.abc import MetaPathFinder


def _numbers(name):  # type: ignore[no-untyped-def]
    return {int(number) for number in os.environ.get(name, "").split(",") if number}


def _of_reduce(module):  # type: ignore[no-untyped-def]
    write_shard = module.write_shard

    def write(plan, segment, *rest):  # type: ignore[no-untyped-def]
        if segment.shard in _numbers("DEADLY_SHARDS"):
            signal.raise_signal(signal.SIGKILL)
        if segment.shard in _numbers("FULL_SHARDS"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_shard(plan, segment, *rest)

    module.write_shard = write


def _of_plan(module):  # type: ignore[no-untyped-def]
    write = module.Plan.write_features

    def write_features(plan, segment, *rest):  # type: ignore[no-untyped-def]
        if segment.shard not in _numbers("LOST_SHARDS"):
            write(plan, segment, *rest)

    module.Plan.write_features = write_features


_changes = {"pipeline.reduce": _of_reduce, "pipeline.plans.plan": _of_plan}


class _Changed(MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        change = _changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def changed(module):  # type: ignore[no-untyped-def]
            execute(module)
            change(module)

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, _Changed())
