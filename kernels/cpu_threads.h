// The threads that cpu_kernels.cc divides its work among.
//
// OpenMP would do this in fewer lines, and worse beside XLA. It has a team for each thread that
// calls, and XLA calls from any of its own; and at the end of a loop it waits for every member of
// the team, even for one that has not begun because the machine is busy. Here the process has one
// team; whoever calls does what nobody else has begun, and waits only for what somebody has.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace {

constexpr int64_t PARALLEL_WORK = 1 << 18;  // multiplications; for fewer, threads do not pay

// Tasks 0 to count - 1. Threads take the next one that nobody has taken.
struct Job {
  int64_t count;
  const std::function<void(int64_t)>& task;  // gone when the caller returns: all are done then
  std::atomic<int64_t> next{0}, done{0};

  Job(int64_t count, const std::function<void(int64_t)>& task) : count(count), task(task) {}

  void work() {
    for (int64_t i = next++; i < count; i = next++) {
      task(i);
      done++;
    }
  }
};

class Team {
 public:
  // Start the threads that help the one that calls.
  void start(int helpers) {
    for (int i = 0; i < helpers; i++) std::thread(&Team::help, this).detach();
    has_helpers = helpers > 0;
  }

  // Run all tasks and return. Where there is little to do, or the team is busy with the tasks of
  // another caller, this thread runs them alone.
  void run(int64_t count, bool is_small, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> turn(one_at_a_time, std::defer_lock);
    if (is_small || count < 2 || !has_helpers || !turn.try_lock()) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    auto job = std::make_shared<Job>(count, task);
    {
      std::lock_guard<std::mutex> lock(mutex);
      current = job;
      jobs++;
    }
    wake.notify_all();
    job->work();
    while (job->done < count) std::this_thread::yield();
  }

 private:
  // Work on one job after the other. The next often comes within microseconds: look for it a while,
  // then sleep.
  void help() {
    for (int64_t seen = 0;;) {
      for (int i = 0; i < LOOKS && jobs == seen; i++) pause();
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [&] { return jobs != seen; });
      seen = jobs;
      auto job = current;
      lock.unlock();
      job->work();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  static constexpr int LOOKS = 1000;  // some 30 microseconds
  std::mutex one_at_a_time, mutex;    // whose turn it is; guards current, for sleepers also jobs
  std::condition_variable wake;
  std::shared_ptr<Job> current;
  std::atomic<int64_t> jobs{0};  // that there have been
  bool has_helpers = false;
};

Team& team = *new Team;  // never destroyed: its threads run until the process ends

}  // namespace
