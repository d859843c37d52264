/*
 * Short answers over connections that are kept: how long each takes, and what it costs.
 *
 *     requests PORT PATH BODY CONNECTIONS WARM_UP_SECONDS SECONDS PID…
 *
 * Each connection sends the request, reads the answer to its end, and sends it again. Prints
 * one JSON object. An answer's first token is where its body's first "~" arrives. The
 * processor time is that of PID….
 */
#include "measure.h"
#include "client.h"
#include <stdbool.h>
#include <strings.h>

enum { MOST_ANSWER_BYTES = 1 << 16 };

struct exchange {
    int connection;
    int64_t begun;
    ssize_t received;
    bool has_token;
    char answer[MOST_ANSWER_BYTES];
};

static struct durations firsts, wholes;
static bool is_counting;

static void refuse(const char *what, const struct exchange *exchange) {
    fprintf(stderr, "requests: %s: %.200s\n", what, exchange->answer);
    exit(1);
}

static void begin(struct exchange *exchange, const char *request) {
    exchange->received = 0;
    exchange->has_token = false;
    exchange->begun = now_nanoseconds();
    send_request(exchange->connection, request);
}

/* Of a response with a declared length or in chunks: RFC 9112 6.3. */
static bool is_whole(const struct exchange *exchange, const char *body) {
    ssize_t size = exchange->answer + exchange->received - body;
    const char *length = strcasestr(exchange->answer, "\r\nContent-Length:");
    if (length && length < body)
        return size == atol(length + 17);
    return size >= 5 && !memcmp(body + size - 5, "0\r\n\r\n", 5);
}

static void receive(struct exchange *exchange, const char *request) {
    ssize_t room = MOST_ANSWER_BYTES - 1 - exchange->received;
    ssize_t size = recv(exchange->connection, exchange->answer + exchange->received, room, 0);
    int64_t now = now_nanoseconds();
    if (size <= 0)
        refuse("the connection ended", exchange);
    exchange->received += size;
    exchange->answer[exchange->received] = 0;
    const char *body = strstr(exchange->answer, "\r\n\r\n");
    if (!body)
        return;
    body += 4;
    if (strncmp(exchange->answer, "HTTP/1.1 200", 12))
        refuse("not what was asked for", exchange);
    if (!exchange->has_token && strchr(body, '~')) {
        exchange->has_token = true;
        if (is_counting)
            add_duration(&firsts, now - exchange->begun);
    }
    if (is_whole(exchange, body)) {
        if (!exchange->has_token)
            refuse("no token", exchange);
        if (is_counting)
            add_duration(&wholes, now - exchange->begun);
        begin(exchange, request);
    }
}

static void exchange_for(double seconds, int epoll, const char *request) {
    struct epoll_event events[EVENTS];
    for (double until = now_seconds() + seconds; now_seconds() < until;) {
        int ready = epoll_wait(epoll, events, EVENTS, 5);
        for (int each = 0; each < ready; each++)
            receive(events[each].data.ptr, request);
    }
}

int main(int count, char **arguments) {
    if (count < 7)
        return fprintf(stderr, "usage: requests PORT PATH BODY CONNECTIONS WARM_UP SECONDS PID...\n"), 2;
    char request[MOST_REQUEST_BYTES], **pids = arguments + 7;
    int port = atoi(arguments[1]), connections = atoi(arguments[4]), pid_count = count - 7;
    int epoll = epoll_create1(0);
    write_request(request, arguments[2], arguments[3]);
    for (int each = 0; each < connections; each++) {
        struct exchange *exchange = calloc(1, sizeof *exchange);
        exchange->connection = open_connection(port, epoll, exchange);
        begin(exchange, request);
    }
    exchange_for(atof(arguments[5]), epoll, request);
    int64_t used = processor_nanoseconds_of_all(pids, pid_count);
    double begun = now_seconds();
    is_counting = true;
    exchange_for(atof(arguments[6]), epoll, request);
    double seconds = now_seconds() - begun;
    used = processor_nanoseconds_of_all(pids, pid_count) - used;
    printf("{\"connections\": %d, \"seconds\": %.3f, \"requests\": %lld, ", connections, seconds,
        (long long)wholes.count);
    printf("\"requests_per_second\": %.0f, \"microseconds_per_request\": %.2f, ",
        wholes.count / seconds, wholes.count ? used / 1e3 / wholes.count : 0.0);
    printf("\"first_p50_ms\": %.3f, \"first_p99_ms\": %.3f, ", percentile(&firsts, 0.5),
        percentile(&firsts, 0.99));
    printf("\"p50_ms\": %.3f, \"p99_ms\": %.3f}\n", percentile(&wholes, 0.5),
        percentile(&wholes, 0.99));
    return 0;
}
