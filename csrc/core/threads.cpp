#include "core/threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace lilliput {
namespace {

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) body(context, task);
  }
};

// Workers sleep on a condition variable between jobs; the caller works too, then sleeps until the last worker is out.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::lock_guard<std::mutex> one_job_at_a_time(jobs_);
    hire(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      seats_ = threads - 1;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // nobody may join any more: the job lives on the caller's stack
    done_.wait(lock, [this] { return inside_ == 0; });
    job_ = nullptr;
  }

 private:
  void hire(int count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are, the caller at least, do all the tasks.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++inside_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex jobs_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0, seats_ = 0, inside_ = 0;
};

std::atomic<Pool*> pool{nullptr};
std::mutex pool_mutex;

std::atomic<bool> forked{false};

// A child process has the caller's thread only: the old pool's threads cannot be joined, so it is left behind, and
// OpenMP's idea of its own threads is as stale.
void after_fork_in_child() {
  forked.store(true);
  pool.store(nullptr);
  new (&pool_mutex) std::mutex;
}

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  (void)registered;
#endif
}

Pool& own_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool.load() == nullptr) pool.store(new Pool);  // lives as long as the process
  return *pool.load();
}

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// torch's OpenMP, or null.
OpenMpParallel openmp() {
#if defined(__linux__)
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load() ? nullptr : found;
#else
  return nullptr;
#endif
}

}  // namespace

void parallel(int64_t tasks, int threads, Team team, void (*body)(void*, int64_t), void* context) {
  Job job{body, context, tasks};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    job.work();
    return;
  }
  watch_forks();
  if (const OpenMpParallel on_openmp = team == Team::openmp ? openmp() : nullptr) {
    on_openmp([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    own_pool().run(job, threads);
  }
}

}  // namespace lilliput
