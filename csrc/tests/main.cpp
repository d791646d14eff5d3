// Runs every test on the chosen instruction set (LILLIPUT_ISA); exit status 77 means that this processor lacks it.
#include <cstdio>
#include <stdexcept>

#include "check.h"
#include "core/cpu.h"

int main() {
  constexpr int kSkip = 77;  // ctest's SKIP_RETURN_CODE
  try {
    std::printf("on %s\n", lilliput::isa_name(lilliput::chosen_isa()));
  } catch (const std::runtime_error& error) {
    std::printf("skipped: %s\n", error.what());
    return kSkip;
  }
  for (const check::Test& test : check::tests()) {
    const int before = check::failures();
    test.run();
    std::printf("%s %s\n", check::failures() == before ? "ok    " : "FAILED", test.name);
  }
  return check::failures() == 0 ? 0 : 1;
}
