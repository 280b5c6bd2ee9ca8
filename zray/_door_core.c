/* The door of a node. See _door_core.h.
 *
 * Sockets are watched edge-triggered, for reading and writing at once: a pipe is pumped whenever either of its ends has news, until reading or
 * writing would block. A pipe that never blocks is put aside after so many bytes (`busy`), so that bulk does not keep others waiting. Nothing is
 * allocated for a pipe before it has bytes that its receiver does not take at once.
 */
#define _GNU_SOURCE
#include "_door_core.h"

#include <errno.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    BUFFER = 256 << 10,      /* bytes in one piece */
    TURN = 1 << 20,          /* bytes after which others have their turn */
    EVENTS = 64,             /* taken at a time */
    ACCEPT_PAUSE_MS = 100,   /* without descriptors nobody is let in for so long */
    KEEPALIVE_IDLE_S = 30,   /* a machine that has gone without a word is noticed */
    KEEPALIVE_PROBES = 4,
    KEEPALIVE_INTERVAL_S = 10,
    MAGIC_BYTES = sizeof ZD_MAGIC - 1,
    GREETING_BYTES = 10,
};
enum { GREETING, JOINED };

typedef struct pipe_half {
    int from, to;
    uint32_t start, length; /* what `bytes` has for `to` */
    uint8_t *bytes;         /* NULL while there is nothing */
    uint8_t ended;          /* `from` has nothing more */
    uint8_t told;           /* and `to` was told */
} pipe_half;

typedef struct joint {
    struct joint *older, *newer; /* all there are */
    struct joint *next_busy;
    pipe_half in, out;
    uint64_t since_ms;
    uint8_t state, busy, dead;
    uint8_t heard; /* bytes of the greeting */
    uint8_t greeting[GREETING_BYTES];
} joint;

typedef struct room {
    zd_door *door;
    int epoll;
    int messenger; /* sends connections to those who wait for them */
    joint *oldest, *newest;
    joint *busy;
    joint *dead; /* to be freed when no event of this round can name it any more; linked by next_busy */
    uint8_t *scratch;
    uint64_t now_ms, listen_again_ms;
    uint64_t greeting; /* joints that are not joined */
} room;

static uint64_t clock_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void count(uint64_t *what, int64_t by) { __atomic_fetch_add(what, (uint64_t)by, __ATOMIC_RELAXED); }

static void end(room *r, joint *j) {
    if (j->dead) return;
    j->dead = 1;
    if (j->state != JOINED) r->greeting--;
    close(j->in.from);
    if (j->out.from >= 0) close(j->out.from);
    free(j->in.bytes);
    free(j->out.bytes);
    *(j->older ? &j->older->newer : &r->oldest) = j->newer;
    *(j->newer ? &j->newer->older : &r->newest) = j->older;
    count(&r->door->open, -1);
    if (!j->busy) { /* else it is freed when it leaves that list */
        j->next_busy = r->dead;
        r->dead = j;
    }
}

static void turn_away(room *r, joint *j) {
    count(&r->door->turned_away, 1);
    end(r, j);
}

/* -- carrying bytes ---------------------------------------------------------------------------------------------------------------- */

/* Write what waits. Returns -1 when `to` is gone, else whether nothing waits any more. */
static int drain(pipe_half *p) {
    while (p->length) {
        ssize_t n = send(p->to, p->bytes + p->start, p->length, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) continue;
            return errno == EAGAIN ? 0 : -1;
        }
        p->start += (uint32_t)n;
        p->length -= (uint32_t)n;
    }
    free(p->bytes);
    p->bytes = NULL;
    return 1;
}

/* Keep what `to` has not taken. */
static int keep(pipe_half *p, const uint8_t *bytes, size_t size) {
    p->bytes = malloc(size);
    if (!p->bytes) return -1;
    memcpy(p->bytes, bytes, size);
    p->start = 0;
    p->length = (uint32_t)size;
    return 0;
}

/* Carry what there is, as far as it goes; `whole`: read until there is nothing, although a short read would say so. Returns -1 when the connection
 * is over, 1 when there is more than one turn's worth, else 0. */
static int pump(room *r, pipe_half *p, int whole) {
    size_t carried = 0;
    int drained = drain(p);
    if (drained <= 0) return drained;
    while (!p->ended) {
        if (carried >= TURN) return 1;
        ssize_t n = recv(p->from, r->scratch, BUFFER, 0);
        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN) return 0;
            return -1;
        }
        if (n == 0) {
            p->ended = 1;
            break;
        }
        carried += (size_t)n;
        ssize_t sent = send(p->to, r->scratch, (size_t)n, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN && errno != EINTR) return -1;
        if (sent < 0) sent = 0;
        if (sent < n) {
            if (keep(p, r->scratch + sent, (size_t)(n - sent))) return -1;
            drained = drain(p); /* room may have come since: then there is no further event for it */
            if (drained <= 0) return drained;
        } else if (n < BUFFER && !whole) {
            return 0; /* nothing was left, or an event will tell (epoll(7)) */
        }
    }
    if (!p->told) {
        p->told = 1;
        shutdown(p->to, SHUT_WR);
    }
    return 0;
}

static void carry(room *r, joint *j, uint32_t events) {
    int whole = (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    int in = pump(r, &j->in, whole), out = in < 0 ? -1 : pump(r, &j->out, whole);
    if (in < 0 || out < 0 || (j->in.told && j->out.told)) {
        end(r, j);
    } else if ((in > 0 || out > 0) && !j->busy) {
        j->busy = 1;
        j->next_busy = r->busy;
        r->busy = j;
    }
}

static void serve_busy(room *r) {
    joint *next, *list = r->busy;
    r->busy = NULL;
    for (joint *j = list; j; j = next) {
        next = j->next_busy;
        j->busy = 0;
        if (j->dead) {
            j->next_busy = r->dead;
            r->dead = j;
        } else {
            carry(r, j, EPOLLRDHUP);
        }
    }
}

/* -- who wants where --------------------------------------------------------------------------------------------------------------- */

/* Join a connection to the Unix socket at `path`; returns whether there is one. */
static int join(room *r, joint *j, const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    if (length >= sizeof to.sun_path) return 0;
    memcpy(to.sun_path, path, length);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return 0;
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) {
        close(fd);
        return 0;
    }
    j->in.to = j->out.from = fd;
    j->out.to = j->in.from;
    struct epoll_event want = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = j};
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, fd, &want)) return 0;
    j->state = JOINED;
    r->greeting--;
    return 1;
}

/* Give the connection itself to whoever waits at `path`, with the preface as far as it was read; it is over here then. Returns whether somebody does. */
static int hand_over(room *r, joint *j, const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    if (length >= sizeof to.sun_path) return 0;
    memcpy(to.sun_path, path, length);
    union { /* cmsg(3): aligned like a header */
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } rights;
    memset(&rights, 0, sizeof rights);
    struct iovec preface = {.iov_base = j->greeting, .iov_len = j->heard};
    struct msghdr message = {.msg_name = &to, .msg_namelen = sizeof to, .msg_iov = &preface, .msg_iovlen = 1, .msg_control = &rights,
        .msg_controllen = sizeof rights.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &j->in.from, sizeof(int));
    ssize_t n;
    do n = sendmsg(r->messenger, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n < 0) return 0;
    epoll_ctl(r->epoll, EPOLL_CTL_DEL, j->in.from, NULL); /* closing is not enough while another process has it */
    count(&r->door->handed_over, 1);
    end(r, j);
    return 1;
}

/* Take in what the caller wants, as far as it has come: 0 when more is to come or it was seen to, -1 when nobody is there for it. */
static int greet(room *r, joint *j) {
    while (j->heard < GREETING_BYTES) {
        ssize_t n = recv(j->in.from, j->greeting + j->heard, GREETING_BYTES - j->heard, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return 0;
        if (n <= 0) {
            if (n < 0 || !j->heard) return -1;
            break; /* the broker counts those, too */
        }
        j->heard += (uint8_t)n;
    }
    if (j->heard == GREETING_BYTES && !memcmp(j->greeting, ZD_MAGIC, MAGIC_BYTES)) {
        uint32_t number = j->greeting[MAGIC_BYTES] | (uint32_t)j->greeting[MAGIC_BYTES + 1] << 8;
        char path[sizeof r->door->prefix + 16];
        snprintf(path, sizeof path, "%s%u", r->door->prefix, number);
        return hand_over(r, j, path) ? 0 : -1;
    }
    if (keep(&j->in, j->greeting, j->heard)) return -1;
    return join(r, j, r->door->main) ? 0 : -1;
}

static void let_in(room *r) {
    for (;;) {
        int fd = accept4(r->door->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
                epoll_ctl(r->epoll, EPOLL_CTL_DEL, r->door->listener, NULL);
                r->listen_again_ms = r->now_ms + ACCEPT_PAUSE_MS;
            } else if (errno == EINTR || errno == ECONNABORTED) {
                continue;
            }
            return;
        }
        int one = 1, idle = KEEPALIVE_IDLE_S, probes = KEEPALIVE_PROBES, interval = KEEPALIVE_INTERVAL_S;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
        joint *j = calloc(1, sizeof *j);
        struct epoll_event want = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = j};
        if (!j || epoll_ctl(r->epoll, EPOLL_CTL_ADD, fd, &want)) {
            free(j);
            close(fd);
            continue;
        }
        j->in.from = fd;
        j->in.to = j->out.from = j->out.to = -1;
        j->since_ms = r->now_ms;
        j->older = r->newest;
        *(r->newest ? &r->newest->newer : &r->oldest) = j;
        r->newest = j;
        r->greeting++;
        count(&r->door->accepted, 1);
        count(&r->door->open, 1);
    }
}

/* -- the thread ------------------------------------------------------------------------------------------------------------------- */

static void look_at(room *r, joint *j, uint32_t events) {
    if (j->dead) return;
    if (j->state != JOINED) {
        if (greet(r, j)) {
            turn_away(r, j);
            return;
        }
        if (j->dead || j->state != JOINED) return;
        events |= EPOLLRDHUP; /* what came behind the greeting has had its event */
    }
    carry(r, j, events);
}

static int timeout_ms(room *r) {
    uint64_t until = UINT64_MAX;
    if (r->busy) return 0;
    if (r->listen_again_ms) until = r->listen_again_ms;
    if (r->greeting) { /* rare, and there are few: the oldest that has not said what it wants */
        for (joint *j = r->oldest; j; j = j->newer) {
            if (j->state == JOINED) continue;
            uint64_t limit = j->since_ms + (uint64_t)r->door->greeting_ms;
            if (limit < until) until = limit;
            break;
        }
    }
    if (until == UINT64_MAX) return -1;
    return until <= r->now_ms ? 0 : (int)(until - r->now_ms);
}

static void serve_clock(room *r) {
    if (r->listen_again_ms && r->now_ms >= r->listen_again_ms) {
        struct epoll_event want = {.events = EPOLLIN, .data.ptr = NULL};
        r->listen_again_ms = 0;
        if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, r->door->listener, &want)) r->listen_again_ms = r->now_ms + ACCEPT_PAUSE_MS;
    }
    joint *newer;
    for (joint *j = r->greeting ? r->oldest : NULL; j; j = newer) {
        newer = j->newer;
        if (j->state == JOINED) continue;
        if (r->now_ms < j->since_ms + (uint64_t)r->door->greeting_ms) break;
        turn_away(r, j);
    }
}

int zd_steer(int listener, int family) {
    /* The source port is the first field of the TCP header, which follows upon that of IP (without options; should there be some, the choice is
     * another, and no harm is done). */
    const uint32_t at = (uint32_t)SKF_NET_OFF + (family == AF_INET6 ? 40 : 20);
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, at),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 1),
        BPF_STMT(BPF_ALU | BPF_XOR | BPF_K, 1), /* 0, the first of them, for odd ports */
        BPF_STMT(BPF_RET | BPF_A, 0),
    };
    struct sock_fprog program = {.len = sizeof code / sizeof code[0], .filter = code};
    return setsockopt(listener, SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof program) ? errno : 0;
}

int zd_serve(zd_door *door) {
    room r = {.door = door};
    struct epoll_event events[EVENTS], listen = {.events = EPOLLIN, .data.ptr = NULL}, stop = {.events = EPOLLIN, .data.ptr = &r};
    r.scratch = malloc(BUFFER);
    r.epoll = epoll_create1(EPOLL_CLOEXEC);
    r.messenger = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (!r.scratch || r.epoll < 0 || r.messenger < 0 || epoll_ctl(r.epoll, EPOLL_CTL_ADD, door->stop, &stop)
        || epoll_ctl(r.epoll, EPOLL_CTL_ADD, door->listener, &listen)) {
        int error = errno ? errno : ENOMEM;
        if (r.epoll >= 0) close(r.epoll);
        if (r.messenger >= 0) close(r.messenger);
        free(r.scratch);
        return error;
    }
    for (int running = 1; running;) {
        r.now_ms = clock_ms();
        int n = epoll_wait(r.epoll, events, EVENTS, timeout_ms(&r));
        r.now_ms = clock_ms();
        for (int i = 0; i < n; i++) {
            void *who = events[i].data.ptr;
            if (who == &r) running = 0;
            else if (!who) let_in(&r);
            else look_at(&r, who, events[i].events);
        }
        serve_busy(&r);
        serve_clock(&r);
        while (r.dead) {
            joint *gone = r.dead;
            r.dead = gone->next_busy;
            free(gone);
        }
    }
    while (r.oldest) {
        joint *j = r.oldest;
        if (j->state == JOINED) carry(&r, j, EPOLLRDHUP); /* what was said last */
        end(&r, j);
    }
    serve_busy(&r);
    while (r.dead) {
        joint *gone = r.dead;
        r.dead = gone->next_busy;
        free(gone);
    }
    close(r.epoll);
    close(r.messenger);
    free(r.scratch);
    return 0;
}
