/* A libnvidia-ml and libcuda for tests, of the functions that edge/telemetry/nvml.py calls: two GPUs, of which CUDA's first
 * is NVML's second. FAKE_NVML changes it: "old" has no energy counter, "refuse" no permission, "none" no GPU. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6 };
typedef struct { const char *name, *bus; unsigned milliwatts, sm, memory, degrees; unsigned long long reasons; } Device;
static Device devices[] = {
    {"GPU of the display", "00000000:01:00.0", 15000, 210, 405, 35, 1},
    {"NVIDIA GeForce RTX 4090", "00000000:41:00.0", 402500, 2520, 10501, 71, 0x04 | 0x40 | 0x02},
};
static unsigned long long millijoules = 5000000;
static int is(const char *what) {
    const char *value = getenv("FAKE_NVML");
    return value && strcmp(value, what) == 0;
}

int nvmlInit_v2(void) { return is("refuse") ? NO_PERMISSION : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NO_PERMISSION ? "Insufficient Permissions" : "Not Found"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = is("none") ? 0 : 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (is("none")) return NOT_FOUND;
    *device = &devices[index];
    return SUCCESS;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    for (int i = 0; i < 2; i++)
        if (strcmp(bus, devices[i].bus) == 0) { *device = &devices[i]; return SUCCESS; }
    return NOT_FOUND;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, ((Device *)device)->name, length);
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
    if (is("old")) return NOT_SUPPORTED;
    *energy = millijoules += ((Device *)device)->milliwatts / 10; /* as after 0.1 s */
    return SUCCESS;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *power) { *power = ((Device *)device)->milliwatts; return SUCCESS; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *clock) {
    if (kind != 1 && kind != 2) return NOT_SUPPORTED;
    *clock = kind == 1 ? ((Device *)device)->sm : ((Device *)device)->memory;
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {
    *degrees = ((Device *)device)->degrees;
    return sensor == 0 ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    *reasons = ((Device *)device)->reasons;
    return SUCCESS;
}

int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 7; return 0; }
int cuDeviceGetPCIBusId(char *bus, int length, int device) {
    if (device != 7 || length < 17) return 1;
    strcpy(bus, devices[1].bus);
    return 0;
}
