/* The door of a node: one TCP port through which other machines reach several of its processes.
 *
 * Every connection to the port is joined to a Unix socket in the node's runtime directory, and bytes are carried both ways as they come. Which
 * socket is the caller's choice, made by the length of his routing id: with it libzmq begins all that it sends (the first ten bytes are %xFF, eight
 * of "padding", %x7F, https://rfc.zeromq.org/spec/23; in libzmq the padding is that length plus one). Ids of ZD_FIRST bytes and more ask for the
 * socket of that number; with any other, and with bytes that are no such greeting, one is taken to the broker's. (A SOCKS proxy would be the
 * ordinary way. libzmq 4.3.5 can ask one, but aborts the process when the proxy's port refuses.) Who may say what is not decided here: behind each
 * of these sockets CURVE asks for a key, and the door neither has one nor reads what it carries.
 *
 * Covers one thread that does nothing else. Does not cover what listens behind the door (zray/peer_transport.py).
 */
#ifndef ZRAY_DOOR_CORE_H
#define ZRAY_DOOR_CORE_H

#include <stdint.h>

enum { ZD_FIRST = 32, ZD_LAST = 255, ZD_PATH_MAX = 108 };

typedef struct zd_door {
    int listener;             /* a TCP socket that listens, not blocking */
    int stop;                 /* an eventfd: readable when the thread is to end */
    int greeting_ms;          /* who has not greeted by then is sent away */
    char prefix[ZD_PATH_MAX]; /* path of the Unix sockets that can be asked for, up to their numbers */
    char main[ZD_PATH_MAX];   /* path of the one that the others go to */
    /* Counts, for whoever looks from another thread. */
    uint64_t accepted;
    uint64_t turned_away; /* silence, and numbers that nobody has */
    uint64_t open;
} zd_door;

/* Two sockets listen on one port (SO_REUSEPORT): have the kernel give connections from even source ports to the one that listened first, those from odd
 * ones to the other. Linux draws even ports for `connect` and odd ones for `bind` to port 0, as long as there are any (net/ipv4/inet_connection_sock.c).
 * `family`: of both. Returns 0 or an errno. */
int zd_steer(int listener, int family);
/* Serve until `stop` is readable, then close all connections (not the listener). Returns 0, or an errno when there is no epoll to be had. */
int zd_serve(zd_door *door);

#endif
