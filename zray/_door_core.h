/* The door of a node: one TCP port through which other machines reach several of its processes.
 *
 * A connection begins with what its caller wants. A stream's preface (ZD_MAGIC, then the number of a process in two bytes, little-endian:
 * zray/sealed_stream.py) has the connection itself handed over to that process, which waits at a datagram socket of the node's runtime directory
 * (SCM_RIGHTS, unix(7)): from then on nothing is between the two. All else is ZeroMQ between brokers, which came here rather than to the socket that
 * listens for it: it is joined to the broker's Unix socket, and bytes are carried both ways as they come, because a library cannot be handed a
 * connection. Who may say what is not decided here: behind each of these sockets somebody asks for a key, and the door has none.
 *
 * Covers one thread that does nothing else. Does not cover what listens behind the door (zray/peer_transport.py, zray/sealed_stream.py).
 */
#ifndef ZRAY_DOOR_CORE_H
#define ZRAY_DOOR_CORE_H

#include <stdint.h>

#define ZD_MAGIC "zray/1"
enum { ZD_PATH_MAX = 108 };

typedef struct zd_door {
    int listener;             /* a TCP socket that listens, not blocking */
    int stop;                 /* an eventfd: readable when the thread is to end */
    int greeting_ms;          /* who has not greeted by then is sent away */
    char prefix[ZD_PATH_MAX]; /* path of the datagram sockets of processes, up to their numbers */
    char main[ZD_PATH_MAX];   /* path of the broker's, which all else goes to */
    /* Counts, for whoever looks from another thread. */
    uint64_t accepted;
    uint64_t handed_over;
    uint64_t turned_away; /* silence, and numbers that nobody has */
    uint64_t open;
} zd_door;

/* Two sockets listen on one port (SO_REUSEPORT): have the kernel give connections from odd source ports to the one that listened first, those from even
 * ones to the other. Linux draws even ports for `connect` and odd ones for `bind` to port 0, as long as there are any (net/ipv4/inet_connection_sock.c).
 * `family`: of both. Returns 0 or an errno. */
int zd_steer(int listener, int family);
/* Serve until `stop` is readable, then close all connections (not the listener). Returns 0, or an errno when there is no epoll to be had. */
int zd_serve(zd_door *door);

#endif
