// Switching on the matrix unit of processors that have one (AMX), for a process and for a thread.
// Source: Intel 64 and IA-32 software developer's manual, volume 2, LDTILECFG.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

// Linux gives a process the unit's registers when it asks (arch/x86/include/uapi/asm/prctl.h).
inline bool request_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  static const bool given = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return given;
}

// All eight tiles: sixteen rows of 64 bytes.
inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  // Not by the intrinsic: of GCC's, only the first 8 bytes count as read.
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline void end_tiles() { _tile_release(); }

// GCC does not know that loading tiles reads what was stored before.
inline void settle_stores() { asm volatile("" ::: "memory"); }
