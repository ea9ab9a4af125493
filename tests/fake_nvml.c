/* A libnvidia-ml.so.1 for machines without a GPU: what scaling/profile/nvml.py asks, and ways to make it misbehave.
 *
 * Two cards: 1 is whole, 2 is cut into MIG instances, of which 3 (GPU instance 7) is one. From when the library is
 * loaded, power of card 1 rises from 200 W by 100 W a second, and its energy counter is the exact integral.
 * -DOLD leaves out what drivers before 535 lack. Structures are those of nvml.h. */
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };
typedef unsigned long long u64;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } ProcessInfo;
typedef struct { void *device; u64 type, data; unsigned gpu_instance, compute_instance; } EventData;

static char card_1, card_2, instance_3, event_set;

/* ---- what a test sets */

static u64 throttle_bits, ecc_count, used_bytes = 40ull << 30;
static unsigned utilization_percent = 50, clock_mhz = 1500;
static EventData events[256];
static int event_count;
static int users;
static struct Rule { char name[64]; int after, code, calls; double hang_s; } rules[16];
static int rule_count;

int fake_set(const char *name, u64 value) {
    if (!strcmp(name, "throttle")) throttle_bits = value;
    else if (!strcmp(name, "ecc")) ecc_count = value;
    else if (!strcmp(name, "used")) used_bytes = value;
    else if (!strcmp(name, "utilization")) utilization_percent = value;
    else if (!strcmp(name, "clock")) clock_mhz = value;
    else return -1;
    return 0;
}

/* After so many calls a function hangs for so long, then answers with `code`. */
void fake_rule(const char *name, int after, int code, double hang_s) {
    struct Rule *rule = &rules[rule_count];
    for (int i = 0; i < rule_count; i++) if (!strcmp(rules[i].name, name)) rule = &rules[i];
    if (rule == &rules[rule_count]) rule_count++;
    strncpy(rule->name, name, sizeof rule->name - 1);
    rule->after = after, rule->code = code, rule->hang_s = hang_s, rule->calls = 0;
}

void fake_xid(u64 number, unsigned gpu_instance) {
    events[event_count++] = (EventData){&card_1, 8, number, gpu_instance, ~0u};
}

int fake_users(void) { return users; }

double fake_seconds(void) {
    static double began;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = now.tv_sec + now.tv_nsec * 1e-9;
    if (!began) began = seconds;
    return seconds - began;
}

double fake_joules(double seconds) { return 200 * seconds + 50 * seconds * seconds; }

static int enter(const char *name) {
    for (int i = 0; i < rule_count; i++) {
        struct Rule *rule = &rules[i];
        if (strcmp(rule->name, name) || rule->calls++ < rule->after) continue;
        struct timespec time = {(time_t)rule->hang_s, (long)((rule->hang_s - (long)rule->hang_s) * 1e9)};
        nanosleep(&time, 0);
        return rule->code;
    }
    return OK;
}

#define ENTER do { int code = enter(__func__); if (code) return code; } while (0)
#define WHOLE(device) do { ENTER; if ((device) == &instance_3) return NOT_SUPPORTED; } while (0)

/* ---- the library */

__attribute__((constructor)) static void load(void) { fake_seconds(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; ENTER; users++; return OK; }
int nvmlShutdown(void) { ENTER; users--; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "an error"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    ENTER;
    if (!strcmp(uuid, "GPU-11111111-aaaa-bbbb-cccc-000000000001")) *device = &card_1;
    else if (!strcmp(uuid, "GPU-22222222-aaaa-bbbb-cccc-000000000002")) *device = &card_2;
    else if (!strcmp(uuid, "MIG-33333333-aaaa-bbbb-cccc-000000000003")) *device = &instance_3;
    else return NOT_FOUND;
    return OK;
}
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending) {
    WHOLE(device);
    *now = *pending = device == &card_2;
    return OK;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *device, void **card) {
    ENTER;
    if (device != &instance_3) return INVALID_ARGUMENT;
    *card = &card_2;
    return OK;
}
int nvmlDeviceGetGpuInstanceId(void *device, unsigned *id) {
    ENTER;
    if (device != &instance_3) return NOT_SUPPORTED;
    *id = 7;
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    ENTER;
    memory->total = 80ull << 30;
    memory->used = device == &instance_3 ? 3ull << 30 : used_bytes;
    memory->free = memory->total - memory->used;
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
    WHOLE(device);
    rates->gpu = utilization_percent, rates->memory = 1;
    return OK;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    WHOLE(device);
    *milliwatts = 1000 * (200 + 100 * fake_seconds());
    return OK;
}
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *degrees) {
    (void)sensor;
    WHOLE(device);
    *degrees = device == &card_2 ? 62 : 61;
    return OK;
}
int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *mhz) {
    (void)type;
    WHOLE(device);
    *mhz = clock_mhz;
    return OK;
}
int nvmlDeviceGetMaxClockInfo(void *device, unsigned type, unsigned *mhz) {
    (void)type;
    WHOLE(device);
    *mhz = 1980;
    return OK;
}
int nvmlDeviceGetTotalEccErrors(void *device, unsigned error, unsigned counter, u64 *count) {
    WHOLE(device);
    if (error != 1 || counter != 0) return INVALID_ARGUMENT; /* uncorrected, volatile */
    *count = ecc_count;
    return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, u64 *bits) {
    WHOLE(device);
    *bits = throttle_bits;
    return OK;
}
#ifndef OLD
int nvmlDeviceGetCurrentClocksEventReasons(void *device, u64 *bits) {
    WHOLE(device);
    *bits = throttle_bits;
    return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, u64 *millijoules) {
    WHOLE(device);
    *millijoules = 1000 * (5e6 + fake_joules(fake_seconds()));
    return OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *found) {
    ENTER;
    (void)device;
    if (*count < 2) return *count = 2, INSUFFICIENT_SIZE;
    found[0] = (ProcessInfo){1, 5ull << 30, 0, 0};
    found[1] = (ProcessInfo){(unsigned)getpid(), 2ull << 30, 0, 0};
    *count = 2;
    return OK;
}
int nvmlEventSetCreate(void **set) { ENTER; *set = &event_set; return OK; }
int nvmlEventSetFree(void *set) { ENTER; return set == &event_set ? OK : INVALID_ARGUMENT; }
int nvmlDeviceRegisterEvents(void *device, u64 types, void *set) {
    WHOLE(device);
    return types == 8 && set == &event_set ? OK : INVALID_ARGUMENT;
}
int nvmlEventSetWait_v2(void *set, EventData *data, unsigned milliseconds) {
    if (set != &event_set || milliseconds) return INVALID_ARGUMENT;
    if (event_count) {
        *data = events[0];
        memmove(events, events + 1, --event_count * sizeof *events);
        return OK;
    }
    ENTER;
    return TIMEOUT;
}
#endif
