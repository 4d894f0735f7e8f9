// Three callers at once give a team of three helpers many short jobs: each task must run once.
//
// cpu_kernels_sanitized.py builds this under the thread sanitizer. What the tasks write to is gone
// right after each job: a helper that comes late must not touch it.

#include "../kernels/cpu_threads.h"

#include <cstdio>
#include <vector>

int main() {
  team.start(3);
  std::atomic<int> faults{0};
  auto call = [&](int seed) {
    for (int job = 0; job < 3000; job++) {
      std::vector<int> runs((job * 7 + seed) % 60);
      bool is_small = job % 11 == 0;
      team.run(int64_t(runs.size()), is_small, [&](int64_t i) { runs[i]++; });
      for (int count : runs) faults += count != 1;
    }
  };
  std::thread first(call, 1), second(call, 2);
  call(3);
  first.join();
  second.join();
  std::printf("%d tasks did not run once\n", faults.load());
  return faults != 0;
}
