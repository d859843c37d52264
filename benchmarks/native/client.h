/* One HTTP client's connection to a server on this machine. */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 512, MOST_REQUEST_BYTES = 8192 };

static inline void write_request(char *request, const char *path, const char *body) {
    int size = snprintf(request, MOST_REQUEST_BYTES,
        "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: %zu\r\n\r\n%s", path, strlen(body), body);
    if (size >= MOST_REQUEST_BYTES) {
        errno = EMSGSIZE;
        fail("request");
    }
}

/* Connect, and have *epoll* say what arrives, with *data*. */
static inline int open_connection(int port, int epoll, void *data) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int connection = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address))
        fail("connect");
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = data};
    epoll_ctl(epoll, EPOLL_CTL_ADD, connection, &event);
    return connection;
}

static inline void send_request(int connection, const char *request) {
    ssize_t size = strlen(request);
    if (send(connection, request, size, MSG_NOSIGNAL) != size)
        fail("send");
}
