// The pool: every task once, from many callers at once, and again in a child process.
#include "core/threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"

using namespace lilliput;

namespace {

bool every_task_once(int64_t tasks, int threads) {
  std::vector<std::atomic<int>> done(static_cast<size_t>(tasks));
  for (Team team : {Team::own, Team::openmp})
    parallel_for(tasks, threads, team, [&](int64_t task) { done[static_cast<size_t>(task)].fetch_add(1); });
  for (const std::atomic<int>& count : done)
    if (count.load() != 2) return false;
  return true;
}

}  // namespace

TEST(every_task_runs_once) {
  for (int64_t tasks : {0, 1, 2, 3, 100, 1000})
    for (int threads : {1, 2, 3, 8}) CHECK(every_task_once(tasks, threads));
}

TEST(the_pool_serves_again_and_again) {
  for (int i = 0; i < 500; ++i) CHECK(every_task_once(1 + i % 7, 1 + i % 4));
}

TEST(several_callers_at_once) {
  std::vector<std::thread> callers;
  std::atomic<int> good{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&good] {
      for (int j = 0; j < 50; ++j) good += every_task_once(20, 3);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(good == 200);
}

TEST(a_child_process_has_threads_of_its_own) {
  CHECK(every_task_once(50, 3));
  const pid_t child = fork();
  if (child == 0) _exit(every_task_once(50, 3) ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
