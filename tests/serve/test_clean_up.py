"""Cleaning up through the service: groups, decisions that stick, and the lists that come of them."""

import asyncio
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message

from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.plans.plan import Limits
from ruiji import open_gallery
from ruiji.galleries import shards_of
from search.duplicates.decided import decided_in
from search.duplicates.decisions import DecidedObject, Decision, Verdict, append_decisions
from search.duplicates.removal import LeftOut
from search.requests.duplicates import Asked
from serve.bodies import FilesQuery
from serve.cleanup import CleanUp
from serve.comparing import BackgroundComparison, Step
from serve.galleries import Galleries, Resident
from serve.routes.duplicates import files
from serve.searches import Busy
from serve.service import Service
from tests.factories import Ruiji, wait_until
from tests.search.galleries import write_article_shard
from tests.serve.cleaning import add_rows, compare, comparers, look, look_alikes, send, write_look_alikes
from tests.serve.conftest import Answer, Served, start


def decide(served: Served, *decisions: dict[str, Any]) -> Answer:
    return send(served, "/decisions", {"decisions": list(decisions)})


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[member["object_id"] for member in group["members"]] for group in groups]


def resident(ruiji: Ruiji) -> Resident:
    """The gallery as a service keeps it."""
    return Resident("gallery", open_gallery(ruiji.gallery), None)


@pytest.fixture
def ready(ruiji: Ruiji) -> Served:
    """A service on six groups of two, compared."""
    write_look_alikes(ruiji, 6)
    served = start(ruiji)
    compare(served)
    return served


def test_groups_come_with_what_decides_about_them(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 3, members=3)
    served = start(ruiji)
    before = look(served)
    assert (before["comparison"]["state"], before["groups"], before["comparison"]["total"]) == ("missing", [], 36)
    compare(served)
    found = look(served)
    assert (found["total"], found["open"], found["next"], found["gone"]) == (3, 3, None, 0)
    assert [group["name"] for group in found["groups"]] == [0, 3, 6]
    assert names(found["groups"])[1] == ["001-large.jpg", "001-small1.jpg", "001-small2.jpg"]
    assert found["groups"][1]["reason"] == "most pixels (128 x 96)"
    kept, other, _ = found["groups"][1]["members"]
    assert (kept["path"], kept["width"], kept["height"], kept["format"]) == ("001/001-large.jpg", 128, 96, "JPEG")
    assert kept["bytes"] == (ruiji.media / kept["path"]).stat().st_size and kept["there"] is True
    assert 0.99 < other["similarity"] < 1 and other["identical_to"] is None and other["same_file_as"] is None
    assert other["modified"].endswith("Z")
    # Another rule, another choice; and one that is none.
    oldest = ruiji.media / "001/001-small2.jpg"
    os.utime(oldest, (10**9, 10**9))
    chosen = look(served, "?keep=oldest")["groups"][1]
    assert chosen["members"][0]["object_id"] == "001-small2.jpg" and chosen["reason"].startswith("oldest (2001-09-09")
    refused = served.get("/duplicates?keep=biggest")
    assert refused.status == 422 and refused.error.startswith("keep biggest: 'biggest' is no rule")
    # The command has the same groups.
    lines = ruiji("near-duplicates", "--keep", "pixels,bytes", "--format", "jsonl").stdout.splitlines()
    assert [[member["object_id"] for member in json.loads(line)["members"]] for line in lines] == names(found["groups"])


def test_what_is_decided_does_not_come_back_until_it_is_undone(ruiji: Ruiji, ready: Served) -> None:
    done = decide(
        ready,
        {"decision": "same", "keep": "000-large.jpg", "remove": ["000-small1.jpg"]},
        {"decision": "different", "objects": ["001-large.jpg", "001-small1.jpg"]},
        {"decision": "skip", "objects": ["002-large.jpg", "002-small1.jpg"]},
    )
    assert (done.status, done.json()) == (200, {"recorded": 3, "warnings": [], "seen": 3})
    assert [group["name"] for group in look(ready)["groups"]] == [6, 8, 10]
    assert [group["name"] for group in look(ready, "?skipped=true")["groups"]] == [4, 6, 8, 10]
    status = ready.get("/decisions/status").json()
    told = json.loads(ruiji("duplicates", "status", "--json").stdout)
    assert told.pop("open") == look(ready)["open"] == 3
    assert status == told
    assert status["frees_bytes"] == (ruiji.media / "000/000-small1.jpg").stat().st_size
    listed = ready.get("/decisions").json()
    assert [one["decision"] for one in listed["decisions"]] == ["skip", "different", "same"] and listed["total"] == 3
    assert [one["object_id"] for one in listed["decisions"][2]["objects"]] == ["000-large.jpg", "000-small1.jpg"]
    # A service that is started anew knows it too; and so does one that was there when the command undid it.
    again = start(ruiji, log=ruiji.media.parent / "again.log")
    assert [group["name"] for group in look(again)["groups"]] == [6, 8, 10]
    ruiji("duplicates", "undo", "001-large.jpg", "001-small1.jpg")
    assert [group["name"] for group in look(ready)["groups"]] == [2, 6, 8, 10]
    assert decide(again, {"decision": "undo", "objects": ["000-large.jpg", "000-small1.jpg"]}).status == 200
    assert [group["name"] for group in look(ready)["groups"]] == [0, 2, 6, 8, 10]


def test_what_somebody_else_decided_meanwhile_is_not_overruled_unseen(ruiji: Ruiji, ready: Served) -> None:
    group, other = [{"objects": [f"00{n}-large.jpg", f"00{n}-small1.jpg"], "seen": look(ready)["seen"]} for n in (0, 1)]
    shown = ruiji("near-duplicates", "--keep", "pixels", "--format", "jsonl").stdout
    assert group["seen"] == json.loads(shown.splitlines()[0])["seen"] == 0
    kept_small = {"decision": "same", "keep": "000-small1.jpg", "remove": ["000-large.jpg"], "seen": 0}
    first = decide(ready, kept_small)
    assert (first.status, first.json()["seen"]) == (200, 1)
    # By a page that showed the group before; nothing of what it sends is recorded.
    said = "somebody has decided about 000-large.jpg and 000-small1.jpg since they were shown: same, "
    for late in ("different", "skip", "undo"):
        answer = decide(ready, {"decision": "skip", **other}, {"decision": late, **group})
        assert (answer.status, answer.error.startswith(said)) == (409, True)
    # By the command.
    told = ruiji("duplicates", "decide", stdin=shown, code=2).stderr
    assert f"line 1: {said}" in told and "run ruiji near-duplicates again" in told
    assert ready.get("/decisions/status").json()["decided"] == 1
    # Who says the same, or has seen it, is not refused; nor is who takes back what nobody changed.
    assert decide(ready, kept_small).json()["seen"] == 2
    undone = decide(ready, {"decision": "undo", **group, "seen": ready.get("/decisions").json()["seen"]})
    assert (undone.status, look(ready)["open"]) == (200, 6)
    # What was decided and undone again is as it was.
    assert decide(ready, {"decision": "different", **group}, {"decision": "skip", **other}).status == 200
    assert decide(ready, {"decision": "undo", **group, "seen": 9}).error.startswith("it has seen 9 decisions, and ")
    # Nor is anything decided about another picture than was shown.
    members = [{key: one[key] for key in ("object_id", "sha256")} for one in look(ready)["groups"][0]["members"]]
    changed = [{**one, "sha256": "0" * 64} for one in members]
    third = {"decision": "skip", "objects": [one["object_id"] for one in members]}
    answer = decide(ready, {**third, "members": changed})
    assert (answer.status, answer.error) == (409, "002-large.jpg is another picture now than the one that was shown")
    assert decide(ready, {**third, "members": members}).status == 200


def test_what_is_kept_in_another_gallery_is_told_apart(ruiji: Ruiji, ready: Served) -> None:
    """Decided by `ruiji near-duplicates --against-gallery`, with an object that has the path of one here."""
    kept = DecidedObject(path="000/000-large.jpg", sha256="0" * 64, gallery="4fa1")
    removed = DecidedObject(path="000/000-small1.jpg")
    append_decisions(ruiji.features / "decisions.jsonl", [Decision(Verdict.same, (kept, removed))])
    (one,) = ready.get("/decisions").json()["decisions"]
    assert one["objects"] == [
        {"object_id": None, "path": "000/000-large.jpg", "gallery": "4fa1"},
        {"object_id": "000-small1.jpg", "path": "000/000-small1.jpg", "gallery": None},
    ]
    assert ready.get("/decisions/status").json()["to_remove"] == 0
    assert look(ready)["open"] == 6, "of the two that are here nothing is decided"
    left_out = ready.get("/decisions/files?list=left_out&format=csv").body.decode()
    assert "000/000-large.jpg of gallery 4fa1, is in another gallery" in left_out


def test_decisions_are_recorded_together_or_not_at_all(ruiji: Ruiji, ready: Served) -> None:
    good = {"decision": "different", "objects": ["001-large.jpg", "001-small1.jpg"]}
    for bad in (
        {"decision": "different", "objects": ["001-large.jpg"]},
        {"decision": "different", "objects": ["001-large.jpg", "nobody.jpg"]},
        {"decision": "different", "objects": ["001-large.jpg", "002-large.jpg\0"]},
        {"decision": "same", "objects": ["001-large.jpg", "001-small1.jpg"]},
        {"decision": "same", "keep": "001-large.jpg", "remove": ["001-large.jpg"]},
        {"decision": "delete", "objects": ["001-large.jpg", "001-small1.jpg"]},
        {"decision": "skip", "objects": ["001-large.jpg", "001-small1.jpg"], "more": 1},
    ):
        answer = decide(ready, good, bad)
        assert (answer.status, "Traceback" in answer.error) == (422, False), bad
    assert not (ruiji.features / "decisions.jsonl").exists() and len(look(ready)["groups"]) == 6
    body = {"decisions": [good]}
    assert send(ready, "/decisions", body, Origin="http://evil.example").status == 403
    assert send(ready, "/decisions", body, Content_Type="text/plain").status == 415
    assert send(ready, "/duplicates/compare", {}, Origin="http://evil.example").status == 403
    assert not (ruiji.features / "decisions.jsonl").exists()


def test_the_lists_are_those_of_the_command_and_nothing_is_removed(ruiji: Ruiji, ready: Served) -> None:
    decide(
        ready, *({"decision": "same", "keep": f"00{n}-large.jpg", "remove": [f"00{n}-small1.jpg"]} for n in range(4))
    )
    changed, gone = ruiji.media / "001/001-small1.jpg", ruiji.media / "002/002-small1.jpg"
    changed.write_bytes(b"edited")
    gone.unlink()
    there = {path: path.read_bytes() for path in ruiji.media.rglob("*.jpg")}
    for which in ("remove", "keep"):
        for form in ("paths", "csv", "jsonl"):
            told = ruiji("duplicates", "list", f"--{which}", "--format", form, code=None).stdout
            answer = ready.get(f"/decisions/files?list={which}&format={form}")
            assert answer.status == 200 and answer.body.decode() == told and told
            assert f"ruiji-{which}." in answer.headers["content-disposition"]
    null = ready.get("/decisions/files?null=true").body.decode()
    wanted = [ruiji.media / f"00{n}/00{n}-small1.jpg" for n in (0, 3)]
    assert null == "".join(f"{path}\0" for path in wanted)
    left = ready.get("/decisions/files?list=left_out&format=jsonl").body.decode()
    assert [json.loads(line) for line in left.splitlines()] == [
        {"path": "001/001-small1.jpg", "why": "it changed since it was decided"}
    ]
    assert ready.get("/decisions/files?null=true&format=csv").status == 422
    assert {path: path.read_bytes() for path in ruiji.media.rglob("*.jpg")} == there


def test_lists_have_whole_paths_if_the_media_folder_was_named_from_the_current_one(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 1)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": ruiji.media.name}
    served = start(ruiji)
    assert decide(served, {"decision": "same", "keep": "000-large.jpg", "remove": ["000-small1.jpg"]}).status == 200
    assert served.get("/decisions/files").body.decode() == f"{ruiji.media / '000/000-small1.jpg'}\n"


def test_files_are_read_for_one_list_at_a_time_however_it_ends(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 1)
    galleries = Galleries(ruiji.features)
    service = Service(galleries, ruiji.media, None, Limits(10**6, 10, 1000), ruiji.state, lambda: "")
    galleries.open()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        raise OSError("nobody is there")

    async def ask() -> None:
        answers = await asyncio.gather(*(files(service, FilesQuery()) for _ in range(5)), return_exceptions=True)
        begun, *busy = sorted(answers, key=lambda one: isinstance(one, Busy))
        assert isinstance(begun, Response) and all(isinstance(one, Busy) for one in busy)
        # The client leaves before anything is sent.
        with pytest.raises(ClientDisconnect):
            await begun({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
        away = ruiji.media.rename(ruiji.media.parent / "away")
        for _ in range(2):
            with pytest.raises(UsageError, match="there is no media folder"):
                await files(service, FilesQuery())
        away.rename(ruiji.media)
        assert isinstance(await files(service, FilesQuery()), Response)
        await service.close()

    asyncio.run(ask())


def test_a_file_with_two_names_frees_nothing_and_is_said_to(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 1)
    os.link(ruiji.media / "000/000-large.jpg", ruiji.media / "000/linked.jpg")
    shutil.copy(ruiji.media / "000/000-large.jpg", ruiji.media / "000/copied.jpg")
    add_rows(ruiji, ["000/linked.jpg", "000/copied.jpg"], look_alikes(1, 2))
    served = start(ruiji)
    compare(served)
    (group,) = look(served)["groups"]
    links = {member["object_id"]: member["same_file_as"] for member in group["members"]}
    assert [name for name, other in links.items() if other] in (["linked.jpg"], ["000-large.jpg"])
    same = {member["object_id"]: member["identical_to"] for member in group["members"]}
    assert sorted(other is None for other in same.values()) == [False, False, True, True]
    small = "000-small1.jpg"
    said = decide(
        served, {"decision": "same", "keep": "000-large.jpg", "remove": ["linked.jpg", "copied.jpg", small]}
    ).json()
    assert said["recorded"] == 1 and len(said["warnings"]) == 1
    assert "linked.jpg is the same file as 000-large.jpg" in said["warnings"][0]
    assert look(served)["groups"] == []
    # It is settled: no list waits for it, and none has it.
    listed = ruiji("duplicates", "list", "--remove", code=0)
    assert [Path(line).name for line in listed.stdout.splitlines()] == [small, "copied.jpg"]
    assert "1 is another name of a file that is kept" in listed.stderr
    assert served.get("/decisions/files?list=left_out&format=jsonl").body.count(b"linked.jpg") == 1


def test_groups_come_by_the_page_and_by_what_is_in_their_paths(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 7)
    same = ruiji.media / "003/003-small1.jpg"
    shutil.copy(same, ruiji.media / "003/equal.jpg")
    add_rows(ruiji, ["003/equal.jpg"], look_alikes(7)[7:8])
    served = start(ruiji)
    compare(served)
    seen: list[int] = []
    after = -1
    while after is not None:
        page = look(served, f"?count=3&after={after}")
        assert page["total"] == 7 and len(page["groups"]) <= 3
        seen += [group["name"] for group in page["groups"]]
        if after == -1:
            # What is decided meanwhile moves nothing.
            decide(served, {"decision": "skip", "objects": ["000-large.jpg", "000-small1.jpg"]})
            decide(served, {"decision": "undo", "objects": ["000-large.jpg", "000-small1.jpg"]})
        after = page["next"]
    assert seen == [0, 2, 4, 6, 8, 10, 12]
    found = look(served, "?contains=005%2F005-LARGE")
    assert (names(found["groups"]), found["total"], found["open"]) == ([["005-large.jpg", "005-small1.jpg"]], 1, 7)
    found = look(served, "?identical=true")
    assert [group["name"] for group in found["groups"]] == [6] and found["total"] == 1
    assert look(served, "?linkage=single")["total"] == 7
    assert look(served, "?after=12")["groups"] == []
    assert served.get("/duplicates?threshold=0").status == 422


def test_without_media_folder_there_are_ids_and_decisions(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 2)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": ""}
    served = start(ruiji)
    compare(served)
    group = look(served)["groups"][0]
    assert names([group]) == [["000-large.jpg", "000-small1.jpg"]] and group["reason"] is None
    assert {group["members"][0][key] for key in ("there", "bytes", "width", "modified")} == {None}
    assert decide(served, {"decision": "same", "keep": "000-large.jpg", "remove": ["000-small1.jpg"]}).status == 200
    status = served.get("/decisions/status").json()
    assert (status["same"], status["frees_bytes"], len(look(served)["groups"])) == (1, None, 1)
    answer = served.get("/decisions/files")
    assert (answer.status, "--media-dir" in answer.error) == (409, True)


def test_files_of_a_gallery_that_knows_no_paths_are_not_looked_at(ruiji: Ruiji) -> None:
    ruiji.media.mkdir()
    write_article_shard(ruiji.gallery, 0, look_alikes(2), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    served = start(ruiji)
    compare(served)
    found = look(served)
    assert (names(found["groups"]), found["gone"]) == ([["a.jpg", "b.jpg"], ["c.jpg", "d.jpg"]], 0)
    assert found["groups"][0]["reason"] is None and found["groups"][0]["members"][0]["there"] is None
    for rule in ("pixels", "path=2024/"):
        answer = served.get(f"/duplicates?keep={rule}")
        assert answer.status == 409 and answer.error.startswith("keep: this gallery has no gallery.json")
    assert decide(served, {"decision": "same", "keep": "a.jpg", "remove": ["b.jpg"]}).status == 200
    status = served.get("/decisions/status").json()
    assert (status["same"], status["to_remove"], status["gone"], look(served)["open"]) == (1, None, None, 1)
    answer = served.get("/decisions/files")
    assert (answer.status, "does not know paths" in answer.error) == (409, True)


def test_a_media_folder_that_is_gone_is_said_and_files_that_are_gone_are_counted(ruiji: Ruiji, ready: Served) -> None:
    shutil.rmtree(ruiji.media / "001")
    (ruiji.media / "002/002-large.jpg").unlink()
    found = look(ready)
    assert [group["name"] for group in found["groups"]] == [0, 4, 6, 8, 10] and found["gone"] == 1
    # One that is there is kept rather than one that is not.
    assert [member["there"] for member in found["groups"][1]["members"]] == [True, False]
    ruiji.media.rename(ruiji.media.parent / "away")
    answer = ready.get("/decisions/status")
    assert (answer.status, "there is no media folder" in answer.error) == (409, True)


def test_the_stand_follows_the_files_without_a_decision(ruiji: Ruiji, ready: Served) -> None:
    decide(
        ready, *({"decision": "same", "keep": f"00{n}-large.jpg", "remove": [f"00{n}-small1.jpg"]} for n in range(3))
    )
    files = [ruiji.media / f"00{n}/00{n}-small1.jpg" for n in range(3)]
    before = ready.get("/decisions/status").json()
    freed = sum(path.stat().st_size for path in files)
    assert (before["kept"], before["to_remove"], before["frees_bytes"], before["gone"]) == (3, 3, freed, 0)
    for path in files:
        path.unlink()
    after = ready.get("/decisions/status").json()
    assert (after["kept"], after["to_remove"], after["frees_bytes"], after["gone"]) == (3, 0, 0, 3)
    told = json.loads(ruiji("duplicates", "status", "--json").stdout)
    assert told.pop("open") == 3 and told == after
    ruiji.media.rename(ruiji.media.parent / "away")
    answer = ready.get("/decisions/status")
    assert (answer.status, "there is no media folder" in answer.error) == (409, True)


def test_the_stand_of_a_large_clean_up_is_made_again_after_a_while_or_a_list(
    ruiji: Ruiji, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_look_alikes(ruiji, 2)
    one = CleanUp(resident(ruiji), ruiji.media)
    one.record([Asked(Verdict.same, keep="000-large.jpg", remove=("000-small1.jpg",))])
    monkeypatch.setattr("serve.cleanup._QUICK_S", 0.0)
    monkeypatch.setattr("serve.cleanup._TIMES", 10.0**9)
    first = one.stand()
    (ruiji.media / "000/000-small1.jpg").unlink()
    assert one.stand() is first and first.totals is not None and first.totals.remove == 1
    assert [type(each) for each in one.files(removed=True)] == [LeftOut]
    listed = one.stand()
    assert listed.totals is not None and (listed.totals.remove, listed.totals.gone) == (0, 1)
    assert one.stand() is listed
    monkeypatch.setattr("serve.cleanup._TIMES", 0.0)
    assert one.stand() is not listed


def test_what_is_decided_is_found_once_for_the_same_decisions(ruiji: Ruiji, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a large gallery it takes seconds, and people turn many pages.
    write_look_alikes(ruiji, 2)
    one, made = CleanUp(resident(ruiji), ruiji.media), list[object]()
    monkeypatch.setattr("serve.cleanup.decided_in", lambda *given: (made.append(given), decided_in(*given))[1])
    for number in (0, 1):
        one.record([Asked(Verdict.same, keep=f"00{number}-large.jpg", remove=(f"00{number}-small1.jpg",))])
        for first in range(number + 1):
            found, total, _, _ = one.decided(first, 1)
            assert (len(found), total) == (1, number + 1)
        assert len(list(one.files(removed=True))) == number + 1
        assert len(made) == number + 1
    before = one.decided(0, 5)[2]
    add_rows(ruiji, ["000/000-large.jpg"], np.ones((1, 12), np.float32))
    assert one.decided(0, 5)[1] == 2 and len(made) == 3
    # Searched and cleaned up is one gallery in memory, new shards too.
    assert before is not one.decided(0, 5)[2] is shards_of(one.resident.gallery)


def test_a_damaged_decisions_file_and_a_full_disk_are_said_and_lose_nothing(ruiji: Ruiji, ready: Served) -> None:
    file = ruiji.features / "decisions.jsonl"
    skip = [{"decision": "skip", "objects": [f"00{n}-large.jpg", f"00{n}-small1.jpg"]} for n in range(6)]
    assert decide(ready, skip[0]).status == 200
    whole = file.read_bytes()
    # No file of this process may grow beyond this: what a full disk does.
    resource.prlimit(ready.process.pid, resource.RLIMIT_FSIZE, (len(whole) + 10, resource.RLIM_INFINITY))
    answer = decide(ready, skip[1])
    assert (answer.status, answer.error.startswith(f"cannot write {file}")) == (503, True)
    resource.prlimit(ready.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert [group["name"] for group in look(ready)["groups"]] == [2, 4, 6, 8, 10]
    assert decide(ready, skip[2]).status == 200
    assert [group["name"] for group in look(ready)["groups"]] == [2, 6, 8, 10]
    sound = file.read_bytes()
    file.write_bytes(sound.replace(b'"skip"', b'"slip"', 1))
    for answer in (ready.get("/duplicates"), ready.get("/decisions/status"), decide(ready, skip[3])):
        assert answer.status == 503 and f"line 1 of {file}" in answer.error
    file.write_bytes(sound)
    assert [group["name"] for group in look(ready)["groups"]] == [2, 6, 8, 10]
    assert "Traceback" not in ready.log.read_text()


def test_new_pictures_are_compared_only_when_that_is_asked_for(ruiji: Ruiji, ready: Served) -> None:
    new = ruiji.media / "new.jpg"
    new.write_bytes(b"another")
    add_rows(ruiji, ["new.jpg"], look_alikes(6)[:1])
    # The process of the comparison before may have to end yet.
    wait_until(lambda: look(ready)["comparison"]["state"] == "missing", what="the state")
    comparison = look(ready)["comparison"]
    assert 0 < comparison["total"] - comparison["done"] <= 78
    compare(ready)
    assert names(look(ready)["groups"])[0] == ["000-large.jpg", "000-small1.jpg", "new.jpg"]
    # A higher threshold needs no other comparison.
    assert look(ready, "?threshold=0.999")["comparison"]["state"] == "ready"
    assert look(ready, "?threshold=0.9")["comparison"]["state"] == "missing"


def test_one_comparison_runs_at_a_time_and_ends_with_the_service(ruiji: Ruiji) -> None:
    write_look_alikes(ruiji, 2)
    add_many(ruiji)
    served = start(ruiji)
    assert send(served, "/duplicates/compare").status == 202
    (child,) = comparers(served)
    os.kill(child, signal.SIGSTOP)
    assert look(served)["comparison"]["state"] == "running"
    assert send(served, "/duplicates/compare").status == 202 and comparers(served) == [child]
    other = send(served, "/duplicates/compare?threshold=0.9")
    assert (other.status, "being compared with the threshold 0.95" in other.error) == (409, True)
    assert send(served, "/duplicates/stop").status == 204 and comparers(served) == []
    assert look(served)["comparison"]["state"] == "missing"

    send(served, "/duplicates/compare")
    (child,) = comparers(served)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: look(served)["comparison"]["state"] == "failed", what="its end")
    assert "SIGKILL" in look(served)["comparison"]["error"]
    compare(served)

    send(served, "/duplicates/compare?threshold=0.5")
    (child,) = comparers(served)
    served.process.terminate()
    assert served.process.wait(180) == 0
    assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("how", ["a C library speaks", "a stray line"])
def test_what_is_no_step_of_a_comparison_does_not_keep_it_running(
    ruiji: Ruiji, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    write_look_alikes(ruiji, 2)
    # More than a pipe holds.
    loud = "os.write(1, b'not a step\\n' * 20_000)"
    code = {
        "a C library speaks": f"comparer.wait_asleep = lambda: {loud}; comparer._main()",
        "a stray line": f"{loud}; comparer._main()",
    }[how]

    def command(_: str, *arguments: str) -> list[str]:
        return [sys.executable, "-c", f"import os; import serve.comparer as comparer; {code}", *arguments]

    monkeypatch.setattr("serve.comparing.python_command", command)
    comparing = BackgroundComparison(Device.cpu)
    comparing.start(ruiji.gallery, 0.95)

    def ended() -> Step | None:
        running, step = comparing.step(ruiji.gallery, 0.95) or (True, Step())
        return None if running else step

    wait_until(ended, 60, "its end")
    step = ended()
    assert step is not None
    if how == "a C library speaks":
        assert step.failed is None and step.total > 0
    else:
        assert step.failed == "the comparison ended early: it said what cannot be read: not a step"


def add_many(ruiji: Ruiji, rows: int = 3000) -> None:
    """Rows of no picture, so that a comparison takes a while."""
    paths = [f"many/{n:06d}.jpg" for n in range(rows)]
    (ruiji.media / "many").mkdir()
    for path in paths:
        (ruiji.media / path).touch()
    add_rows(ruiji, paths, np.random.default_rng(5).normal(size=(rows, 12)).astype(np.float32), rows)
