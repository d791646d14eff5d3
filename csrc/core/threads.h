// One way to run tasks in parallel. Not here: how work is cut into tasks (the operations know).
//
// Two teams, because torch runs its operators on OpenMP threads that wait for their next job, and for each other, by
// spinning (some milliseconds):
//   Team::own      a small pool of ours. Idle workers sleep, and one that the system does not let run is not waited
//   for.
//                  For short jobs: on a busy machine a spinning barrier costs a time slice, 16 ms instead of 0.16 ms.
//   Team::openmp   torch's own threads (GOMP_parallel, found at run time; our pool where there is none, and after a
//   fork).
//                  For long jobs between torch's operators: a pool beside the spinners took 26 ms where this takes 19.
#pragma once

#include <cstdint>

namespace lilliput {

enum class Team { own, openmp };

// Calls body(context, task) once for each task in 0..tasks-1 on up to `threads` threads, and returns when all are done.
// Tasks are handed out as threads come free, so a task must write only what no other task writes; then the result does
// not depend on the number of threads. `body` must not throw. A forked process gets a pool of its own.
void parallel(int64_t tasks, int threads, Team team, void (*body)(void* context, int64_t task), void* context);

template <typename Body>
void parallel_for(int64_t tasks, int threads, Team team, Body&& body) {
  parallel(tasks, threads, team, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// For operations that do little with each number: a task of this many takes some 20 us, long beside its hand-out.
constexpr int64_t numbers_per_task = 1 << 15;

// Which team for so many tasks of 20 us: a step of training has hundreds and stands between torch's operators.
inline Team team_of(int64_t tasks) {
  return tasks > 8 ? Team::openmp : Team::own;
}

}  // namespace lilliput
