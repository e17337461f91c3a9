/* SPDX-License-Identifier: Apache-2.0
 *
 * A guest that counts aloud while it dirties its memory: a VMM in a hundred lines, migratable by migrd.
 *
 *     counter OUT TAG [MIB [PAGES_PER_S [THREADS [random|sequential]]]]
 *
 * Appends `beat <n> <TAG>` to OUT, 100 times a second; n is kept in guest memory. THREADS threads write
 * PAGES_PER_S pages a second in all. A process that waits for a guest (MIGRD_INCOMING=1) has size, pace
 * and pattern from that guest. Where the memory that arrived is not what was written, OUT says `LOST`.
 */
#define MIGRD_DIRECT_IMPLEMENTATION
#include "migrd_direct.h"

enum { MOST_THREADS = 64, PAGE = 4096, WORD = 8, BEATS_PER_S = 100, TICKS_PER_S = 1000 };

static struct { /* all that the guest is besides its memory: the opaque state */
    uint64_t pages, pages_per_s, threads, is_random;
    uint64_t written[MOST_THREADS]; /* how many pages each thread wrote */
} guest;
static uint64_t *memory; /* page 0 holds the beat; the rest is divided among the threads */
static migrd_client *client;
static const char *out_path, *tag;

static void say(const char *what, uint64_t number) {
    char line[160];
    int length = snprintf(line, sizeof line, "%s %llu %s\n", what, (unsigned long long)number, tag);
    int fd = open(out_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, (size_t)length) != length) perror(out_path);
    close(fd);
}

static void wait_for(int per_s) {
    struct timespec nap = {0, 1000000000L / per_s};
    nanosleep(&nap, NULL);
}

/* Where a thread writes its number'th page: so what it wrote last can be checked after a move. */
static uint64_t *place(uint64_t thread, uint64_t number) {
    uint64_t share = (guest.pages - 1) / guest.threads;
    uint64_t page = guest.is_random ? (number * 0x9E3779B97F4A7C15u >> 20) % share : number % share;
    return memory + (1 + thread * share + page) * (PAGE / WORD);
}

static void *dirty(void *argument) {
    uint64_t thread = (uint64_t)(uintptr_t)argument, *written = &guest.written[thread];
    double due = 0;
    migrd_enter(client); /* waits here until the guest may run */
    if (*written && *place(thread, *written) != *written) say("LOST", *written);
    for (;;) {
        migrd_checkpoint(client);
        for (due += (double)guest.pages_per_s / (double)guest.threads / TICKS_PER_S; due >= 1; due--) {
            uint64_t number = *written + 1;
            *place(thread, number) = number;
            *written = number;
        }
        wait_for(TICKS_PER_S);
    }
    return NULL;
}

static void *beat(void *unused) {
    (void)unused;
    migrd_enter(client);
    for (;;) {
        migrd_checkpoint(client);
        say("beat", ++memory[0]);
        wait_for(BEATS_PER_S);
    }
    return NULL;
}

static int boot(void) {
    pthread_t thread;
    for (uint64_t i = 0; i < guest.threads; i++)
        if (pthread_create(&thread, NULL, dirty, (void *)(uintptr_t)i)) return -1;
    return pthread_create(&thread, NULL, beat, NULL);
}

static const void *save_state(void *unused, size_t *length) {
    (void)unused;
    *length = sizeof guest;
    return &guest;
}

static int memory_arrived(void *unused, const migrd_region *regions, size_t count) {
    (void)unused;
    memory = (uint64_t *)regions[0].memory;
    return count != 1;
}

static int load_state(void *unused, const void *state, size_t length) {
    (void)unused;
    if (length != sizeof guest) return -1;
    memcpy(&guest, state, length);
    return boot(); /* the threads wait at the gate */
}

int main(int argc, char **argv) {
    migrd_vmm vmm;
    if (argc < 3) return fprintf(stderr, "usage: counter OUT TAG [MIB [PAGES_PER_S [THREADS [random]]]]\n"), 2;
    out_path = argv[1], tag = argv[2];
    memset(&vmm, 0, sizeof vmm);
    vmm.save_state = save_state, vmm.load_state = load_state, vmm.memory_arrived = memory_arrived;
    vmm.throttles = 1;
    if (!(client = migrd_new(&vmm))) return perror("migrd_new"), 1;
    if (!migrd_is_incoming(client)) {
        guest.pages = (argc > 3 ? strtoull(argv[3], NULL, 0) : 16) << 8;
        guest.pages_per_s = argc > 4 ? strtoull(argv[4], NULL, 0) : 1000;
        guest.threads = argc > 5 ? strtoull(argv[5], NULL, 0) : 2;
        guest.is_random = argc <= 6 || strcmp(argv[6], "random") == 0;
        if (guest.threads < 1 || guest.threads > MOST_THREADS || guest.pages <= guest.threads)
            return fprintf(stderr, "counter: 1 to %d threads, with memory for each\n", MOST_THREADS), 2;
        memory = (uint64_t *)migrd_add_region(client, 0, 0, guest.pages * PAGE);
        if (!memory || boot()) return perror("counter"), 1;
    }
    if (migrd_start(client)) return perror("migrd_start"), 1;
    for (;;) pause(); /* SIGTERM ends it: migrd's QUIT, or yours */
}
