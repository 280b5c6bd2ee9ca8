/* The door of a node as a program of its own, for sanitizers: `door PREFIX MAIN` listens on a free port of the loopback, says which, and ends with its
 * input. Then it says how many connections were made, handed over, turned away and left open. Status 5: it has other descriptors than before. */
#include "_door_core.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

static zd_door door = {.greeting_ms = 200};

static void *until_input_ends(void *unused) {
    char byte;
    while (read(0, &byte, 1) > 0) {}
    eventfd_write(door.stop, 1);
    return unused;
}

static int descriptors(void) {
    int found = 0;
    DIR *all = opendir("/proc/self/fd");
    while (readdir(all)) found++;
    closedir(all);
    return found;
}

int main(int count, char **words) {
    if (count != 3) return 2;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    snprintf(door.prefix, sizeof door.prefix, "%s", words[1]);
    snprintf(door.main, sizeof door.main, "%s", words[2]);
    door.listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    door.stop = eventfd(0, 0);
    if (bind(door.listener, (struct sockaddr *)&address, size) || listen(door.listener, 64)
        || getsockname(door.listener, (struct sockaddr *)&address, &size)) return 3;
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, until_input_ends, NULL);
    int before = descriptors(), error = zd_serve(&door);
    pthread_join(thread, NULL);
    printf("%llu %llu %llu %llu\n", (unsigned long long)door.accepted, (unsigned long long)door.handed_over,
        (unsigned long long)door.turned_away, (unsigned long long)door.open);
    if (descriptors() != before) return 5;
    return error ? 4 : 0;
}
