"""Near-duplicates by the page, decisions about them, and the lists that come of these."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Body, Query
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.errors import UsageError
from search.duplicates.decided import Decided
from search.duplicates.decisions import Decision
from search.duplicates.groups import Group, PairsMissing
from search.duplicates.keep import parse_rules
from search.duplicates.removal import LeftOut, ListedFile, Why
from search.gallery.shards import Gallery
from search.options import FileFormat
from search.requests.duplicates import Asked, Seen, file_lines, left_out_lines
from serve import bodies
from serve.bodies import Choice, CompareQuery, ComparingState, DuplicatesQuery, FileList, FilesQuery, ListQuery
from serve.cleanup import Page, Shown, WantedGroups, modified
from serve.comparing import Step
from serve.routes.common import BUSY, ERRORS, SENT, TheService, answer

#: Of what leads out of a group so much is told.
_SEE_ALSO = 5
_KINDS = {
    FileFormat.paths: ("text/plain; charset=utf-8", "txt"),
    FileFormat.csv: ("text/csv; charset=utf-8", "csv"),
    FileFormat.jsonl: ("application/jsonl", "jsonl"),
}
router = APIRouter(responses=ERRORS | BUSY)


@router.get("/duplicates", response_model=bodies.Duplicates)
async def duplicates(service: TheService, asked: Annotated[DuplicatesQuery, Query()]) -> Response:
    """Groups of near-duplicates without a decision; none before all pairs are compared, which `POST` starts."""
    resident = service.galleries.get(asked.gallery)
    wanted = WantedGroups(asked.threshold, asked.linkage, asked.skipped, asked.contains, asked.identical)
    try:
        rules = None if asked.keep is None else parse_rules(asked.keep, "keep")
    except UsageError as error:
        raise HTTPException(422, str(error)) from None
    folder = resident.gallery.folder
    comparing = service.comparing.step(folder, asked.threshold)
    page, comparison = Page([], 0, 0, None, 0, 0), _comparison(comparing)
    # Who waits for a comparison asks often; what is kept of it need not be read each time.
    if comparison.state is not ComparingState.running:
        try:
            page = await service.cleanups.ask(resident, lambda one: one.page(wanted, rules, asked.after, asked.count))
            comparison = bodies.Comparison(state=ComparingState.ready, done=0, total=0, seconds=None, error=None)
        except PairsMissing as missing:
            comparison.done, comparison.total = missing.done, missing.total
    found = bodies.Duplicates(
        gallery=resident.name,
        comparison=comparison,
        groups=[_group(*each) for each in page.groups],
        total=page.total,
        open=page.open,
        next=page.next,
        gone=page.gone,
        seen=page.seen,
    )
    return answer(found)


@router.post("/duplicates/compare", status_code=202, response_model=bodies.Comparison, responses=SENT)
async def compare(service: TheService, asked: Annotated[CompareQuery, Query()]) -> Response:
    """Compare all pairs in the background, unless that is done; `GET /duplicates` reports the progress."""
    folder = service.galleries.get(asked.gallery).gallery.folder
    service.comparing.start(folder, asked.threshold)
    return answer(_comparison(service.comparing.step(folder, asked.threshold)), 202)


@router.post("/duplicates/stop", status_code=204, responses=SENT)
async def stop(service: TheService) -> Response:
    """Stop the running comparison, if there is one; the next one continues where it stopped."""
    service.comparing.stop()
    return Response(status_code=204)


@router.get("/decisions", response_model=bodies.Decisions)
async def decisions(service: TheService, asked: Annotated[ListQuery, Query()]) -> Response:
    """Decisions that are in force, the latest first."""
    resident = service.galleries.get(asked.gallery)
    found, total, gallery, decided = await service.cleanups.ask(
        resident, lambda one: one.decided(asked.first, asked.count)
    )
    after = asked.first + asked.count
    listed = [_decision(gallery, decided, *each) for each in found]
    following = after if after < total else None
    return answer(bodies.Decisions(decisions=listed, total=total, next=following, seen=len(decided.decisions)))


@router.post("/decisions", response_model=bodies.Recorded, responses=SENT)
async def decide(
    service: TheService, given: Annotated[bodies.AskedDecisions, Body()], asked: Annotated[Choice, Query()]
) -> Response:
    """Record decisions, all of them or none. The answer comes when they are on disk. `undo` withdraws others."""
    resident = service.galleries.get(asked.gallery)
    wanted = [
        Asked(
            one.decision,
            tuple(one.objects),
            one.keep,
            tuple(one.remove),
            tuple(Seen(member.object_id, member.sha256) for member in one.members),
            one.seen,
        )
        for one in given.decisions
    ]
    seen, warnings = await service.cleanups.ask(resident, lambda one: one.record(wanted))
    return answer(bodies.Recorded(recorded=len(wanted), warnings=warnings, seen=seen))


@router.get("/decisions/status", response_model=bodies.DecisionsStatus)
async def status(service: TheService, asked: Annotated[Choice, Query()]) -> Response:
    """Progress of the clean-up."""
    resident = service.galleries.get(asked.gallery)
    stand = await service.cleanups.ask(resident, lambda one: one.stand())
    totals = stand.totals
    found = bodies.DecisionsStatus(
        decided=sum(stand.by_verdict.values()),
        **stand.by_verdict,
        kept=None if totals is None else totals.kept,
        to_remove=None if totals is None else totals.remove,
        frees_bytes=None if totals is None else totals.frees_bytes,
        gone=None if totals is None else totals.gone,
    )
    return answer(found)


@router.get(
    "/decisions/files",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The list.", "content": {kind.partition(";")[0]: {} for kind, _ in _KINDS.values()}}
    },
)
async def files(service: TheService, asked: Annotated[FilesQuery, Query()]) -> Response:
    """The files to remove, as `ruiji duplicates list` prints them. Each is read again; nothing is removed."""
    if asked.null and asked.format is not FileFormat.paths:
        raise HTTPException(422, "null needs format=paths")
    resident, cleanups = service.galleries.get(asked.gallery), service.cleanups
    kind, ending = _KINDS[asked.format]
    name = f'attachment; filename="ruiji-{asked.list.replace("_", "-")}.{ending}"'
    with cleanups.begin_list() as turn:
        found = await cleanups.ask(resident, lambda one: one.files(asked.list is not FileList.keep))
        lines = _lines(asked, found, service.media_dir or Path())
        return _List(turn.pop_all(), lines, {"content-disposition": name}, kind)


class _List(StreamingResponse):
    """Each line, once its file is read; ends the turn, however it ends itself."""

    def __init__(self, turn: ExitStack, lines: Iterator[str], headers: dict[str, str], kind: str) -> None:
        super().__init__(_encoded(turn, lines), headers=headers, media_type=kind)
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The lines alone could not do it: they are never begun if the client has left.
        with self._turn:
            await super().__call__(scope, receive, send)


def _encoded(turn: ExitStack, lines: Iterator[str]) -> Iterator[bytes]:
    # Who has the last line may ask for another list at once.
    with turn:
        for line in lines:
            yield line.encode("utf-8", "surrogateescape")


def _lines(asked: FilesQuery, found: Iterator[ListedFile | LeftOut], media_dir: Path) -> Iterator[str]:
    if asked.list is FileList.left_out:
        left = (one for one in found if isinstance(one, LeftOut) and one.kind is not Why.gone)
        return left_out_lines(left, asked.format, media_dir, asked.null)
    named = (one for one in found if isinstance(one, ListedFile))
    return file_lines(named, asked.format, media_dir, asked.null)


def _comparison(comparing: tuple[bool, Step] | None) -> bodies.Comparison:
    running, step = comparing or (False, Step())
    state = ComparingState.running if running else ComparingState.failed if step.failed else ComparingState.missing
    seconds = step.seconds if running else None
    return bodies.Comparison(state=state, done=step.done, total=step.total, seconds=seconds, error=step.failed)


def _group(name: int, group: Group, shown: list[Shown]) -> bodies.DuplicateGroup:
    return bodies.DuplicateGroup(
        name=name,
        members=[_member(one) for one in shown],
        reason=group.reason,
        pairs=group.pairs,
        least_similarity=group.least_similarity,
        see_also=[
            bodies.AlsoSimilar(
                member=one.member,
                object_id=one.object_id,
                path=one.path,
                similarity=one.similarity,
                pairs=one.pairs,
            )
            for one in group.see_also[:_SEE_ALSO]
        ],
    )


def _member(one: Shown) -> bodies.DuplicateMember:
    member, facts = one.member, one.member.facts
    is_picture = facts is not None and facts.format
    return bodies.DuplicateMember(
        object_id=member.object_id,
        path=member.path,
        similarity=member.similarity,
        identical_to=member.identical_to,
        same_file_as=one.same_file_as,
        sha256=member.digest.hex() if member.digest else None,
        there=one.there,
        bytes=facts.bytes if facts else None,
        width=(facts.width or None) if facts and is_picture else None,
        height=(facts.height or None) if facts and is_picture else None,
        format=facts.format if facts and is_picture else None,
        modified=modified(member),
    )


def _decision(gallery: Gallery, decided: Decided, decision: Decision, keys: list[int]) -> bodies.DecisionInForce:
    objects = []
    for key in keys:
        one = decided.objects[key]
        object_id = gallery.object_id(key) if key >= 0 else None
        objects.append(bodies.DecidedObject(object_id=object_id, path=one.name, gallery=one.gallery))
    return bodies.DecisionInForce(decision=decision.decision, time=decision.time, objects=objects)
