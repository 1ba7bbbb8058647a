// Passes over the rows of a window: see kernels.py. Nothing is included: NVRTC compiles it.
//
// A row is read in aligned vectors of 16 bytes, wherever it starts: its head and tail, of fewer
// than a vector's entries, are read one by one. The vector that rows are multiplied by is kept in
// shared memory as `WIDTH` planes, plane p holding the entries p, p + WIDTH, ...: the 32 lanes of a
// warp, which hold neighbouring vectors, then read neighbouring places at any alignment.

constexpr int THREADS = 256;
constexpr int LANES = 32;
constexpr int WARPS = THREADS / LANES;
constexpr int TILE = 4096;  // columns of a block in the passes that sum over columns
constexpr int AHEAD = 4;    // vectors that a lane has on their way

typedef unsigned short bfloat16;  // by its bits

__device__ inline float widened(bfloat16 x) { return __uint_as_float((unsigned int)x << 16); }
__device__ inline float widened(float x) { return x; }

// ---------------------------------------------------------------------- vectors of 16 bytes
template <typename T>
struct Vector {
  static constexpr int WIDTH = 16 / sizeof(T);
  uint4 bits;

  __device__ inline void read(const T* place) {
    bits = __ldcs(reinterpret_cast<const uint4*>(place));
  }
  __device__ inline void entries(float* out) const;
};

template <>
__device__ inline void Vector<bfloat16>::entries(float* out) const {
  const unsigned int words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <>
__device__ inline void Vector<float>::entries(float* out) const {
  out[0] = __uint_as_float(bits.x);
  out[1] = __uint_as_float(bits.y);
  out[2] = __uint_as_float(bits.z);
  out[3] = __uint_as_float(bits.w);
}

// ------------------------------------------------------------------------------ a tile of x
template <int WIDTH>
struct Planes {
  static constexpr int LENGTH = TILE / WIDTH + LANES / WIDTH;  // padded: no bank is asked twice
  float entries[WIDTH * LENGTH];

  __device__ inline float& at(int e) { return entries[e % WIDTH * LENGTH + e / WIDTH]; }
};

template <typename T>
__device__ inline double dot(const T* row, Planes<16 / sizeof(T)>& x, int length, int lane) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const int beyond = (int)(reinterpret_cast<unsigned long long>(row) / sizeof(T) % WIDTH);
  const int head = min(length, (WIDTH - beyond) % WIDTH);
  const int vectors = (length - head) / WIDTH;
  double sum = 0.0;
  for (int first = lane; first < vectors; first += AHEAD * LANES) {
    Vector<T> read[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i * LANES < vectors) read[i].read(row + head + (first + i * LANES) * WIDTH);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int v = first + i * LANES;
      if (v < vectors) {
        float found[WIDTH], few = 0.0f;
        read[i].entries(found);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) few = fmaf(found[k], x.at(head + v * WIDTH + k), few);
        sum += few;
      }
    }
  }
  const int edges = length - vectors * WIDTH;  // those of the head, and after them of the tail
  if (lane < edges) {
    const int e = lane < head ? lane : lane + vectors * WIDTH;
    sum += widened(row[e]) * x.at(e);
  }
  return sum;
}

// Sums over the columns of each tile, [tiles, count]; writes x to a row on the way, if wanted.
template <typename T, typename X, bool WRITES>
__device__ inline void inner(T* rows, long long stride, long long columns, int count, int slot,
                             const X* x, double* sums) {
  __shared__ Planes<16 / sizeof(T)> planes;
  const long long first = (long long)blockIdx.x * TILE;
  const int length = (int)min((long long)TILE, columns - first);
  T* written = WRITES ? rows + slot * stride + first : nullptr;
  for (int e = threadIdx.x; e < length; e += THREADS) {
    const X entry = x[first + e];
    if constexpr (WRITES) written[e] = entry;
    planes.at(e) = widened(entry);
  }
  __syncthreads();
  const int lane = threadIdx.x % LANES;
  for (int row = threadIdx.x / LANES; row < count; row += WARPS) {
    double sum = 0.0;
    if (WRITES && row == slot) {  // what was written is not read back
      for (int e = lane; e < length; e += LANES) sum += planes.at(e) * planes.at(e);
    } else {
      sum = dot<T>(rows + row * stride + first, planes, length, lane);
    }
    for (int step = LANES / 2; step > 0; step /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, step);
    }
    if (lane == 0) sums[(long long)blockIdx.x * count + row] = sum;
  }
}

// ------------------------------------------------------------- combinations of the rows
// A thread sums WIDTH columns over all rows: neighbours if rows are aligned, else THREADS apart.
template <typename T>
__device__ inline void combination(const T* rows, long long stride, long long columns, int count,
                                   const float* weights, float* out) {
  constexpr int WIDTH = Vector<T>::WIDTH;
  const long long block = (long long)blockIdx.x * THREADS * WIDTH;
  const bool aligned = reinterpret_cast<unsigned long long>(rows) % 16 == 0 &&
                       stride % WIDTH == 0 && columns % WIDTH == 0;
  float sums[WIDTH] = {};
  if (!aligned) {
    for (int row = 0; row < count; ++row) {
      const float weight = weights[row];
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) {
        const long long j = block + k * THREADS + threadIdx.x;
        if (j < columns) sums[k] = fmaf(weight, widened(rows[row * stride + j]), sums[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) {
      const long long j = block + k * THREADS + threadIdx.x;
      if (j < columns) out[j] = sums[k];
    }
    return;
  }
  const long long j = block + (long long)threadIdx.x * WIDTH;
  if (j >= columns) return;
  for (int first = 0; first < count; first += AHEAD) {
    Vector<T> read[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i < count) read[i].read(rows + (first + i) * stride + j);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i < count) {
        const float weight = weights[first + i];
        float found[WIDTH];
        read[i].entries(found);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) sums[k] = fmaf(weight, found[k], sums[k]);
      }
    }
  }
  if (reinterpret_cast<unsigned long long>(out) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < WIDTH; k += 4) {
      *reinterpret_cast<float4*>(out + j + k) =
          make_float4(sums[k], sums[k + 1], sums[k + 2], sums[k + 3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < WIDTH; ++k) out[j + k] = sums[k];
  }
}

// ------------------------------------------------------------------------- entry points
#define PASSES(NAME, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      push_##NAME(T* rows, long long stride, long long columns, long long count,              \
                  long long slot, const T* x, double* sums) {                                 \
    inner<T, T, true>(rows, stride, columns, (int)count, (int)slot, x, sums);                 \
  }                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      inner_##NAME(T* rows, long long stride, long long columns, long long count,             \
                   const float* x, double* sums) {                                            \
    inner<T, float, false>(rows, stride, columns, (int)count, -1, x, sums);                   \
  }                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                           \
      combination_##NAME(const T* rows, long long stride, long long columns, long long count, \
                         const float* weights, float* out) {                                  \
    combination<T>(rows, stride, columns, (int)count, weights, out);                          \
  }

PASSES(bfloat16, bfloat16)
PASSES(float32, float)
