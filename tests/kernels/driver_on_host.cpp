// Stands in for the CUDA driver on machines without one: memory is the host's, and launches go to a function that the
// test gives. Built with the name libcuda.so.1, so that what looks for the driver finds this.
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Launched)(const char *name, const unsigned *grid, unsigned threads, unsigned shared, void **arguments);

namespace {
Launched launched = nullptr;
int live = 0, capability = 90;
}  // namespace

extern "C" {
void on_launch(Launched function) { launched = function; }
void be_of_arch(int arch) { capability = arch; }
int allocations() { return live; }
size_t room(void *pointer) { return malloc_usable_size(pointer); }

int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  *value = attribute == 16 ? 2 : attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuLibraryLoadData(void **library, const void *code, void *, void *, unsigned, void *, void *, unsigned) {
  *library = const_cast<void *>(code);
  return memcmp(code, "\177ELF", 4) ? 200 : 0;
}
int cuLibraryGetKernel(void **kernel, void *, const char *name) { return *kernel = const_cast<char *>(name), 0; }
int cuKernelSetAttribute(int, int, void *, int) { return 0; }
int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, void *,
                   void **arguments, void **) {
  const unsigned grid[3] = {x, y, z};
  launched(static_cast<const char *>(kernel), grid, threads, shared, arguments);
  return 0;
}
int cuMemPoolCreate(void **pool, const void *) { return *pool = &live, 0; }
int cuMemPoolSetAttribute(void *, int, void *) { return 0; }
int cuMemAllocFromPoolAsync(uint64_t *pointer, size_t bytes, void *, void *) {
  ++live;
  *pointer = (uint64_t)malloc(bytes);
  memset((void *)*pointer, 0xff, bytes);  // not a number, wherever it is read before it is written
  return 0;
}
int cuMemFreeAsync(uint64_t pointer, void *) { return --live, free((void *)pointer), 0; }
int cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t bytes, void *) { return memset((void *)pointer, value, bytes), 0; }
int cuGetErrorString(int, const char **text) { return *text = "a failure of the driver on the host", 0; }
}
