#include "core/cpu.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lilliput {

Isa supported_isa() {
#if defined(LILLIPUT_X86)
  // gcc's and clang's detection looks at the operating system's saved registers (XCR0) too.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      break;
  }
  return "portable";
}

static Isa choose() {
  const char* forced = std::getenv("LILLIPUT_ISA");
  if (forced == nullptr || *forced == '\0') return supported_isa();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni}) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (isa <= supported_isa()) return isa;
    throw std::runtime_error("LILLIPUT_ISA=" + std::string(forced) + ", but this processor offers " +
                             isa_name(supported_isa()));
  }
  throw std::runtime_error("LILLIPUT_ISA=" + std::string(forced) + "; known: portable, avx2, avx512, avx512vnni");
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lilliput
