"""The calls on this host and its VMs, and those that keep the service itself going."""

from typing import Annotated, Final

from aiohttp import web
from pydantic import Field

from migrd.api import events
from migrd.api.auth import Scope
from migrd.api.conditions import (
    NoneMatch,
    WatchQuery,
    accepts_gzip,
    is_known,
    newer_anywhere,
    newer_than_seen,
    read_token,
    tag,
    write_token,
)
from migrd.api.models_host import Check, Health, Host, Readiness, Vm, VmDefinition, VmList
from migrd.api.models_migration import Plan, PlanRequest
from migrd.api.problems import NotReady
from migrd.api.table import Answer, Call, Reply, Scrape, Tag, reply, reply_list, route, to_json
from migrd.api.wire import Flag, Name, WireModel
from migrd.engine.threads import in_thread
from migrd.errors import Violation

MAX_PAGE: Final = 1000
HEALTHY: Final = to_json(Health(status="ok"))
ABOUT: Final = """migrd: live migration of virtual machines

/v1/host         this host, and whether its IOMMUs track dirty pages
/v1/devices      what it can pass through to VMs
/v1/vms          its VMs
/v1/migrations   migrations, newest first; POST begins one
/v1/events       what happens, as server-sent events
/openapi.json    this interface, in full (OpenAPI 3.1)
/metrics         for Prometheus
/readyz          whether the daemon can do its work, and what is missing
/healthz         whether it is alive

On the command line: migrd --help
"""


class VmPath(WireModel):
    vm: Name


class VmsQuery(WatchQuery):
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = MAX_PAGE
    page_token: Annotated[str, Field(max_length=256)] | None = None


class DefineQuery(WireModel):
    dry_run: Flag = False
    """Only check; nothing is kept."""


_VM: Final = Answer("As it is now.", Vm, headers=("ETag",))


@route(
    "GET",
    "/v1/host",
    tag=Tag.HOST,
    scope=Scope.READ,
    answers={200: Answer("This host.", Host)},
)
async def get_host(call: Call) -> Reply:
    """This host: versions, launch profiles, slots, peers, and whether its IOMMUs track dirty
    pages, with the evidence for each."""
    return reply(Host.of(call.service.host()))


@route(
    "GET",
    "/v1/vms",
    tag=Tag.VMS,
    scope=Scope.READ,
    answers={200: Answer("One page, by name.", VmList)},
)
async def list_vms(call: Call, query: VmsQuery) -> Reply:
    """VMs of this host.

    With `watch` it answers when anything on this host is newer than `resource_version`; compare,
    and ask again with the new one.
    """
    version, views = call.service.vms()
    if await newer_anywhere(call, query, version):
        version, views = call.service.vms()
    by_name = sorted(views, key=lambda view: view.name)
    if query.page_token is not None:
        after = read_token(query.page_token, str)
        by_name = [view for view in by_name if view.name > after]
    shown = by_name[: query.limit]
    more = len(by_name) > len(shown)
    token = write_token(shown[-1].name) if more else None
    return await reply_list(version, shown, lambda view: to_json(Vm.of(view)), token)


@route(
    "GET",
    "/v1/vms/{vm}",
    tag=Tag.VMS,
    scope=Scope.READ,
    answers={200: _VM, 304: Answer("It is as the client has it.")},
    problems=(404,),
)
async def get_vm(call: Call, path: VmPath, query: WatchQuery, headers: NoneMatch) -> Reply:
    """One VM: what it is defined as, what its QEMU says, and whether it is being migrated."""
    await newer_than_seen(call, query, lambda: call.service.vm(path.vm).resource_version)
    view = call.service.vm(path.vm)
    etag = tag(view.resource_version)
    if is_known(headers, etag):
        return Reply(304, headers={"ETag": etag})
    return reply(Vm.of(view), ETag=etag)


@route(
    "PUT",
    "/v1/vms/{vm}",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={
        200: Answer("Known already, or changed; with `dry_run`: as it would be.", Vm),
        201: Answer("Defined.", Vm, headers=("Location", "ETag")),
    },
    problems=(404, 409),
)
async def define_vm(call: Call, path: VmPath, query: DefineQuery, body: VmDefinition) -> Reply:
    """Define a VM from a launch profile, or name the profile of one that was adopted.

    The same definition again changes nothing. With passthrough devices `decision` says whether
    dirty tracking is asked for as things are known now; no device is touched. What is in the way is
    refused, all of it at once (`decision_refused`).
    """
    view, created = await call.service.define_vm(body.spec(path.vm), dry_run=query.dry_run)
    etag = tag(view.resource_version)
    if created and not query.dry_run:
        return reply(Vm.of(view), 201, Location=f"/v1/vms/{view.name}", ETag=etag)
    return reply(Vm.of(view), ETag=etag)


@route(
    "DELETE",
    "/v1/vms/{vm}",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={204: Answer("Forgotten.")},
    problems=(404, 409),
)
async def forget_vm(call: Call, path: VmPath) -> Reply:
    """Forget a VM that does not run here. Nothing but migrd's knowledge of it is deleted."""
    await call.service.forget_vm(path.vm)
    return Reply(204)


@route(
    "POST",
    "/v1/vms/{vm}:start",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={200: _VM},
    problems=(404, 409, 502, 504),
)
async def start_vm(call: Call, path: VmPath) -> Reply:
    """Start a VM from its launch profile. Running already: nothing happens.

    The kernel is asked about its passthrough devices first, and what is decided from the answers is
    kept before QEMU is started: `decision`.
    """
    view = await call.service.start_vm(path.vm)
    return reply(Vm.of(view), ETag=tag(view.resource_version))


@route(
    "POST",
    "/v1/vms/{vm}:stop",
    tag=Tag.VMS,
    scope=Scope.WRITE,
    answers={200: _VM},
    problems=(404, 409, 502, 504),
)
async def stop_vm(call: Call, path: VmPath) -> Reply:
    """End a VM that migrd launched. Stopped already: nothing happens."""
    view = await call.service.stop_vm(path.vm)
    return reply(Vm.of(view), ETag=tag(view.resource_version))


@route(
    "POST",
    "/v1/vms/{vm}:plan",
    tag=Tag.VMS,
    scope=Scope.READ,
    answers={200: Answer("What it would meet.", Plan)},
    problems=(404, 409, 502, 504),
)
async def plan_vm(call: Call, path: VmPath, body: PlanRequest) -> Reply:
    """What if: another policy, other devices, a downtime limit, a destination.

    Every reason not to start or to migrate, every warning, what would be decided about passthrough
    devices here and at the destination, and the estimate. Changes nothing.
    """
    question = body.question(path.vm, call.site.defaults, by=call.by.label)
    return reply(Plan.of(await call.service.what_if(question)))


@route(
    "GET",
    "/v1/events",
    tag=Tag.EVENTS,
    scope=Scope.READ,
    answers={
        200: Answer("A stream that does not end.", content_type="text/event-stream"),
    },
)
async def stream_events(
    call: Call, query: events.EventsQuery, headers: events.EventsHeaders
) -> web.StreamResponse:
    """What happens, as server-sent events; the `data` of each is an Event.

    `Last-Event-ID` continues where a broken stream ended. Where the history does not reach back so
    far, or the client reads too slowly, an event `events.lost` says so, and the stream goes on:
    events are hints, the resources are the truth.
    """
    return await events.stream(call, query, headers)


@route(
    "GET",
    "/healthz",
    tag=Tag.SERVICE,
    scope=Scope.OPEN,
    answers={200: Answer("The event loop answers.", Health)},
)
async def healthz(call: Call) -> Reply:
    """Whether the daemon is alive. Nothing is looked at."""
    return Reply(200, HEALTHY)


@route(
    "GET",
    "/readyz",
    tag=Tag.SERVICE,
    scope=Scope.READ,
    answers={200: Answer("It can do its work.", Readiness)},
)
async def readyz(call: Call) -> Reply:
    """Whether the daemon can do its work. When it cannot, the problem lists each failed check."""
    checks = call.service.readiness()
    failed = [check for check in checks if not check.ok]
    if failed:
        raise NotReady([Violation(check.name, "not_ready", check.message) for check in failed])
    return reply(
        Readiness(
            ready=True,
            checks=tuple(Check(name=c.name, ok=c.ok, message=c.message) for c in checks),
        )
    )


@route(
    "GET",
    "/metrics",
    tag=Tag.SERVICE,
    scope=Scope.READ,
    answers={
        200: Answer("Prometheus text.", content_type="text/plain", headers=("ETag",)),
        304: Answer("It is as the client has it."),
    },
)
async def metrics(call: Call, headers: NoneMatch) -> Reply:
    """Metrics for Prometheus, as last rendered: a scrape waits for nothing.

    Compressed with gzip for who accepts it.
    """
    scrape = Scrape(*call.site.metrics())
    body, sent = scrape.body, {"ETag": scrape.etag, "Vary": "Accept-Encoding"}
    if scrape.gzipped is not None and accepts_gzip(call.request.headers.get("Accept-Encoding", "")):
        body, sent["ETag"] = scrape.gzipped, f'{scrape.etag[:-1]}-gzip"'
        sent["Content-Encoding"] = "gzip"
    if is_known(headers, sent["ETag"]):
        return Reply(304, headers={"ETag": sent["ETag"], "Vary": sent["Vary"]})
    return Reply(200, body, scrape.content_type, sent)


@route(
    "GET",
    "/openapi.json",
    tag=Tag.SERVICE,
    scope=Scope.READ,
    answers={200: Answer("OpenAPI 3.1.", content_type="application/json")},
)
async def openapi(call: Call) -> Reply:
    """This document."""
    site = call.site
    if site.openapi is None:
        from migrd.api.openapi import render  # it reads this module's routes

        site.openapi = await in_thread(render)
    return Reply(200, site.openapi)


@route(
    "GET",
    "/",
    tag=Tag.SERVICE,
    scope=Scope.READ,
    answers={200: Answer("Where things are.", content_type="text/plain")},
)
async def about(call: Call) -> Reply:
    """Where things are, in plain words."""
    return Reply(200, ABOUT.encode(), "text/plain; charset=utf-8")
