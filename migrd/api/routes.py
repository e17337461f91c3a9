"""The calls on migrations. With `routes_host` this is the only list of routes there is.

An action is a wish: `queued` is 202, `already_so` is 200, `denied` is a 409 problem whose code is
the engine's reason. Nothing is judged here.
"""

import hashlib
import math
from functools import partial
from typing import Annotated, Final

from pydantic import Field

from migrd.api.auth import Scope
from migrd.api.conditions import (
    Match,
    NoneMatch,
    WatchQuery,
    is_known,
    newer_anywhere,
    newer_than_seen,
    page,
    read_token,
    require_match,
    tag,
    write_token,
)
from migrd.api.models_migration import (
    ActionAnswer,
    MigrationRequest,
    Plan,
    PolicyChange,
    ResolveRequest,
)
from migrd.api.models_progress import (
    Decision,
    DecisionList,
    Migration,
    MigrationList,
    PhaseWord,
    Round,
    RoundList,
    begun_s,
)
from migrd.api.table import Answer, Call, Reply, Tag, reply, reply_list, route, to_json
from migrd.api.wire import Flag, MigrationId, Name, WireModel
from migrd.core.admission import Admission
from migrd.engine import service
from migrd.engine.service import MigrationView, Role
from migrd.errors import Conflict

MAX_PAGE: Final = 1000
MAX_RECORDS: Final = 10_000
RETRY_AFTER_S: Final = 1


class MigrationPath(WireModel):
    migration_id: MigrationId


class CreateQuery(WireModel):
    dry_run: Flag = False
    """Only answer with the plan; nothing is begun."""


class CreateHeaders(WireModel):
    idempotency_key: Annotated[
        str | None, Field(alias="Idempotency-Key", pattern=r"^[!-~]{1,255}$", examples=["job-42"])
    ] = None
    """With the same key and the same body: the migration that the first request began, never a
    second one. With another body: refused."""


class MigrationsQuery(WatchQuery):
    vm: Name | None = None
    role: Role | None = None
    phase: PhaseWord | None = None
    active: bool | None = None
    """true: only those that go on; false: only those that have ended."""
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 100
    page_token: Annotated[str, Field(max_length=256)] | None = None


class RecordsQuery(WireModel):
    limit: Annotated[int, Field(ge=1, le=MAX_RECORDS)] = MAX_RECORDS
    page_token: Annotated[str, Field(max_length=256)] | None = None


_CREATED: Final = Answer(
    "Begun: follow it at `Location`.", Migration, headers=("Location", "Retry-After", "ETag")
)
_CREATED_BEFORE: Final = Answer(
    "The same key and body came before: that migration as it is now. With `dry_run`: the plan.",
    Migration,
    headers=("Location", "ETag"),
)
_QUEUED: Final = Answer("Queued: it will be done.", ActionAnswer, headers=("Retry-After",))
_ALREADY_SO: Final = Answer("It is so already.", ActionAnswer)
_ACTION: Final = {200: _ALREADY_SO, 202: _QUEUED}


@route(
    "POST",
    "/v1/migrations",
    tag=Tag.MIGRATIONS,
    scope=Scope.WRITE,
    answers={200: _CREATED_BEFORE, 202: _CREATED},
    problems=(404, 409, 502, 504),
)
async def create_migration(
    call: Call, query: CreateQuery, headers: CreateHeaders, body: MigrationRequest
) -> Reply:
    """Begin a migration.

    The migration is the operation: it goes on after this answer, and its resource says how it
    stands. A client that gets no answer asks again with the same Idempotency-Key.
    """
    request = body.request(call.site.defaults, by=call.by.label)
    if query.dry_run:
        return reply(Plan.of(await call.service.plan(request)))
    canonical = body.model_dump_json(exclude_none=True, exclude_defaults=True)
    view, created = await call.service.create_migration(
        request,
        idempotency_key=headers.idempotency_key,
        body_digest=hashlib.sha256(canonical.encode()).hexdigest(),
    )
    sent = {"Location": f"/v1/migrations/{view.id}", "ETag": tag(view.generation)}
    if created:
        sent["Retry-After"] = str(RETRY_AFTER_S)
    return Reply(202 if created else 200, to_json(Migration.of(view)), headers=sent)


@route(
    "GET",
    "/v1/migrations",
    tag=Tag.MIGRATIONS,
    scope=Scope.READ,
    answers={200: Answer("One page, newest first.", MigrationList)},
)
async def list_migrations(call: Call, query: MigrationsQuery) -> Reply:
    """Migrations of this host, on either side, newest first.

    With `watch` it answers when anything on this host is newer than `resource_version`; compare,
    and ask again with the new one.
    """
    version, views = call.service.migrations()
    if await newer_anywhere(call, query, version):
        version, views = call.service.migrations()
    newest_first = sorted(views, key=_age_key, reverse=True)
    chosen = [view for view in newest_first if _is_chosen(view, query)]
    if query.page_token is not None:
        after = read_token(query.page_token, _read_age_key)
        chosen = [view for view in chosen if _age_key(view) < after]
    shown = chosen[: query.limit]
    more = len(chosen) > len(shown)
    token = write_token(_age_key(shown[-1])) if more else None
    return await reply_list(version, shown, partial(_rendered, call), token)


def _rendered(call: Call, view: MigrationView) -> bytes:
    """The JSON of a migration; of one that has ended it is made once."""
    if not view.is_terminal:
        return to_json(Migration.of(view))
    generation, rendered = call.site.kept.get(view.id, (None, b""))
    if generation == view.generation:
        return rendered
    return call.site.keep(view.id, view.generation, to_json(Migration.of(view)))


def _age_key(view: MigrationView) -> tuple[float, str]:
    return view.created_wall_s, view.id


def _read_age_key(text: str) -> tuple[float, str]:
    wall, gap, id_ = text.partition(" ")
    if not gap or not math.isfinite(float(wall)):
        raise ValueError(text)
    return float(wall), id_


def _is_chosen(view: MigrationView, query: MigrationsQuery) -> bool:
    return (
        (query.vm is None or view.vm == query.vm)
        and (query.role is None or view.role == query.role)
        and (query.phase is None or view.phase == query.phase)
        and (query.active is None or view.is_terminal != query.active)
    )


@route(
    "GET",
    "/v1/migrations/{migration_id}",
    tag=Tag.MIGRATIONS,
    scope=Scope.READ,
    answers={
        200: Answer("As it is now.", Migration, headers=("ETag",)),
        304: Answer("It is as the client has it."),
    },
    problems=(404,),
)
async def get_migration(
    call: Call, path: MigrationPath, query: WatchQuery, headers: NoneMatch
) -> Reply:
    """One migration: phase, progress, conditions, timeline, estimate, blackout.

    With `watch` it answers when this migration is newer than `resource_version`.
    """

    def version() -> int:
        return call.service.migration(path.migration_id).resource_version

    await newer_than_seen(call, query, version)
    view = call.service.migration(path.migration_id)
    etag = tag(view.generation)
    if is_known(headers, etag):
        return Reply(304, headers={"ETag": etag})
    return Reply(200, _rendered(call, view), headers={"ETag": etag})


@route(
    "GET",
    "/v1/migrations/{migration_id}/rounds",
    tag=Tag.MIGRATIONS,
    scope=Scope.READ,
    answers={200: Answer("Oldest first.", RoundList)},
    problems=(404,),
)
async def list_rounds(call: Call, path: MigrationPath, query: RecordsQuery) -> Reply:
    """Every round of a migration: what it sent, what it left, how fast the guest dirtied memory."""
    begun = begun_s(call.service.migration(path.migration_id))
    rounds = await call.service.rounds(path.migration_id)
    shown, token = page(rounds, _offset(query), query.limit)
    return await reply_list(None, shown, lambda r: to_json(Round.of(r, begun)), token)


@route(
    "GET",
    "/v1/migrations/{migration_id}/decisions",
    tag=Tag.MIGRATIONS,
    scope=Scope.READ,
    answers={200: Answer("Oldest first.", DecisionList)},
    problems=(404,),
)
async def list_decisions(call: Call, path: MigrationPath, query: RecordsQuery) -> Reply:
    """Every decision about a migration, with its reason and the figures it was made on."""
    begun = begun_s(call.service.migration(path.migration_id))
    decisions = await call.service.decisions(path.migration_id)
    shown, token = page(decisions, _offset(query), query.limit)
    return await reply_list(None, shown, lambda d: to_json(Decision.of(d, begun)), token)


def _offset(query: RecordsQuery) -> int:
    return 0 if query.page_token is None else read_token(query.page_token, _whole)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


@route(
    "POST",
    "/v1/migrations/{migration_id}:cancel",
    tag=Tag.MIGRATIONS,
    scope=Scope.WRITE,
    answers=_ACTION,
    problems=(404, 409),
)
async def cancel_migration(call: Call, path: MigrationPath) -> Reply:
    """Ask for a migration to be cancelled; the guest stays on the source.

    Refused past the point of no return (`past_point_of_no_return`): the destination may run.
    """
    return _answered(await call.service.cancel(path.migration_id, by=call.by.label))


@route(
    "POST",
    "/v1/migrations/{migration_id}:switchover",
    tag=Tag.MIGRATIONS,
    scope=Scope.WRITE,
    answers=_ACTION,
    problems=(404, 409),
)
async def force_switchover(call: Call, path: MigrationPath) -> Reply:
    """Switch over now, however long the blackout will be."""
    return _answered(await call.service.switch_over(path.migration_id, by=call.by.label))


@route(
    "PATCH",
    "/v1/migrations/{migration_id}/policy",
    tag=Tag.MIGRATIONS,
    scope=Scope.WRITE,
    answers=_ACTION,
    problems=(404, 409, 412),
)
async def change_policy(
    call: Call, path: MigrationPath, headers: Match, body: PolicyChange
) -> Reply:
    """Change the policy of a migration while it runs; what is left out stays as it is."""
    view = call.service.migration(path.migration_id)
    require_match(headers, tag(view.generation))
    if view.policy is None:
        raise Conflict("the policy is the source's to change", code="not_the_source")
    policy = body.over(view.policy)
    return _answered(await call.service.change_policy(view.id, policy, by=call.by.label))


@route(
    "POST",
    "/v1/migrations/{migration_id}:resolve",
    tag=Tag.MIGRATIONS,
    scope=Scope.WRITE,
    answers=_ACTION,
    problems=(404, 409),
)
async def resolve_migration(call: Call, path: MigrationPath, body: ResolveRequest) -> Reply:
    """Settle who has the guest, by what a person knows, with the evidence for it.

    At the source: of a migration in `needs_operator`. At the destination: of one that is `loaded`
    or `owned` and does not go on (`NotGoingOn`), by `use_destination_copy` or `guest_lost`.

    Both sides are asked first: a word that one of them proves wrong is refused
    (`destination_lives`, `destination_ran`, `source_runs`, ...). It is written down, with what
    could be seen of both sides, before it is carried out; `resolutions` of the migration shows it.
    """
    return _answered(
        await call.service.resolve(
            path.migration_id, body.resolution, evidence=body.evidence, by=call.by.label
        )
    )


def _answered(answer: service.Answer) -> Reply:
    match answer.admission:
        case Admission.DENIED:
            raise Conflict(answer.message, code=answer.reason)
        case Admission.QUEUED:
            return reply(ActionAnswer.of(answer), 202, Retry_After=str(RETRY_AFTER_S))
        case Admission.ALREADY_SO:
            return reply(ActionAnswer.of(answer))
