/* SPDX-License-Identifier: Apache-2.0
 *
 * migrd_direct.h: makes a process migratable by migrd. One header, C11 or C++, Linux, no dependency
 * but pthreads. Include it first (or compile with -D_GNU_SOURCE); in one file, put before it
 *
 *     #define MIGRD_DIRECT_IMPLEMENTATION
 *
 * What your process does:
 *
 *     migrd_vmm vmm = {0};
 *     vmm.save_state = my_save;  vmm.load_state = my_load;  vmm.memory_arrived = my_map;
 *     migrd_client *client = migrd_new(&vmm);            NULL: see errno
 *     if (!migrd_is_incoming(client))
 *         migrd_add_region(client, 0, gpa, length);      memory in a memfd, writes tracked
 *     migrd_start(client);                               a thread connects, and serves, for ever
 *
 *     migrd_enter(client);                               in every thread that writes guest memory
 *     for (;;) { migrd_checkpoint(client); ... }
 *     migrd_leave(client);
 *
 * The rules it keeps for you (all of them: migrd/direct/messages.py, which specifies the protocol):
 * a pause is answered only when each thread that entered stands at a checkpoint, and refused after
 * 4 s, before the 5 s are over for which migrd waits (they run on then); a process that waits for a
 * guest begins with the gate closed, so its threads may be started at once; a lost connection
 * changes nothing of the guest; a guest that was given away never runs again unless migrd says so.
 * What writes guest memory without a thread of yours (KVM's vCPUs, vhost) is stopped in `pause`.
 *
 * Callbacks run in the library's thread, one at a time; all are optional. One that returns nonzero
 * refuses what was asked, and must leave everything as it was. None may call migrd_stop.
 */
#ifndef MIGRD_DIRECT_H
#define MIGRD_DIRECT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>
#if defined(__GLIBC__) && !defined(__USE_GNU)
#error "include migrd_direct.h before any other header, or compile with -D_GNU_SOURCE"
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum migrd_state {
    MIGRD_RUNNING = 1,
    MIGRD_PAUSED = 2,
    MIGRD_INCOMING = 3, /* empty: waits to be given a guest */
    MIGRD_LOADED = 4,   /* memory and state are here; it has not run */
    MIGRD_DEPARTED = 5  /* it was given away */
};

typedef struct migrd_region {
    uint32_t id;
    int fd;
    uint64_t gpa;
    uint64_t length; /* bytes; a multiple of 4096, as gpa and offset */
    uint64_t offset; /* in the file */
    void *memory;    /* write through this one mapping only: others are not watched */
} migrd_region;

/* A piece of a region, and the address (IOVA) under which a device knows it. */
typedef struct migrd_range {
    uint32_t region_id;
    uint64_t offset, iova, length;
} migrd_range;

typedef struct migrd_vmm {
    const char *name;   /* of the VM; NULL: MIGRD_VM of the environment */
    const char *socket; /* NULL: MIGRD_SOCKET */
    void *opaque;       /* first argument of every callback */
    int throttles;      /* every thread that writes guest memory passes the gate, or `throttle` is set */
    /* Stop what the gate does not stop: on return nothing may write guest memory. */
    int (*pause)(void *opaque);
    /* Undo it. After a load: the guest begins to run here. */
    int (*resume)(void *opaque);
    /* All that the guest is besides its memory; the bytes must stay until the guest is resumed. */
    const void *(*save_state)(void *opaque, size_t *length);
    /* Become that guest; do not run it. Its memory is there. */
    int (*load_state)(void *opaque, const void *state, size_t length);
    /* All memory of the guest that has come, contents and all; it stands still meanwhile. */
    int (*memory_arrived)(void *opaque, const migrd_region *regions, size_t count);
    void (*departed)(void *opaque);
    int (*throttle)(void *opaque, unsigned percent);
    /* The process is to end. Without it: SIGTERM to itself. */
    void (*quit)(void *opaque);
    /* The daemon is not there, or refuses; once per change. Without it: to stderr. */
    void (*problem)(void *opaque, const char *text);
} migrd_vmm;

typedef struct migrd_client migrd_client;

/* NULL with errno: EINVAL (nothing names the VM or the socket), EOPNOTSUPP (this kernel cannot track
 * writes: Linux 6.7), or that of a system call. `vmm` is copied; its strings must stay. */
migrd_client *migrd_new(const migrd_vmm *vmm);
int migrd_is_incoming(const migrd_client *client);

/* Before migrd_start. 0, or -1 with errno. Descriptors stay yours, and must stay open. */
void *migrd_add_region(migrd_client *client, uint32_t id, uint64_t gpa, uint64_t length); /* or NULL */
int migrd_add_mapped_region(migrd_client *client, const migrd_region *region);
int migrd_add_hwpt(migrd_client *client, int iommufd, uint32_t hwpt_id, uint64_t page_size,
                   const migrd_range *ranges, size_t count);
int migrd_add_device_log(migrd_client *client, int device, uint64_t page_size,
                         const migrd_range *ranges, size_t count);
int migrd_add_device(migrd_client *client, const char *name, int device);

int migrd_start(migrd_client *client);
/* Tell migrd, end the library's thread, free everything but the guest's memory. No thread may be
 * inside the gate. */
void migrd_stop(migrd_client *client);
enum migrd_state migrd_where(const migrd_client *client);

/* The gate. */
void migrd_enter(migrd_client *client);
void migrd_checkpoint(migrd_client *client);
void migrd_leave(migrd_client *client);

#ifdef __cplusplus
}
#endif
#endif /* MIGRD_DIRECT_H */

#if defined(MIGRD_DIRECT_IMPLEMENTATION) && !defined(MIGRD_DIRECT_IMPLEMENTED)
#define MIGRD_DIRECT_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the protocol is little-endian, and this implementation does not swap bytes"
#endif

/* -------------------------------------------------------------------- the wire: messages.py */

enum {
    MIGRD__MAGIC = 0x4452474D,
    MIGRD__VERSION = 1,
    MIGRD__PACKET = 64 << 10,
    MIGRD__RANGES = 1024,
    MIGRD__PAGE = 4096,
    MIGRD__PAUSE_S = 4, /* less than migrd waits: who is too slow runs on, and says why */
    MIGRD__DAEMON_S = 30,
    MIGRD__GOING_AWAY = 1
};

enum migrd__type {
    MIGRD__HELLO = 1,
    MIGRD__REGION = 2,
    MIGRD__SOURCE = 3,
    MIGRD__DEVICE = 4,
    MIGRD__OFFER_END = 5,
    MIGRD__ANSWER = 6,
    MIGRD__EVENT = 7,
    MIGRD__WELCOME = 33,
    MIGRD__ERROR = 34,
    MIGRD__PAUSE = 35,
    MIGRD__RESUME = 36,
    MIGRD__SAVE_STATE = 37,
    MIGRD__GIVE_REGION = 38,
    MIGRD__LOAD_STATE = 39,
    MIGRD__DEPART = 40,
    MIGRD__THROTTLE = 41,
    MIGRD__QUIT = 42,
    MIGRD__ASK_STATE = 43
};

typedef struct { uint32_t magic; uint16_t type, version; uint32_t length, serial; } migrd__header;
typedef struct { char text[72]; } migrd__name;
typedef struct { uint32_t state, features; migrd__name vm, instance, migration_id; } migrd__hello;
typedef struct { uint32_t id, zero; uint64_t gpa, length, offset, hva; } migrd__region;
typedef struct { uint32_t kind, object_id; uint64_t page_size; uint32_t count, zero; } migrd__source;
typedef struct { uint32_t region_id, zero; uint64_t offset, address, length; } migrd__range;
typedef struct { uint32_t regions, sources, devices, zero; } migrd__offer_end;
typedef struct {
    uint32_t status, state;
    uint64_t value;
    migrd__name migration_id;
    char text[256];
} migrd__answer;
typedef struct { uint32_t kind; char text[256]; } migrd__event;
typedef struct { uint32_t code; char text[512]; } migrd__error;
typedef struct {
    uint32_t id, zero;
    uint64_t gpa, length, offset;
    uint32_t index, total;
} migrd__give_region;

/* A negative array size where a layout is not the protocol's; C11 and C++ spell assertions apart. */
typedef char migrd__layouts[sizeof(migrd__header) == 16 && sizeof(migrd__hello) == 224 &&
                                    sizeof(migrd__region) == 40 && sizeof(migrd__source) == 24 &&
                                    sizeof(migrd__range) == 32 && sizeof(migrd__offer_end) == 16 &&
                                    sizeof(migrd__answer) == 344 && sizeof(migrd__event) == 260 &&
                                    sizeof(migrd__error) == 516 && sizeof(migrd__give_region) == 40
                                ? 1
                                : -1];

/* ------------------------------------------------------------------------------ the client */

typedef struct {
    uint32_t kind, object_id; /* kinds: 1 process, 2 iommufd page table, 3 log of the device */
    uint64_t page_size;
    int fd;
    migrd__range *ranges;
    size_t count;
} migrd__tracker;

typedef struct {
    migrd__name name;
    int fd;
} migrd__passed;

struct migrd_client {
    migrd_vmm vmm;
    const char *instance;
    uint32_t state; /* atomic: read by any thread */
    migrd__name migration_id;
    migrd_region *regions;
    size_t region_count;
    migrd__tracker *trackers;
    size_t tracker_count;
    migrd__passed *devices;
    size_t device_count;
    int uffd, pagemap, stop_event;
    int has_memory, has_offered, is_started;
    uint64_t most_state;
    char problem[640], last_problem[640];
    pthread_t thread;
    pthread_mutex_t lock; /* the gate */
    pthread_cond_t changed;
    int is_closed; /* atomic */
    int throttle;  /* atomic: percent */
    unsigned inside, waiting;
};

typedef struct {
    migrd__header header;
    int fd; /* -1: none; ours */
    unsigned char body[MIGRD__PACKET];
} migrd__packet;

static void *migrd__more(void *list, size_t count, size_t size) {
    return realloc(list, (count + 1) * size);
}

static int migrd__is_name(const char *text) {
    size_t length = text ? strlen(text) : 0;
    return length > 0 && length <= 64;
}

static void migrd__copy(char *to, size_t room, const char *from) {
    size_t length = strlen(from);
    if (length >= room) length = room - 1;
    memset(to, 0, room);
    memcpy(to, from, length);
}

/* ------------------------------------------------------------------------ tracking of writes */

static int migrd__userfaultfd(void) {
    /* linux/userfaultfd.h: PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC */
    uint64_t api[3] = {0xAA, 1u << 0 | 1u << 12 | 1u << 13 | 1u << 15, 0};
    int fd = -1, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, 0xAA00ul, O_CLOEXEC | O_NONBLOCK); /* USERFAULTFD_IOC_NEW */
        close(device);
    }
    if (fd < 0) fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1); /* USER_MODE_ONLY */
    if (fd < 0) return -1;
    if (ioctl(fd, 0xC018AA3Ful, api) < 0) { /* UFFDIO_API */
        close(fd);
        errno = EOPNOTSUPP;
        return -1;
    }
    return fd;
}

static int migrd__watch(const migrd_client *client, const migrd_region *region) {
    uint64_t range[4] = {(uint64_t)(uintptr_t)region->memory, region->length, 1u << 1, 0};
    return ioctl(client->uffd, 0xC020AA00ul, range); /* UFFDIO_REGISTER, MODE_WP */
}

/* -------------------------------------------------------------------------------- making one */

migrd_client *migrd_new(const migrd_vmm *vmm) {
    const char *incoming = getenv("MIGRD_INCOMING"), *instance = getenv("MIGRD_INSTANCE");
    migrd_client *client = (migrd_client *)calloc(1, sizeof *client);
    if (!client) return NULL;
    client->vmm = *vmm;
    if (!client->vmm.name) client->vmm.name = getenv("MIGRD_VM");
    if (!client->vmm.socket) client->vmm.socket = getenv("MIGRD_SOCKET");
    client->instance = instance ? instance : "";
    client->is_closed = incoming && strcmp(incoming, "1") == 0;
    client->has_memory = !client->is_closed;
    client->state = client->is_closed ? MIGRD_INCOMING : MIGRD_RUNNING;
    pthread_mutex_init(&client->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&client->changed, &clock);
    pthread_condattr_destroy(&clock);
    client->uffd = client->pagemap = client->stop_event = -1;
    if (!migrd__is_name(client->vmm.name) || !client->vmm.socket || strlen(client->instance) > 64) {
        errno = EINVAL;
    } else if ((client->uffd = migrd__userfaultfd()) >= 0 &&
               (client->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) >= 0 &&
               (client->stop_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) >= 0) {
        return client;
    }
    int why = errno;
    migrd_stop(client);
    errno = why;
    return NULL;
}

int migrd_is_incoming(const migrd_client *client) { return migrd_where(client) == MIGRD_INCOMING; }

enum migrd_state migrd_where(const migrd_client *client) {
    return (enum migrd_state)__atomic_load_n(&client->state, __ATOMIC_ACQUIRE);
}

static void migrd__stand(migrd_client *client, enum migrd_state state) {
    __atomic_store_n(&client->state, (uint32_t)state, __ATOMIC_RELEASE);
}

int migrd_add_mapped_region(migrd_client *client, const migrd_region *region) {
    void *more = migrd__more(client->regions, client->region_count, sizeof *region);
    if (!more) return -1;
    client->regions = (migrd_region *)more;
    if (migrd__watch(client, region) < 0) return -1;
    client->regions[client->region_count++] = *region;
    return 0;
}

void *migrd_add_region(migrd_client *client, uint32_t id, uint64_t gpa, uint64_t length) {
    migrd_region region;
    memset(&region, 0, sizeof region);
    region.id = id, region.gpa = gpa, region.length = length;
    region.fd = memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (region.fd < 0) return NULL;
    region.memory = MAP_FAILED;
    if (ftruncate(region.fd, (off_t)length) == 0 &&
        fcntl(region.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0)
        region.memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd, 0);
    if (region.memory != MAP_FAILED && migrd_add_mapped_region(client, &region) == 0)
        return region.memory;
    int why = errno;
    if (region.memory != MAP_FAILED) munmap(region.memory, length);
    close(region.fd);
    errno = why;
    return NULL;
}

static int migrd__add_tracker(migrd_client *client, uint32_t kind, int fd, uint32_t object_id,
                              uint64_t page_size, const migrd_range *ranges, size_t count) {
    migrd__tracker made;
    void *more = migrd__more(client->trackers, client->tracker_count, sizeof made);
    if (!more) return -1;
    client->trackers = (migrd__tracker *)more;
    memset(&made, 0, sizeof made);
    made.kind = kind, made.fd = fd, made.object_id = object_id, made.page_size = page_size;
    made.ranges = (migrd__range *)calloc(count ? count : 1, sizeof *made.ranges);
    if (!made.ranges) return -1;
    for (made.count = 0; made.count < count; made.count++) {
        migrd__range *range = &made.ranges[made.count];
        range->region_id = ranges[made.count].region_id;
        range->offset = ranges[made.count].offset;
        range->address = ranges[made.count].iova;
        range->length = ranges[made.count].length;
    }
    client->trackers[client->tracker_count++] = made;
    return 0;
}

int migrd_add_hwpt(migrd_client *client, int iommufd, uint32_t hwpt_id, uint64_t page_size,
                   const migrd_range *ranges, size_t count) {
    return migrd__add_tracker(client, 2, iommufd, hwpt_id, page_size, ranges, count);
}

int migrd_add_device_log(migrd_client *client, int device, uint64_t page_size,
                         const migrd_range *ranges, size_t count) {
    return migrd__add_tracker(client, 3, device, 0, page_size, ranges, count);
}

int migrd_add_device(migrd_client *client, const char *name, int device) {
    void *more = migrd__more(client->devices, client->device_count, sizeof *client->devices);
    if (!more) return -1;
    client->devices = (migrd__passed *)more;
    if (!migrd__is_name(name)) {
        errno = EINVAL;
        return -1;
    }
    migrd__copy(client->devices[client->device_count].name.text, sizeof(migrd__name), name);
    client->devices[client->device_count++].fd = device;
    return 0;
}

/* -------------------------------------------------------------------------------- the gate */

static __thread int64_t migrd__since_ns; /* since when this thread ran without a nap */

static int64_t migrd__now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void migrd_enter(migrd_client *client) {
    pthread_mutex_lock(&client->lock);
    while (client->is_closed) pthread_cond_wait(&client->changed, &client->lock);
    client->inside++;
    pthread_mutex_unlock(&client->lock);
    migrd__since_ns = migrd__now_ns();
}

void migrd_leave(migrd_client *client) {
    pthread_mutex_lock(&client->lock);
    client->inside--;
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&client->lock);
}

static void migrd__nap(int percent) {
    int64_t nap_ns = (migrd__now_ns() - migrd__since_ns) * percent / (100 - percent);
    struct timespec nap;
    if (nap_ns > 100000000) nap_ns = 100000000;
    nap.tv_sec = 0, nap.tv_nsec = (long)nap_ns;
    nanosleep(&nap, NULL);
    migrd__since_ns = migrd__now_ns();
}

void migrd_checkpoint(migrd_client *client) {
    int percent = __atomic_load_n(&client->throttle, __ATOMIC_RELAXED);
    if (percent) migrd__nap(percent);
    if (!__atomic_load_n(&client->is_closed, __ATOMIC_ACQUIRE)) return;
    pthread_mutex_lock(&client->lock);
    client->waiting++;
    pthread_cond_broadcast(&client->changed);
    while (client->is_closed) pthread_cond_wait(&client->changed, &client->lock);
    client->waiting--;
    pthread_mutex_unlock(&client->lock);
    migrd__since_ns = migrd__now_ns();
}

static void migrd__open_gate(migrd_client *client) {
    pthread_mutex_lock(&client->lock);
    __atomic_store_n(&client->is_closed, 0, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&client->changed);
    pthread_mutex_unlock(&client->lock);
}

/* Number of threads that did not stop in time: the gate is open again then. */
static unsigned migrd__close_gate(migrd_client *client) {
    struct timespec until;
    unsigned missing;
    int why = 0;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += MIGRD__PAUSE_S;
    pthread_mutex_lock(&client->lock);
    __atomic_store_n(&client->is_closed, 1, __ATOMIC_RELEASE);
    while (client->waiting < client->inside && why == 0)
        why = pthread_cond_timedwait(&client->changed, &client->lock, &until);
    missing = client->inside - client->waiting;
    pthread_mutex_unlock(&client->lock);
    if (missing) migrd__open_gate(client);
    return missing;
}

/* -------------------------------------------------------------------------- the connection */

static int migrd__fail(migrd_client *client, const char *what) {
    snprintf(client->problem, sizeof client->problem, "%s: %s", what, strerror(errno));
    return -1;
}

static void migrd__report(migrd_client *client) {
    if (strcmp(client->problem, client->last_problem) == 0) return;
    memcpy(client->last_problem, client->problem, sizeof client->problem);
    if (client->vmm.problem)
        client->vmm.problem(client->vmm.opaque, client->problem);
    else
        fprintf(stderr, "migrd: %s\n", client->problem);
}

static int migrd__send(migrd_client *client, int link, enum migrd__type type, uint32_t serial,
                       const void *body, size_t length, const void *tail, size_t tail_length, int fd) {
    migrd__header header;
    struct iovec parts[3];
    struct msghdr message;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } rights;
    header.magic = MIGRD__MAGIC, header.type = (uint16_t)type, header.version = MIGRD__VERSION;
    header.length = (uint32_t)(length + tail_length), header.serial = serial;
    parts[0].iov_base = &header, parts[0].iov_len = sizeof header;
    parts[1].iov_base = (void *)(uintptr_t)body, parts[1].iov_len = length;
    parts[2].iov_base = (void *)(uintptr_t)tail, parts[2].iov_len = tail_length;
    memset(&message, 0, sizeof message);
    memset(&rights, 0, sizeof rights);
    message.msg_iov = parts, message.msg_iovlen = 3;
    if (fd >= 0) {
        message.msg_control = &rights, message.msg_controllen = sizeof rights;
        rights.header.cmsg_level = SOL_SOCKET, rights.header.cmsg_type = SCM_RIGHTS;
        rights.header.cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(&rights.header), &fd, sizeof fd);
    }
    if (sendmsg(link, &message, MSG_NOSIGNAL) >= 0) return 0;
    return migrd__fail(client, "the daemon does not take messages");
}

/* One packet. 0: there; -1: the connection is over, or what came is not understood. */
static int migrd__take(migrd_client *client, int link, migrd__packet *packet) {
    struct iovec parts[2];
    struct msghdr message;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(4 * sizeof(int))];
    } rights;
    memset(&packet->header, 0, sizeof packet->header);
    memset(&message, 0, sizeof message);
    parts[0].iov_base = &packet->header, parts[0].iov_len = sizeof packet->header;
    parts[1].iov_base = packet->body, parts[1].iov_len = sizeof packet->body;
    message.msg_iov = parts, message.msg_iovlen = 2;
    message.msg_control = &rights, message.msg_controllen = sizeof rights;
    packet->fd = -1;
    ssize_t got = recvmsg(link, &message, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == ECONNRESET) /* told once, ahead of what was sent before it */
        got = recvmsg(link, &message, MSG_CMSG_CLOEXEC);
    if (got < 0) return migrd__fail(client, "the daemon hung up");
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (packet->fd >= 0) close(packet->fd);
            packet->fd = fd;
        }
    }
    if (got == 0) {
        snprintf(client->problem, sizeof client->problem, "the daemon hung up");
        return -1;
    }
    if (packet->header.magic == MIGRD__MAGIC && packet->header.type == MIGRD__ERROR &&
        packet->header.length == sizeof(migrd__error)) {
        migrd__error said;
        memcpy(&said, packet->body, sizeof said);
        snprintf(client->problem, sizeof client->problem, "refused: %.511s", said.text);
        return -1;
    }
    if ((size_t)got == sizeof packet->header + packet->header.length &&
        packet->header.magic == MIGRD__MAGIC && packet->header.version == MIGRD__VERSION)
        return 0;
    snprintf(client->problem, sizeof client->problem,
             "the daemon speaks version %u of the hand-over protocol, this process %u",
             (unsigned)packet->header.version, (unsigned)MIGRD__VERSION);
    return -1;
}

/* As migrd__take, waiting. 1: the library is to stop. */
static int migrd__receive(migrd_client *client, int link, int timeout_ms, migrd__packet *packet) {
    struct pollfd wanted[2];
    int ready;
    wanted[0].fd = link, wanted[0].events = POLLIN, wanted[0].revents = 0;
    wanted[1].fd = client->stop_event, wanted[1].events = POLLIN, wanted[1].revents = 0;
    packet->fd = -1;
    do ready = poll(wanted, 2, timeout_ms);
    while (ready < 0 && errno == EINTR);
    if (ready == 0) {
        errno = ETIMEDOUT;
        return migrd__fail(client, "the daemon does not answer");
    }
    if (wanted[1].revents) return 1;
    return migrd__take(client, link, packet);
}

static int migrd__offer_tracker(migrd_client *client, int link, const migrd__tracker *tracker,
                                migrd__offer_end *end) {
    for (size_t first = 0; first < tracker->count; first += MIGRD__RANGES, end->sources++) {
        size_t count = tracker->count - first;
        if (count > MIGRD__RANGES) count = MIGRD__RANGES;
        migrd__source source = {tracker->kind, tracker->object_id, tracker->page_size,
                                (uint32_t)count, 0};
        if (migrd__send(client, link, MIGRD__SOURCE, 0, &source, sizeof source,
                        &tracker->ranges[first], count * sizeof(migrd__range), tracker->fd) < 0)
            return -1;
    }
    return 0;
}

static int migrd__offer_devices(migrd_client *client, int link, migrd__offer_end *end) {
    for (size_t i = 0; i < client->device_count; i++, end->devices++)
        if (migrd__send(client, link, MIGRD__DEVICE, 0, &client->devices[i].name,
                        sizeof(migrd__name), NULL, 0, client->devices[i].fd) < 0)
            return -1;
    return migrd__send(client, link, MIGRD__OFFER_END, 0, end, sizeof *end, NULL, 0, -1);
}

static int migrd__offer_all(migrd_client *client, int link, migrd__range *watched) {
    migrd__offer_end end = {0, 0, 0, 0};
    migrd__tracker process = {1, 0, MIGRD__PAGE, client->pagemap, watched, client->region_count};
    for (size_t i = 0; i < client->region_count; i++) {
        const migrd_region *region = &client->regions[i];
        const uint64_t hva = (uint64_t)(uintptr_t)region->memory;
        migrd__region told = {region->id, 0, region->gpa, region->length, region->offset, hva};
        if (migrd__send(client, link, MIGRD__REGION, 0, &told, sizeof told, NULL, 0, region->fd) < 0)
            return -1;
        migrd__range range = {region->id, 0, 0, hva, region->length};
        watched[end.regions++] = range;
    }
    if (migrd__offer_tracker(client, link, &process, &end) < 0) return -1;
    for (size_t i = 0; i < client->tracker_count; i++)
        if (migrd__offer_tracker(client, link, &client->trackers[i], &end) < 0) return -1;
    client->has_offered = 1;
    return migrd__offer_devices(client, link, &end);
}

/* Of a process that waits: the devices that the guest is to find, if it has any. */
static int migrd__offer(migrd_client *client, int link) {
    migrd__offer_end end = {0, 0, 0, 0};
    if (migrd_is_incoming(client))
        return client->device_count ? migrd__offer_devices(client, link, &end) : 0;
    migrd__range *watched = (migrd__range *)calloc(client->region_count + 1, sizeof *watched);
    int sent = watched ? migrd__offer_all(client, link, watched) : migrd__fail(client, "memory");
    free(watched);
    return sent;
}

/* The offer, where there is something to offer, and the daemon's WELCOME. */
static int migrd__introduce(migrd_client *client, int link, migrd__packet *packet) {
    int failed = migrd__offer(client, link);
    /* where sending failed the daemon has hung up, and has said why */
    if (migrd__receive(client, link, failed ? 0 : MIGRD__DAEMON_S * 1000, packet) || failed) return -1;
    if (packet->header.type == MIGRD__WELCOME && packet->header.length == sizeof client->most_state) {
        memcpy(&client->most_state, packet->body, sizeof client->most_state);
        return 0;
    }
    errno = EPROTO;
    return migrd__fail(client, "the daemon does not say WELCOME");
}

/* --------------------------------------------------------------------------- what is asked */

static const char *migrd__named(enum migrd_state state) {
    static const char *const names[] = {"running", "paused", "incoming", "loaded", "departed"};
    return names[(int)state - 1];
}

/* Each of these returns NULL, or why not. */

static const char *migrd__pause(migrd_client *client) {
    static char why[64];
    unsigned missing = migrd__close_gate(client);
    if (missing) {
        snprintf(why, sizeof why, "%u threads of the guest did not stop", missing);
        return why;
    }
    if (client->vmm.pause && client->vmm.pause(client->vmm.opaque)) {
        migrd__open_gate(client);
        return "the VMM cannot pause";
    }
    migrd__stand(client, MIGRD_PAUSED);
    return NULL;
}

static const char *migrd__resume(migrd_client *client) {
    if (client->vmm.resume && client->vmm.resume(client->vmm.opaque)) return "the VMM cannot resume";
    memset(&client->migration_id, 0, sizeof client->migration_id);
    migrd__stand(client, MIGRD_RUNNING);
    migrd__open_gate(client);
    return NULL;
}

static const char *migrd__save(migrd_client *client, migrd__answer *answer, int *memfd) {
    size_t length = 0;
    const char *state = "";
    if (client->vmm.save_state) {
        state = (const char *)client->vmm.save_state(client->vmm.opaque, &length);
        if (!state) return "the VMM cannot save its state";
    }
    if (length > client->most_state) return "the state is larger than migrd takes";
    int fd = memfd_create("migrd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return "no memfd for the state";
    size_t done = 0;
    while (done < length) {
        ssize_t wrote = pwrite(fd, state + done, length - done, (off_t)done);
        if (wrote <= 0) break;
        done += (size_t)wrote;
    }
    if (done < length || fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW) < 0) {
        close(fd);
        return "the state cannot be written";
    }
    *memfd = fd;
    answer->value = length;
    return NULL;
}

static const char *migrd__take_region(migrd_client *client, const migrd__packet *packet, int *fd) {
    migrd__give_region given;
    migrd_region region;
    memcpy(&given, packet->body, sizeof given);
    if (given.index != client->region_count || given.index >= given.total)
        return "regions come in another order";
    memset(&region, 0, sizeof region);
    region.id = given.id, region.fd = *fd, region.gpa = given.gpa;
    region.length = given.length, region.offset = given.offset;
    region.memory = mmap(NULL, given.length, PROT_READ | PROT_WRITE, MAP_SHARED, *fd,
                         (off_t)given.offset);
    if (region.memory == MAP_FAILED) return "the memory cannot be mapped";
    if (migrd_add_mapped_region(client, &region) < 0) {
        munmap(region.memory, region.length);
        return "the memory cannot be watched";
    }
    *fd = -1;
    if (client->region_count < given.total) return NULL;
    if (client->vmm.memory_arrived &&
        client->vmm.memory_arrived(client->vmm.opaque, client->regions, client->region_count))
        return "the VMM does not take this memory";
    client->has_memory = 1;
    return NULL;
}

static const char *migrd__load(migrd_client *client, const migrd__packet *packet, int fd) {
    uint64_t length;
    struct stat found;
    int failed = 0;
    memcpy(&length, packet->body, sizeof length);
    if (!client->has_memory) return "the guest's memory is not here yet";
    if (fstat(fd, &found) < 0 || (uint64_t)found.st_size != length) return "the state is cut short";
    void *state = length ? mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    if (state == MAP_FAILED) return "the state cannot be mapped";
    if (client->vmm.load_state) failed = client->vmm.load_state(client->vmm.opaque, state, length);
    if (state) munmap(state, length);
    if (failed) return "the VMM cannot load this state";
    migrd__stand(client, MIGRD_LOADED);
    return NULL;
}

static const char *migrd__depart(migrd_client *client, const migrd__packet *packet) {
    migrd__name id;
    memcpy(&id, packet->body, sizeof id);
    id.text[sizeof id.text - 1] = 0;
    if (migrd_where(client) == MIGRD_DEPARTED)
        return strcmp(id.text, client->migration_id.text) ? "it departed already" : NULL;
    client->migration_id = id;
    migrd__stand(client, MIGRD_DEPARTED);
    if (client->vmm.departed) client->vmm.departed(client->vmm.opaque);
    return NULL;
}

static const char *migrd__throttle(migrd_client *client, const migrd__packet *packet) {
    uint32_t percent;
    memcpy(&percent, packet->body, sizeof percent);
    if (!client->vmm.throttles || percent > 99) return "throttling is not offered, or not by that much";
    if (client->vmm.throttle && client->vmm.throttle(client->vmm.opaque, percent))
        return "the VMM cannot throttle";
    __atomic_store_n(&client->throttle, (int)percent, __ATOMIC_RELAXED);
    return NULL;
}

/* What each ask takes: the length of its body, whether a descriptor, and in which states (bits). */
static int migrd__expects(unsigned type, size_t *length, int *has_fd, unsigned *states) {
    const unsigned run = 1u << MIGRD_RUNNING, paused = 1u << MIGRD_PAUSED;
    const unsigned incoming = 1u << MIGRD_INCOMING, loaded = 1u << MIGRD_LOADED;
    const unsigned departed = 1u << MIGRD_DEPARTED, any = ~0u;
    *length = 0, *has_fd = 0, *states = any;
    switch (type) {
    case MIGRD__PAUSE: *states = run | paused; return 1;
    case MIGRD__RESUME: *states = run | paused | loaded | departed; return 1;
    case MIGRD__SAVE_STATE: *states = paused; return 1;
    case MIGRD__GIVE_REGION:
        *length = sizeof(migrd__give_region), *has_fd = 1, *states = incoming;
        return 1;
    case MIGRD__LOAD_STATE: *length = sizeof(uint64_t), *has_fd = 1, *states = incoming; return 1;
    case MIGRD__DEPART: *length = sizeof(migrd__name), *states = paused | departed; return 1;
    case MIGRD__THROTTLE: *length = sizeof(uint32_t), *states = run | paused; return 1;
    case MIGRD__QUIT:
    case MIGRD__ASK_STATE: return 1;
    default: return 0;
    }
}

static const char *migrd__do(migrd_client *client, migrd__packet *packet, migrd__answer *answer,
                             int *memfd) {
    enum migrd_state state = migrd_where(client);
    switch (packet->header.type) {
    case MIGRD__PAUSE: return state == MIGRD_PAUSED ? NULL : migrd__pause(client);
    case MIGRD__RESUME: return state == MIGRD_RUNNING ? NULL : migrd__resume(client);
    case MIGRD__SAVE_STATE: return migrd__save(client, answer, memfd);
    case MIGRD__GIVE_REGION: return migrd__take_region(client, packet, &packet->fd);
    case MIGRD__LOAD_STATE: return migrd__load(client, packet, packet->fd);
    case MIGRD__DEPART: return migrd__depart(client, packet);
    case MIGRD__THROTTLE: return migrd__throttle(client, packet);
    default: return NULL; /* QUIT, ASK_STATE */
    }
}

/* One message of the daemon. 0: go on. */
static int migrd__serve(migrd_client *client, int link, migrd__packet *packet) {
    size_t length;
    int has_fd, memfd = -1;
    unsigned states;
    char text[64];
    migrd__answer answer;
    int stop = migrd__receive(client, link, -1, packet);
    if (stop) return stop;
    if (!migrd__expects(packet->header.type, &length, &has_fd, &states) ||
        packet->header.length != length || has_fd != (packet->fd >= 0)) {
        errno = EPROTO;
        return migrd__fail(client, "the daemon says what is no question");
    }
    memset(&answer, 0, sizeof answer);
    const char *why = text;
    if (states & (1u << migrd_where(client)))
        why = migrd__do(client, packet, &answer, &memfd);
    else
        snprintf(text, sizeof text, "the guest is %s", migrd__named(migrd_where(client)));
    answer.status = why ? 1 : 0;
    answer.state = (uint32_t)migrd_where(client);
    answer.migration_id = client->migration_id;
    if (why) migrd__copy(answer.text, sizeof answer.text, why);
    int sent = migrd__send(client, link, MIGRD__ANSWER, packet->header.serial, &answer, sizeof answer,
                           NULL, 0, memfd);
    if (memfd >= 0) close(memfd);
    if (packet->header.type == MIGRD__QUIT) {
        if (client->vmm.quit)
            client->vmm.quit(client->vmm.opaque);
        else
            kill(getpid(), SIGTERM);
    }
    if (sent < 0) return -1;
    if (migrd_where(client) == MIGRD_RUNNING && !client->has_offered) {
        if (packet->fd >= 0) close(packet->fd);
        return migrd__introduce(client, link, packet);
    }
    return 0;
}

static int migrd__connect(migrd_client *client) {
    struct sockaddr_un name;
    struct timeval patience;
    int link;
    memset(&name, 0, sizeof name);
    name.sun_family = AF_UNIX;
    if (strlen(client->vmm.socket) >= sizeof name.sun_path) {
        errno = ENAMETOOLONG;
        return migrd__fail(client, client->vmm.socket);
    }
    migrd__copy(name.sun_path, sizeof name.sun_path, client->vmm.socket);
    link = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (link < 0) return migrd__fail(client, "socket");
    patience.tv_sec = MIGRD__DAEMON_S, patience.tv_usec = 0;
    setsockopt(link, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(link, (const struct sockaddr *)&name, sizeof name) == 0) return link;
    migrd__fail(client, client->vmm.socket);
    close(link);
    return -1;
}

/* One connection, from HELLO to its end. 1: the library is to stop; 0: it served; -1: it did not. */
static int migrd__converse(migrd_client *client, int link, migrd__packet *packet) {
    migrd__hello hello;
    int ended;
    memset(&hello, 0, sizeof hello);
    hello.state = (uint32_t)migrd_where(client);
    hello.features = client->vmm.throttles ? 1 : 0;
    if (migrd_is_incoming(client) && client->device_count) hello.features |= 2; /* they follow */
    migrd__copy(hello.vm.text, sizeof hello.vm.text, client->vmm.name);
    migrd__copy(hello.instance.text, sizeof hello.instance.text, client->instance);
    hello.migration_id = client->migration_id;
    client->has_offered = 0;
    packet->fd = -1;
    migrd__send(client, link, MIGRD__HELLO, 0, &hello, sizeof hello, NULL, 0, -1);
    if (migrd__introduce(client, link, packet) < 0) return -1;
    client->last_problem[0] = 0;
    do {
        if (packet->fd >= 0) close(packet->fd);
        ended = migrd__serve(client, link, packet);
    } while (ended == 0);
    return ended > 0 ? 1 : 0;
}

static void *migrd__run(void *argument) {
    migrd_client *client = (migrd_client *)argument;
    migrd__packet *packet = (migrd__packet *)malloc(sizeof *packet);
    struct pollfd stop;
    int backoff_ms = 50;
    stop.fd = client->stop_event, stop.events = POLLIN, stop.revents = 0;
    while (packet && !stop.revents) {
        int link = migrd__connect(client), served = -1;
        if (link >= 0) {
            served = migrd__converse(client, link, packet);
            if (packet->fd >= 0) close(packet->fd);
            if (served == 1) {
                migrd__event event = {MIGRD__GOING_AWAY, "it ends"};
                migrd__send(client, link, MIGRD__EVENT, 0, &event, sizeof event, NULL, 0, -1);
            }
            close(link);
        }
        if (served != 1) migrd__report(client);
        if (served == 0) backoff_ms = 50;
        if (poll(&stop, 1, backoff_ms) < 0) stop.revents = 0;
        backoff_ms = backoff_ms < 500 ? 2 * backoff_ms : 1000;
    }
    free(packet);
    return NULL;
}

int migrd_start(migrd_client *client) {
    sigset_t all, before;
    sigfillset(&all); /* signals are the other threads' */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int why = pthread_create(&client->thread, NULL, migrd__run, client);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    client->is_started = why == 0;
    errno = why;
    return why ? -1 : 0;
}

void migrd_stop(migrd_client *client) {
    const uint64_t one = 1;
    if (client->is_started) {
        if (write(client->stop_event, &one, sizeof one) == (ssize_t)sizeof one)
            pthread_join(client->thread, NULL);
    }
    for (size_t i = 0; i < client->tracker_count; i++) free(client->trackers[i].ranges);
    free(client->trackers);
    free(client->regions);
    free(client->devices);
    if (client->uffd >= 0) close(client->uffd);
    if (client->pagemap >= 0) close(client->pagemap);
    if (client->stop_event >= 0) close(client->stop_event);
    pthread_cond_destroy(&client->changed);
    pthread_mutex_destroy(&client->lock);
    free(client);
}

#endif /* MIGRD_DIRECT_IMPLEMENTATION */
