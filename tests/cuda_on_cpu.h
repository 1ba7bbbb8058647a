// CUDA C on a CPU, for tests: the threads of a block are fibers that take turns.
//
// A fiber runs until it reaches a barrier (__syncthreads) or exchanges numbers within its warp;
// then others run. Blocks run one after the other, so that shared memory is static memory. What a
// race would leave to chance depends here on `order`, in which threads take turns: a kernel whose
// results do not depend on it does not lack a barrier that matters. Where no thread can go on, the
// launch ends with an error.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned int x, y, z;
};
static Index threadIdx, blockIdx;

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return (unsigned int)((unsigned long long)a * b >> 32);
}
inline float __uint_as_float(unsigned int bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// ---------------------------------------------------------------------------------- fibers
namespace fibers {

const int LANES = 32;
const size_t STACK = 1 << 17;

struct Barrier {
  int size, arrived, round;
};
struct Warp {
  Barrier barrier;
  double slots[2][LANES];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  int exchanges;
};

static ucontext_t scheduler;
static std::vector<Fiber> all;
static std::vector<Warp> warps;
static Barrier block;
static int current, passed, misaligned;
static void (*kernel)(const int64_t*);
static const int64_t* arguments;

inline void yield() { swapcontext(&all[current].context, &scheduler); }

inline void wait(Barrier& barrier) {
  const int round = barrier.round;
  ++passed;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
  ++passed;
}

inline void body() {
  kernel(arguments);
  ++passed;
  all[current].done = true;
  yield();
}

// Runs the threads of one block; false where none can go on.
inline bool run_block(int threads, int order) {
  all.resize(threads);
  warps.assign(threads / LANES, Warp{{LANES, 0, 0}, {}});
  block = {threads, 0, 0};
  for (auto& fiber : all) {
    fiber.done = false;
    fiber.exchanges = 0;
    fiber.stack.resize(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
  }
  for (int left = threads; left;) {
    passed = left = 0;
    for (int i = 0; i < threads; ++i) {
      current = order == 0 ? i : order == 1 ? threads - 1 - i : (i * 37 + 11) % threads;
      if (all[current].done) continue;
      threadIdx = {(unsigned)current, 0, 0};
      swapcontext(&scheduler, &all[current].context);
      left += !all[current].done;
    }
    if (left && !passed) return false;
  }
  return true;
}

}  // namespace fibers

inline void __syncthreads() {
  const Index self = threadIdx;
  fibers::wait(fibers::block);
  threadIdx = self;
}

template <typename T>
inline T __shfl_down_sync(unsigned int mask, T value, int step) {
  using namespace fibers;
  const Index self = threadIdx;
  Warp& warp = warps[current / LANES];
  const int lane = current % LANES, turn = all[current].exchanges++ % 2;
  if (mask != 0xffffffffu) ++misaligned;
  warp.slots[turn][lane] = (double)value;
  wait(warp.barrier);
  threadIdx = self;
  return (T)warp.slots[turn][lane + step < LANES ? lane + step : lane];
}

template <typename T>
inline T __ldcs(const T* place) {
  if (reinterpret_cast<uintptr_t>(place) % alignof(T)) ++fibers::misaligned;
  T out;
  std::memcpy(&out, place, sizeof(T));
  return out;
}

// Launches a kernel whose arguments are all addresses or integers of 64 bits. Returns 0, or 1
// where threads wait for each other in vain, or 2 where a vector was read at no multiple of its size.
template <typename F>
inline void spread(F* f, const int64_t* a) {
  f(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}
typedef void Any(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                 int64_t, int64_t, int64_t);
static Any* launched;
extern "C" int launch(void* kernel, int x, int y, int threads, int order, const int64_t* arguments) {
  launched = reinterpret_cast<Any*>(kernel);
  fibers::kernel = [](const int64_t* a) { spread(launched, a); };
  fibers::arguments = arguments;
  fibers::misaligned = 0;
  for (int j = 0; j < y; ++j) {
    for (int i = 0; i < x; ++i) {
      blockIdx = {(unsigned)i, (unsigned)j, 0};
      if (!fibers::run_block(threads, order)) return 1;
    }
  }
  return fibers::misaligned ? 2 : 0;
}
