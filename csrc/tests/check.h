// A harness of thirty lines: a test is a function that registers itself, a failed check says where and counts.
#pragma once

#include <cstdio>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool report(bool holds, const char* what, const char* file, int line) {
  if (!holds && ++failures() <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  return holds;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

}  // namespace check

#define CHECK(what) check::report(static_cast<bool>(what), #what, __FILE__, __LINE__)
#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()
