/* Preloaded into a process, moves its wall clock by as many seconds as a file says (a double, mapped, so that a jump is seen at once).
 * Monotonic clocks are left alone, as they are by a change of the machine's time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile double *shift;

__attribute__((constructor)) static void find(void)
{
    const char *path = getenv("ZRAY_TEST_WALL_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *at = mmap(NULL, sizeof *shift, PROT_READ, MAP_SHARED, fd, 0);
        shift = at == MAP_FAILED ? NULL : at;
        close(fd);
    }
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (!code && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += (time_t)floor(*shift);
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    (void)zone;
    struct timespec spec;
    int code = clock_gettime(CLOCK_REALTIME, &spec);
    now->tv_sec = spec.tv_sec;
    now->tv_usec = spec.tv_nsec / 1000;
    return code;
}

time_t time(time_t *at)
{
    struct timespec spec;
    clock_gettime(CLOCK_REALTIME, &spec);
    if (at)
        *at = spec.tv_sec;
    return spec.tv_sec;
}
