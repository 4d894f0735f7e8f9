"""The native CPU kernels under sanitizers: python tests/cpu_kernels_sanitized.py

Builds cpu_threads_test.cc with the thread sanitizer and runs it. Then builds cpu_kernels.cc with
the address and undefined-behaviour sanitizers, and runs on that build those tests of
test_cpu_kernels.py that read and write memory. The first error ends it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels import cpu_kernels as ck  # noqa: E402 - found on the path set above

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = "native or mistakes or in_place"
# The sanitizer's allocator must be loaded before Python's, and C++'s exceptions before XLA's.
PRELOADED = ("libasan.so", "libstdc++.so")


def path_of(library: str) -> str:
    """Return where the compiler's libraries are."""
    command = [ck.compile_command()[0], f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def check_threads() -> None:
    """Run cpu_threads_test.cc. Raises CalledProcessError for an error."""
    source = ROOT / "tests" / "cpu_threads_test.cc"
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory) / "cpu_threads_test")
        flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread"]
        subprocess.run([ck.compile_command()[0], *flags, str(source), "-o", program], check=True)
        # This sanitizer wants memory at fixed addresses, which newer kernels randomise too far.
        fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
        subprocess.run([*fixed_addresses, program], check=True)


def check_kernels() -> int:
    """Run the tests in a process of their own; return its exit status."""
    environment = {
        **os.environ,
        ck.EXTRA_FLAGS: FLAGS,
        "LD_PRELOAD": " ".join(path_of(library) for library in PRELOADED),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and XLA free little when they end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = str(ROOT / "tests" / "test_cpu_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", tests, "-k", TESTS]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    check_threads()
    sys.exit(check_kernels())
