// SPDX-License-Identifier: Apache-2.0
//
// A VFIO device and an iommufd without a kernel that has either: preloaded into an unmodified QEMU,
// it answers every ioctl of type ';' (VFIO and iommufd share it) on whatever descriptor it comes.
//
// QEMU is given memfds in place of /dev/iommu and of the device: a device's configuration space and
// its BAR 0 are the contents of its memfd, read and written as such. What is here is the device's
// migration state machine, its data stream (checksummed on both ends), its log of DMA writes, and
// the faults that tests ask for. What is not: DMA, an IOMMU, interrupts, real state, real timing.
//
// Asked for by environment:
//   FV_LOG=file         one line per thing that happened
//   FV_FLAGS=n          VFIO_MIGRATION_* that the device offers; 0: no migration at all
//   FV_NOLOG=1          it has no log of its DMA writes
//   FV_PRECOPY=bytes FV_STOPCOPY=bytes     how much it sends before and after the stop
//   FV_DIRTY=pages      how many it reports dirty at each look
//   FV_FAIL=STATE       entering it fails with EIO; BIND: binding fails with EBUSY
//   FV_FAIL_IF=file     ... only while that file exists
//   FV_DELAY=STATE:ms   entering it takes so long

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/iommufd.h>
#include <linux/vfio.h>

#define MIB (1ull << 20)
#define MAX_DEVICES 64
#define BAR_OFFSET 0x100000
#define BAR_SIZE 0x10000
#define CONFIG_SIZE 4096

struct device {
	int fd;
	uint32_t state;
	int save_fd; // what is sent is appended here; QEMU reads from its own position
	int load_fd; // what QEMU has written
	uint64_t reports;
};

static struct device devices[MAX_DEVICES];
static int device_count;
static uint32_t last_id = 1;
static const char *const NAMES[] = {"ERROR",    "STOP",        "RUNNING",  "STOP_COPY",
				    "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"};
#define STATES (sizeof(NAMES) / sizeof(NAMES[0]))

static void note(const char *format, ...)
{
	static FILE *log;
	struct timespec now;
	va_list arguments;

	if (!log) {
		const char *path = getenv("FV_LOG");

		log = path ? fopen(path, "a") : NULL;
		if (!log)
			return;
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	fprintf(log, "%ld.%06ld ", (long)now.tv_sec, now.tv_nsec / 1000);
	va_start(arguments, format);
	vfprintf(log, format, arguments);
	va_end(arguments);
	fputc('\n', log);
	fflush(log);
}

static uint64_t number(const char *name, uint64_t otherwise)
{
	const char *value = getenv(name);

	return value ? strtoull(value, NULL, 0) : otherwise;
}

static int is_to_fail(const char *what)
{
	const char *named = getenv("FV_FAIL"), *only_if = getenv("FV_FAIL_IF");

	return named && !strcmp(named, what) && (!only_if || !access(only_if, F_OK));
}

static void take_time(const char *what)
{
	const char *delay = getenv("FV_DELAY");
	size_t length = strlen(what);

	if (delay && !strncmp(delay, what, length) && delay[length] == ':')
		usleep(1000 * atoi(delay + length + 1));
}

static struct device *device_of(int fd)
{
	for (int i = 0; i < device_count; i++)
		if (devices[i].fd == fd)
			return &devices[i];
	if (device_count == MAX_DEVICES)
		abort();
	devices[device_count] = (struct device){.fd = fd, .save_fd = -1, .load_fd = -1};
	devices[device_count].state = VFIO_DEVICE_STATE_RUNNING;
	return &devices[device_count++];
}

// The data stream

static void append_noise(int fd, uint64_t bytes)
{
	char buffer[65536];
	uint32_t word = 0x1234567 + bytes;
	off_t end = lseek(fd, 0, SEEK_CUR), position = end;

	end = lseek(fd, 0, SEEK_END);
	lseek(fd, position, SEEK_SET);
	while (bytes) {
		size_t part = bytes < sizeof(buffer) ? bytes : sizeof(buffer);

		for (size_t i = 0; i < part; i++) {
			word = word * 1664525 + 1013904223;
			buffer[i] = word >> 24;
		}
		if (pwrite(fd, buffer, part, end) != (ssize_t)part)
			abort();
		end += part;
		bytes -= part;
	}
}

static void note_checksum(struct device *device, const char *what, int fd)
{
	uint8_t buffer[65536];
	uint64_t hash = 1469598103934665603ull; // FNV-1a
	off_t position = 0;
	ssize_t got;

	while ((got = pread(fd, buffer, sizeof(buffer), position)) > 0) {
		for (ssize_t i = 0; i < got; i++)
			hash = (hash ^ buffer[i]) * 1099511628211ull;
		position += got;
	}
	note("device %d %s %lld bytes fnv %016llx", device->fd, what, (long long)position,
	     (unsigned long long)hash);
}

static int open_save(struct device *device, uint64_t bytes)
{
	int fd = memfd_create("save", 0);

	append_noise(fd, bytes);
	device->save_fd = dup(fd);
	return fd;
}

static void close_save(struct device *device)
{
	if (device->save_fd >= 0)
		close(device->save_fd);
	device->save_fd = -1;
}

static int is_pre_copy(uint32_t state)
{
	return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static int set_state(struct device *device, struct vfio_device_feature_mig_state *asked)
{
	uint32_t to = asked->device_state, from = device->state;

	asked->data_fd = -1;
	if (to >= STATES) {
		errno = EINVAL;
		return -1;
	}
	take_time(NAMES[to]);
	if (is_to_fail(NAMES[to])) {
		note("device %d state %s -> %s FAIL", device->fd, NAMES[from], NAMES[to]);
		errno = EIO;
		return -1;
	}
	if (to == VFIO_DEVICE_STATE_PRE_COPY && !is_pre_copy(from)) {
		asked->data_fd = open_save(device, number("FV_PRECOPY", 8 * MIB));
	} else if (to == VFIO_DEVICE_STATE_STOP_COPY && is_pre_copy(from)) {
		append_noise(device->save_fd, number("FV_STOPCOPY", 4 * MIB));
	} else if (to == VFIO_DEVICE_STATE_STOP_COPY) {
		asked->data_fd = open_save(device, number("FV_STOPCOPY", 4 * MIB));
	} else if (to == VFIO_DEVICE_STATE_RESUMING) {
		asked->data_fd = memfd_create("load", 0);
		device->load_fd = dup(asked->data_fd); // QEMU closes its own before it leaves RESUMING
	}
	if (from == VFIO_DEVICE_STATE_RESUMING && device->load_fd >= 0) {
		note_checksum(device, "received", device->load_fd);
		close(device->load_fd);
		device->load_fd = -1;
	}
	if (from == VFIO_DEVICE_STATE_STOP_COPY && device->save_fd >= 0)
		note_checksum(device, "sent", device->save_fd);
	if (!is_pre_copy(to) && to != VFIO_DEVICE_STATE_STOP_COPY)
		close_save(device);
	device->state = to;
	note("device %d state %s -> %s", device->fd, NAMES[from], NAMES[to]);
	return 0;
}

static int precopy_info(int fd, struct vfio_precopy_info *info)
{
	off_t position = lseek(fd, 0, SEEK_CUR), end = lseek(fd, 0, SEEK_END);

	lseek(fd, position, SEEK_SET);
	info->initial_bytes = end - position;
	info->dirty_bytes = 0;
	return 0;
}

// What the device can do

static int dma_logging(struct device *device, uint32_t id, void *data, int is_probe)
{
	struct vfio_device_feature_dma_logging_report *report = data;

	if (getenv("FV_NOLOG")) {
		errno = ENOTTY;
		return -1;
	}
	if (is_probe)
		return 0;
	if (id == VFIO_DEVICE_FEATURE_DMA_LOGGING_START) {
		note("device %d dma-logging start", device->fd);
	} else if (id == VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP) {
		note("device %d dma-logging stop after %llu reports", device->fd,
		     (unsigned long long)device->reports);
	} else {
		uint64_t pages = report->length / report->page_size, dirty = number("FV_DIRTY", 1);
		uint8_t *bitmap = (uint8_t *)(uintptr_t)report->bitmap;

		for (uint64_t page = 0; page < pages && page < dirty; page++)
			bitmap[page / 8] |= 1 << (page % 8);
		device->reports++;
	}
	return 0;
}

static int feature(int fd, struct vfio_device_feature *asked)
{
	struct device *device = device_of(fd);
	uint32_t id = asked->flags & VFIO_DEVICE_FEATURE_MASK;
	int is_probe = !!(asked->flags & VFIO_DEVICE_FEATURE_PROBE);
	uint64_t flags = number("FV_FLAGS", VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
						    VFIO_MIGRATION_PRE_COPY);
	struct vfio_device_feature_mig_state *state = (void *)asked->data;

	switch (id) {
	case VFIO_DEVICE_FEATURE_MIGRATION:
		if (!flags)
			break;
		if (!is_probe)
			((struct vfio_device_feature_migration *)asked->data)->flags = flags;
		return 0;
	case VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE:
		if (is_probe)
			return 0;
		if (asked->flags & VFIO_DEVICE_FEATURE_SET)
			return set_state(device, state);
		state->device_state = device->state;
		return 0;
	case VFIO_DEVICE_FEATURE_MIG_DATA_SIZE:
		if (!is_probe)
			((struct vfio_device_feature_mig_data_size *)asked->data)
				->stop_copy_length = number("FV_STOPCOPY", 4 * MIB);
		return 0;
	case VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
	case VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP:
	case VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT:
		return dma_logging(device, id, asked->data, is_probe);
	}
	errno = ENOTTY;
	return -1;
}

static int region_info(struct vfio_region_info *region)
{
	uint32_t access = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;

	region->flags = region->cap_offset = 0;
	region->size = region->offset = 0;
	if (region->index >= VFIO_PCI_NUM_REGIONS) {
		errno = EINVAL;
		return -1;
	}
	if (region->index == VFIO_PCI_CONFIG_REGION_INDEX) {
		region->size = CONFIG_SIZE;
		region->flags = access;
	} else if (region->index == VFIO_PCI_BAR0_REGION_INDEX) {
		region->offset = BAR_OFFSET;
		region->size = BAR_SIZE;
		region->flags = access | VFIO_REGION_INFO_FLAG_MMAP;
	}
	return 0;
}

static int bind_device(int fd, struct vfio_device_bind_iommufd *asked)
{
	if (is_to_fail("BIND")) {
		note("device %d bind FAIL", fd);
		errno = EBUSY;
		return -1;
	}
	*device_of(fd) = (struct device){.fd = fd, .save_fd = -1, .load_fd = -1}; // the number is new
	device_of(fd)->state = VFIO_DEVICE_STATE_RUNNING;
	asked->out_devid = ++last_id;
	note("device %d bound to iommufd %d", fd, asked->iommufd);
	return 0;
}

static int iova_ranges(struct iommu_ioas_iova_ranges *asked)
{
	struct iommu_iova_range *range = (void *)(uintptr_t)asked->allowed_iovas;
	uint32_t room = asked->num_iovas;

	asked->num_iovas = 1;
	asked->out_iova_alignment = 4096;
	if (room < 1) {
		errno = EMSGSIZE;
		return -1;
	}
	range->start = 0;
	range->last = (1ull << 48) - 1;
	return 0;
}

static int answer(int fd, unsigned int request, void *argument)
{
	struct vfio_device_info *info = argument;
	struct iommu_hwpt_alloc *hwpt = argument;
	struct iommu_hw_info *hardware = argument;
	struct vfio_irq_info *irq = argument;

	switch (request) {
	case VFIO_DEVICE_BIND_IOMMUFD:
		return bind_device(fd, argument);
	case VFIO_DEVICE_GET_INFO:
		info->flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
		info->num_regions = VFIO_PCI_NUM_REGIONS;
		info->num_irqs = VFIO_PCI_NUM_IRQS;
		info->cap_offset = 0;
		return 0;
	case VFIO_DEVICE_GET_REGION_INFO:
		return region_info(argument);
	case VFIO_DEVICE_GET_IRQ_INFO:
		irq->count = irq->flags = 0;
		return 0;
	case VFIO_DEVICE_RESET:
		note("device %d reset", fd);
		close_save(device_of(fd));
		device_of(fd)->state = VFIO_DEVICE_STATE_RUNNING;
		return 0;
	case VFIO_DEVICE_FEATURE:
		return feature(fd, argument);
	case VFIO_MIG_GET_PRECOPY_INFO:
		return precopy_info(fd, argument);
	case IOMMU_IOAS_ALLOC:
		((struct iommu_ioas_alloc *)argument)->out_ioas_id = ++last_id;
		return 0;
	case IOMMU_IOAS_IOVA_RANGES:
		return iova_ranges(argument);
	case IOMMU_HWPT_ALLOC:
		hwpt->out_hwpt_id = ++last_id;
		note("iommufd %d hwpt flags %x", fd, hwpt->flags);
		return 0;
	case IOMMU_GET_HW_INFO:
		hardware->out_data_type = IOMMU_HW_INFO_TYPE_NONE;
		hardware->out_capabilities = 0; // the IOMMU tracks nothing: the device does
		return 0;
	case VFIO_DEVICE_ATTACH_IOMMUFD_PT:
	case VFIO_DEVICE_DETACH_IOMMUFD_PT:
	case VFIO_DEVICE_SET_IRQS:
	case IOMMU_IOAS_MAP:
	case IOMMU_IOAS_UNMAP:
	case IOMMU_DESTROY:
		return 0;
	}
	note("unknown ioctl %u on %d", request & 0xff, fd);
	errno = ENOTTY;
	return -1;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*real)(int, unsigned long, ...);
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (!real)
		real = dlsym(RTLD_NEXT, "ioctl");
	if (((request >> 8) & 0xff) == ';')
		return answer(fd, (unsigned int)request, argument);
	return real(fd, request, argument);
}
