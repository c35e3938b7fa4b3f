// A libcuda for Triton's CudaDriver and C launcher: every launch goes to the emulator.
//
// It checks what the driver API checks of a tensor map (CUDA driver API, Tensor Map Object
// Management) and keeps nothing: a module is a copy of its PTX, a function is its module.
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef int (*launch_callback)(const void *config, const void *function, void **parameters);
typedef int (*map_callback)(void *map, int dtype, unsigned rank, void *address, const u64 *shape,
                            const u64 *strides, const unsigned *box, int swizzle);

enum {
  INVALID_VALUE = 1,
  ATTRIBUTE_WARP_SIZE = 10,
  ATTRIBUTE_MAJOR = 75,
  ATTRIBUTE_MINOR = 76,
  ATTRIBUTE_SHARED_OPTIN = 97,
};

static int arch, shared_limit;
static launch_callback on_launch;
static map_callback on_map;

void emulator_connect(int new_arch, int limit, launch_callback launch, map_callback map) {
  arch = new_arch;
  shared_limit = limit;
  on_launch = launch;
  on_map = map;
}

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  return on_launch(config, function, parameters);
}

int cuTensorMapEncodeTiled(void *map, int dtype, unsigned rank, void *address, const u64 *shape,
                           const u64 *strides, const unsigned *box, const unsigned *steps,
                           int interleave, int swizzle, int l2_promotion, int fill) {
  if ((u64)address % 16 || rank < 1 || rank > 5 || interleave || fill) return INVALID_VALUE;
  for (unsigned i = 0; i < rank; i++) {
    if (!shape[i] || shape[i] > 1ull << 32 || steps[i] != 1) return INVALID_VALUE;
    if (!box[i] || box[i] > 256) return INVALID_VALUE;
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (strides[i] % 16 || strides[i] >> 40) return INVALID_VALUE;
  return on_map(map, dtype, rank, address, shape, strides, box, swizzle);
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case ATTRIBUTE_MAJOR: *value = arch / 10; break;
    case ATTRIBUTE_MINOR: *value = arch % 10; break;
    case ATTRIBUTE_SHARED_OPTIN: *value = shared_limit; break;
    default: *value = 132;  // multiprocessors, clock rates and the like: nothing depends on them
  }
  return 0;
}

int cuModuleLoadData(void **module, const void *image) { *module = strdup(image); return 0; }
int cuModuleUnload(void *module) { free(module); return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute() { return 0; }
int cuFuncSetCacheConfig() { return 0; }
int cuPointerGetAttribute(u64 *data, int attribute, u64 pointer) { *data = pointer; return 0; }
int cuPointerGetAttributes() { return 0; }
int cuGetErrorString(int code, const char **text) { *text = "refused by the emulated libcuda"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit() { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuOccupancyMaxActiveClusters(int *number) { *number = 1; return 0; }
int cuTensorMapEncodeIm2col() { return INVALID_VALUE; }
