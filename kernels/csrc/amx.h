// AMX: tile registers of 16 rows of 64 bytes, and their one operation on bfloat16. A thread configures them before
// use and releases them after, so that the operating system has no tiles to save while it does other work.
//
// AUDIOMAE_EMULATED_TILES compiles the same kernels for machines without AMX: what the instructions do, in C++, for
// the tests.
#pragma once

#include <cstdint>

namespace audiomae {
namespace AUDIOMAE_TIER {
namespace {

struct alignas(64) TileShapes {  // the operand of LDTILECFG
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#ifndef AUDIOMAE_EMULATED_TILES

// GCC's _tile_loadconfig says of 8 of its 64 bytes that it reads them, its _tile_loadd of none.
inline void tile_configure(const TileShapes& shapes) {
  __asm__ volatile("" ::"r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}
inline void tile_release() { _tile_release(); }

// Macros: the number of a tile is part of the instruction.
#define AUDIOMAE_TILE_LOAD(tile, from, row_step) \
  do {                                           \
    __asm__ volatile("" ::: "memory");           \
    _tile_loadd(tile, from, row_step);           \
  } while (0)
#define AUDIOMAE_TILE_STORE(tile, to, row_step) _tile_stored(tile, to, row_step)
#define AUDIOMAE_TILE_ZERO(tile) _tile_zero(tile)
#define AUDIOMAE_TILE_DPBF16PS(sums, a, b) _tile_dpbf16ps(sums, a, b)

#else

struct EmulatedTiles {
  bool configured;
  TileShapes shapes;
  uint8_t bytes[8][16][64];
};
thread_local EmulatedTiles emulated_tiles;

// What the instructions answer with a fault: no configuration, impossible or mismatched shapes, one tile twice.
inline void tile_require(bool condition) {
  if (!condition) __builtin_trap();
}

inline void tile_configure(const TileShapes& shapes) {
  tile_require(shapes.palette == 1 && shapes.start_row == 0);
  for (const uint8_t byte : shapes.reserved) tile_require(byte == 0);
  for (int t = 0; t < 16; ++t) {
    const int rows = shapes.rows[t], row_bytes = shapes.row_bytes[t];
    tile_require(rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0 && (rows == 0) == (row_bytes == 0));
    tile_require(t < 8 || rows == 0);
  }
  emulated_tiles = {true, shapes, {}};
}

inline void tile_release() { emulated_tiles.configured = false; }

inline void emulated_load(int tile, const void* from, int64_t row_step) {
  EmulatedTiles& e = emulated_tiles;
  tile_require(e.configured && e.shapes.rows[tile] > 0);
  __builtin_memset(e.bytes[tile], 0, sizeof(e.bytes[tile]));
  for (int r = 0; r < e.shapes.rows[tile]; ++r) {
    __builtin_memcpy(e.bytes[tile][r], static_cast<const char*>(from) + r * row_step, e.shapes.row_bytes[tile]);
  }
}

inline void emulated_store(int tile, void* to, int64_t row_step) {
  const EmulatedTiles& e = emulated_tiles;
  tile_require(e.configured && e.shapes.rows[tile] > 0);
  for (int r = 0; r < e.shapes.rows[tile]; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * row_step, e.bytes[tile][r], e.shapes.row_bytes[tile]);
  }
}

inline void emulated_zero(int tile) {
  tile_require(emulated_tiles.configured && emulated_tiles.shapes.rows[tile] > 0);
  __builtin_memset(emulated_tiles.bytes[tile], 0, sizeof(emulated_tiles.bytes[tile]));
}

inline float without_denormals(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }

inline float float_of(const uint8_t* bfloat16) {
  uint32_t bits = 0;
  __builtin_memcpy(reinterpret_cast<char*>(&bits) + 2, bfloat16, 2);
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return without_denormals(x);
}

// TDPBF16PS: the even and the odd products are summed apart by fused multiply-adds, then together, then to `sums`.
// Denormals are zero going in and coming out.
inline void emulated_dpbf16ps(int sums, int a, int b) {
  EmulatedTiles& e = emulated_tiles;
  const TileShapes& s = e.shapes;
  tile_require(e.configured && s.rows[sums] > 0 && sums != a && sums != b && a != b);
  tile_require(s.rows[sums] == s.rows[a] && s.rows[b] == s.row_bytes[a] / 4 &&
               s.row_bytes[sums] == s.row_bytes[b]);
  for (int m = 0; m < s.rows[a]; ++m) {
    for (int n = 0; n < s.row_bytes[sums] / 4; ++n) {
      float halves[2] = {};
      for (int k = 0; k < s.row_bytes[a] / 4; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float x = float_of(e.bytes[a][m] + 4 * k + 2 * i), y = float_of(e.bytes[b][k] + 4 * n + 2 * i);
          halves[i] = without_denormals(__builtin_fmaf(x, y, halves[i]));
        }
      }
      float sum;
      __builtin_memcpy(&sum, e.bytes[sums][m] + 4 * n, 4);
      sum = without_denormals(without_denormals(sum) + without_denormals(halves[0] + halves[1]));
      __builtin_memcpy(e.bytes[sums][m] + 4 * n, &sum, 4);
    }
  }
}

#define AUDIOMAE_TILE_LOAD(tile, from, row_step) emulated_load(tile, from, row_step)
#define AUDIOMAE_TILE_STORE(tile, to, row_step) emulated_store(tile, to, row_step)
#define AUDIOMAE_TILE_ZERO(tile) emulated_zero(tile)
#define AUDIOMAE_TILE_DPBF16PS(sums, a, b) emulated_dpbf16ps(sums, a, b)

#endif

}  // namespace
}  // namespace AUDIOMAE_TIER
}  // namespace audiomae
