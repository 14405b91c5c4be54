/* A pretended NVIDIA driver. $PRETENDED_CUDA is a folder with a file `gpus`, one device a line:
 *     LETTER MAJOR MINOR TOTAL_MB FREE_MB MODE NAME
 * where LETTER is a hexadecimal digit that fills the UUID, and with a file `driver`: VERSION RESULT_OF_CUINIT. A version
 * below 0 crashes.
 * What is done to devices is appended to the file `calls`. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char letter; int major, minor, mode; size_t total, free; char name[200]; } Gpu;
static Gpu gpus[16];
static int count, version = 13000, result, current;

static FILE *opened(const char *name, const char *mode) {
    char path[4096];
    const char *folder = getenv("PRETENDED_CUDA");
    snprintf(path, sizeof path, "%s/%s", folder ? folder : ".", name);
    return fopen(path, mode);
}

static void called(const char *what, int device, int value) {
    FILE *file = opened("calls", "a");
    if (file) { fprintf(file, "%s %d %d\n", what, device, value); fclose(file); }
}

static int shown(char letter) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    char whole[6] = {'G', 'P', 'U', '-', letter, 0}, instance[6] = {'M', 'I', 'G', '-', letter, 0};
    return !visible || strstr(visible, whole) != NULL || strstr(visible, instance) != NULL;
}

static void load(void) {
    FILE *file = opened("driver", "r");
    if (file) { if (fscanf(file, "%d %d", &version, &result) < 1) version = 0; fclose(file); }
    if (version < 0) abort();
}

int cuDriverGetVersion(int *to) { load(); *to = version; return 0; }

int cuInit(unsigned flags) {
    FILE *file = opened("gpus", "r");
    Gpu one;
    load();
    count = 0;
    while (file && fscanf(file, " %c %d %d %zu %zu %d %199[^\n]", &one.letter, &one.major, &one.minor, &one.total,
                          &one.free, &one.mode, one.name) == 7)
        /* A process sees one MIG instance, however many are named. */
        if (shown(one.letter) && !(count && strstr(one.name, " MIG "))) gpus[count++] = one;
    if (file) fclose(file);
    return result ? result : count ? 0 : 100;
}

int cuGetErrorName(int error, const char **to) {
    *to = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 100 ? "CUDA_ERROR_NO_DEVICE"
        : error == 802 ? "CUDA_ERROR_SYSTEM_NOT_READY" : error == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : NULL;
    return *to ? 0 : 1;
}

int cuGetErrorString(int error, const char **to) {
    *to = error == 2 ? "out of memory" : error == 100 ? "no CUDA-capable device is detected"
        : error == 802 ? "system not yet initialized" : error == 803 ? "system has unsupported display driver / cuda driver combination" : NULL;
    return *to ? 0 : 1;
}

int cuDeviceGetCount(int *to) { *to = count; return 0; }
int cuDeviceGet(int *to, int number) { *to = number; return number < count ? 0 : 101; }
int cuDeviceGetName(char *to, int length, int device) { snprintf(to, length, "%s", gpus[device].name); return 0; }

int cuDeviceGetUuid_v2(unsigned char *to, int device) {
    char digit[2] = {gpus[device].letter, 0};
    memset(to, 17 * (int)strtol(digit, NULL, 16), 16);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *to, int device) { *to = gpus[device].total << 20; return 0; }

int cuDeviceGetAttribute(int *to, int attribute, int device) {
    *to = attribute == 75 ? gpus[device].major : attribute == 76 ? gpus[device].minor : attribute == 20 ? gpus[device].mode : -1;
    return *to < 0;
}

int cuDevicePrimaryCtxRetain(void **to, int device) {
    called("retain", device, 0);
    if (!gpus[device].free) return 2;
    current = device;
    *to = &gpus[device];
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) { called("release", device, 0); return 0; }
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { called("flags", device, (int)flags); return 0; }
int cuCtxSetCurrent(void *context) { current = (int)((Gpu *)context - gpus); return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = gpus[current].free << 20; *total = gpus[current].total << 20; return 0; }
