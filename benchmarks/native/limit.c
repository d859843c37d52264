/*
 * The least that a streaming server can cost: one epoll, one send a token.
 *
 *     limit PORT
 *
 * It answers every request with an endless stream of OpenAI chat chunks, chunk-encoded, 25 a
 * second. A token is "~step~nanoseconds~": when the step was due, on the monotonic clock.
 */
#include "measure.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { MOST_CONNECTIONS = 65536, EVENTS = 512, STEP_NANOSECONDS = 40000000, ID_BYTES = 24 };
/* Steps that it makes up for; the other servers' engine gives up the same. */
enum { MOST_LATE = 10 };

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";

static int streams[MOST_CONNECTIONS], place_of[MOST_CONNECTIONS];
static int stream_count;

static void leave(int connection) {
    int place = place_of[connection];
    if (place >= 0) {
        int last = streams[--stream_count];
        streams[place] = last;
        place_of[last] = place;
        place_of[connection] = -1;
    }
    close(connection);
}

static void read_request(int connection) {
    /* A request of the load comes in one piece; one that leaves reads as 0 bytes. */
    char request[4096];
    ssize_t size = recv(connection, request, sizeof request, 0);
    if (size <= 0) {
        if (size == 0 || errno != EAGAIN)
            leave(connection);
        return;
    }
    if (place_of[connection] < 0) {
        send(connection, HEAD, sizeof HEAD - 1, MSG_NOSIGNAL);
        place_of[connection] = stream_count;
        streams[stream_count++] = connection;
    }
}

static void step(long number, int64_t due) {
    char event[512], chunk[600], id[ID_BYTES + 1];
    int size = snprintf(event, sizeof event,
        "data: {\"id\":\"chatcmpl-012345678901234567890123\",\"object\":\"chat.completion.chunk\","
        "\"created\":1700000000,\"model\":\"steps\",\"system_fingerprint\":\"fp_flask_llmstream_0.1.0\","
        "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"~%ld~%lld~\"},\"logprobs\":null,"
        "\"finish_reason\":null}]}\n\n", number, (long long)due);
    size = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n", size, event);
    char *place_of_id = strstr(chunk, "chatcmpl-") + 9;
    for (int place = stream_count - 1; place >= 0; place--) {
        snprintf(id, sizeof id, "%024d", streams[place]); /* One for each stream. */
        memcpy(place_of_id, id, ID_BYTES);
        if (send(streams[place], chunk, size, MSG_NOSIGNAL) != size)
            leave(streams[place]); /* A reader this slow would need a buffer: not the limit. */
    }
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 2048))
        fail("listen");
    return listener;
}

static int start_timer(int64_t at) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec every = {{0, STEP_NANOSECONDS}, {at / 1000000000, at % 1000000000}};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &every, NULL))
        fail("timerfd_settime");
    return timer;
}

static void accept_all(int listener, int epoll) {
    int connection, on = 1;
    while ((connection = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event event = {.events = EPOLLIN, .data.fd = connection};
        epoll_ctl(epoll, EPOLL_CTL_ADD, connection, &event);
    }
}

int main(int count, char **arguments) {
    if (count != 2)
        return fprintf(stderr, "usage: limit PORT\n"), 2;
    int64_t due = now_nanoseconds() + STEP_NANOSECONDS;
    int listener = listen_on(atoi(arguments[1])), timer = start_timer(due);
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = timer;
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event);
    memset(place_of, -1, sizeof place_of);
    for (long number = 0;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int each = 0; each < ready; each++) {
            uint64_t expirations;
            if (events[each].data.fd == listener) {
                accept_all(listener, epoll);
            } else if (events[each].data.fd != timer) {
                read_request(events[each].data.fd);
            } else if (read(timer, &expirations, sizeof expirations) == sizeof expirations) {
                due += STEP_NANOSECONDS * (expirations - 1);
                for (uint64_t late = expirations < MOST_LATE ? expirations : MOST_LATE; late--;)
                    step(++number, due - late * STEP_NANOSECONDS);
                due += STEP_NANOSECONDS;
            }
        }
    }
}
