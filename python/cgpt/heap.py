"""What the C library does with memory that is freed."""

import ctypes


def keep_large_buffers() -> None:
    """Keeps glibc from giving freed buffers back to the kernel, which would zero and map them anew at every step.

    By itself glibc maps what is over 32 MiB, a chunk's logits for one, for each use alone, and shrinks its heap at the
    top. Without both a run's heap grows to what a step needs within some ten steps, and then faults on a page or two a
    step where it was on thousands: 1.36 x measured on a 2-core Zen 4. Threads of OpenMP and of lanes have heaps of
    their own, but what kernels work in there lives as long as the thread (csrc/cpu/scratch.h). Other C libraries have
    no mallopt and are left alone.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes; fixes it where it else adapts
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
