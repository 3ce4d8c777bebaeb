/* A libnvidia-ml.so.1 with one made-up GPU, so that pynvml's own code (structures, sizes, two-step calls, errors) runs
 * where there is no driver. Layouts are those of NVIDIA's nvml.h. FAKE_NVML: "lost" has lost the GPU after it was first
 * seen, "unloaded" has no driver behind it, "xid" reports Xid 79 once. */
#include <stdlib.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9, TIMEOUT = 10, LOST = 15 };
#define MIB (1ull << 20)

struct device { int here; };
struct events { int left; };
struct pci { char legacy[16]; u32 domain, bus, device, id, subsystem; char bus_id[32]; };
struct memory { u64 total, free, used; };
struct memory_v2 { u32 version; u64 total, reserved, free, used; };
struct rates { u32 gpu, memory; };
struct process { u32 pid; u64 used; u32 gi, ci; };
struct sample { u32 pid; u64 at; u32 sm, mem, enc, dec; };
struct event { struct device *device; u64 type, data; u32 gi, ci; };

static struct device the_gpu = {1};
static struct events the_events = {1};
static int seen;

static int is(const char *mode) { const char *m = getenv("FAKE_NVML"); return m && !strcmp(m, mode); }
static u32 pid(void) { const char *p = getenv("FAKE_NVML_PID"); return p ? (u32)atoi(p) : 4242; }

int nvmlInitWithFlags(u32 flags) { (void)flags; return is("unloaded") ? NOT_LOADED : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : code == NOT_LOADED ? "Driver Not Loaded" : "some error"; }
int nvmlSystemGetDriverVersion(char *to, u32 n) { strncpy(to, "550.54.15", n); return OK; }
int nvmlSystemGetCudaDriverVersion(int *to) { *to = 12040; return OK; }
int nvmlDeviceGetCount_v2(u32 *to) { *to = 1; return OK; }
int nvmlDeviceGetHandleByIndex_v2(u32 n, struct device **to) {
    if (n) return INVALID;
    if (is("lost") && seen++) return LOST;
    *to = &the_gpu; return OK;
}
int nvmlDeviceGetUUID(struct device *d, char *to, u32 n) { (void)d; strncpy(to, "GPU-00000000-0000-0000-0000-00000000fa4e", n); return OK; }
int nvmlDeviceGetName(struct device *d, char *to, u32 n) { (void)d; strncpy(to, "NVIDIA Made-Up 40GB", n); return OK; }
int nvmlDeviceGetPciInfo_v3(struct device *d, struct pci *to) { (void)d; memset(to, 0, sizeof *to); strcpy(to->bus_id, "00000000:FA:4E.0"); return OK; }
int nvmlDeviceGetCudaComputeCapability(struct device *d, int *major, int *minor) { (void)d; *major = 8; *minor = 6; return OK; }
int nvmlDeviceGetMigMode(struct device *d, u32 *now, u32 *next) { (void)d; (void)now; (void)next; return NOT_SUPPORTED; }
int nvmlDeviceGetMemoryInfo(struct device *d, struct memory *to) { (void)d; to->total = 40000 * MIB; to->free = 30000 * MIB; to->used = 10000 * MIB; return OK; }
int nvmlDeviceGetMemoryInfo_v2(struct device *d, struct memory_v2 *to) {
    (void)d;
    if (to->version != (sizeof *to | 2u << 24)) return 25;
    to->total = 40000 * MIB; to->reserved = 400 * MIB; to->free = 30000 * MIB; to->used = 9600 * MIB; return OK;
}
int nvmlDeviceGetUtilizationRates(struct device *d, struct rates *to) { (void)d; to->gpu = 61; to->memory = 20; return OK; }
int nvmlDeviceGetTemperature(struct device *d, u32 sensor, u32 *to) { (void)d; if (sensor) return INVALID; *to = 52; return OK; }
int nvmlDeviceGetTotalEccErrors(struct device *d, u32 kind, u32 counter, u64 *to) { (void)d; if (kind != 1 || counter) return INVALID; *to = 2; return OK; }
int nvmlDeviceGetRemappedRows(struct device *d, u32 *c, u32 *u, u32 *pending, u32 *failed) { (void)d; *c = *u = *pending = *failed = 0; return OK; }
int nvmlDeviceGetNvLinkState(struct device *d, u32 link, u32 *to) { (void)d; (void)link; (void)to; return NOT_SUPPORTED; }
int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, u32 *n, struct process *to) {
    (void)d;
    if (*n < 2) { *n = 2; return TOO_SMALL; }
    *n = 2;
    to[0] = (struct process){pid(), 9000 * MIB, ~0u, ~0u};
    to[1] = (struct process){2000000001u, ~0ull, ~0u, ~0u};  /* not available */
    return OK;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *d, u32 *n, struct process *to) { (void)d; (void)to; *n = 0; return OK; }
int nvmlDeviceGetProcessUtilization(struct device *d, struct sample *to, u32 *n, u64 since) {
    (void)d;
    if (since >= 2000) return NOT_FOUND;
    if (!to) { *n = 2; return TOO_SMALL; }
    *n = 2;
    to[0] = (struct sample){pid(), 1000, 12, 1, 0, 0};
    to[1] = (struct sample){pid(), 2000, 60, 1, 0, 0};
    return OK;
}
int nvmlDeviceGetSupportedEventTypes(struct device *d, u64 *to) { (void)d; *to = 8; return OK; }
int nvmlEventSetCreate(struct events **to) { *to = &the_events; return OK; }
int nvmlDeviceRegisterEvents(struct device *d, u64 types, struct events *set) { (void)d; (void)set; return types == 8 ? OK : INVALID; }
int nvmlEventSetWait_v2(struct events *set, struct event *to, u32 ms) {
    (void)ms;
    if (!is("xid") || !set->left) return TIMEOUT;
    set->left = 0;
    *to = (struct event){&the_gpu, 8, 79, 0, 0};
    return OK;
}
int nvmlEventSetFree(struct events *set) { (void)set; return OK; }
