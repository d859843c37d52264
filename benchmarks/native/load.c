/*
 * Many readers of slow streams: who gets every token, in order, and how late.
 *
 *     load PORT PATH BODY STREAMS WARM_UP_SECONDS SECONDS PID…
 *
 * Opens STREAMS connections, sends each the same request, and looks in the answers for
 * tokens "~step~nanoseconds~": consecutive steps, and when each was due, on the monotonic
 * clock. It prints a line once every stream has had one, another WARM_UP_SECONDS later, and
 * the last after it counted for SECONDS. Each is a JSON object. The processor time is that of
 * PID….
 */
#include "measure.h"
#include "client.h"
#include <stdbool.h>

enum { MOST_UNSTARTED = 500 }; /* Fewer than servers let wait to be accepted. */
static const double START_SECONDS = 60.0;
/*
 * It looks once a millisecond, rather than to wait for each token. Who waits is woken by each
 * send, at the sender's cost: as clients elsewhere are not, and only by servers that are slow
 * enough for it to be asleep again.
 */
static const struct timespec TICK = {0, 1000000};

enum field { OUTSIDE, STEP, TIME };

struct stream {
    int connection;
    enum field field;
    bool has_token;
    int64_t step, last_step, due, tokens;
};

static struct stream *streams;
static int stream_count, started_count, lost_count, epoll;
static int64_t gaps, malformed, bytes, reads;
static struct durations lateness;
static bool is_counting;

static void take_token(struct stream *stream, int64_t now) {
    if (!stream->has_token) {
        stream->has_token = true;
        started_count++;
    } else if (stream->step != stream->last_step + 1) {
        gaps++; /* Lost, twice, or out of order. */
    }
    stream->last_step = stream->step;
    if (is_counting) {
        stream->tokens++;
        add_duration(&lateness, now - stream->due);
    }
}

static void take(struct stream *stream, const char *data, ssize_t size) {
    int64_t now = now_nanoseconds();
    for (const char *end = data + size; data < end; data++) {
        if (stream->field == OUTSIDE) {
            data = memchr(data, '~', end - data);
            if (!data)
                return;
            stream->field = STEP;
            stream->step = stream->due = 0;
        } else if (*data == '~') {
            if (stream->field == TIME)
                take_token(stream, now);
            stream->field = stream->field == STEP ? TIME : OUTSIDE;
        } else if (*data < '0' || *data > '9') {
            malformed++;
            stream->field = OUTSIDE;
        } else {
            int64_t *number = stream->field == STEP ? &stream->step : &stream->due;
            *number = *number * 10 + (*data - '0');
        }
    }
}

static void receive(void) {
    static char data[1 << 18];
    struct epoll_event events[EVENTS];
    int ready = epoll_wait(epoll, events, EVENTS, 0);
    if (ready < EVENTS)
        nanosleep(&TICK, NULL);
    for (int each = 0; each < ready; each++) {
        struct stream *stream = events[each].data.ptr;
        ssize_t size = recv(stream->connection, data, sizeof data, MSG_DONTWAIT);
        if (size > 0) {
            bytes += size;
            reads++;
            take(stream, data, size);
        } else if (size == 0 || errno != EAGAIN) {
            lost_count++;
            close(stream->connection);
        }
    }
}

static void start_streams(int port, const char *request) {
    double until = now_seconds() + START_SECONDS;
    for (int opened = 0; started_count < stream_count && !lost_count && now_seconds() < until;) {
        for (; opened < stream_count && opened - started_count < MOST_UNSTARTED; opened++) {
            streams[opened].connection = open_connection(port, epoll, &streams[opened]);
            send_request(streams[opened].connection, request);
        }
        receive();
    }
}

static void receive_for(double seconds) {
    for (double until = now_seconds() + seconds; now_seconds() < until;)
        receive();
}

int main(int count, char **arguments) {
    if (count < 7)
        return fprintf(stderr, "usage: load PORT PATH BODY STREAMS WARM_UP SECONDS PID...\n"), 2;
    char request[MOST_REQUEST_BYTES], **pids = arguments + 7, *own[] = {"0"};
    int pid_count = count - 7;
    stream_count = atoi(arguments[4]);
    streams = calloc(stream_count, sizeof *streams);
    write_request(request, arguments[2], arguments[3]);
    epoll = epoll_create1(0);
    start_streams(atoi(arguments[1]), request);
    printf("{\"streams\": %d, \"started\": %d, \"lost\": %d}\n", stream_count, started_count,
        lost_count);
    fflush(stdout);
    if (started_count < stream_count || lost_count)
        return 0;
    receive_for(atof(arguments[5]));
    printf("{\"counting\": true}\n");
    fflush(stdout);

    int64_t used = processor_nanoseconds_of_all(pids, pid_count);
    int64_t own_used = processor_nanoseconds_of_all(own, 1);
    double begun = now_seconds();
    bytes = reads = 0;
    is_counting = true;
    receive_for(atof(arguments[6]));
    double seconds = now_seconds() - begun;
    used = processor_nanoseconds_of_all(pids, pid_count) - used;
    own_used = processor_nanoseconds_of_all(own, 1) - own_used;

    int64_t tokens = lateness.count, fewest = INT64_MAX;
    for (int each = 0; each < stream_count; each++)
        if (streams[each].tokens < fewest)
            fewest = streams[each].tokens;
    printf("{\"streams\": %d, \"started\": %d, \"lost\": %d, \"seconds\": %.3f, ", stream_count,
        started_count, lost_count, seconds);
    printf("\"tokens\": %lld, \"gaps\": %lld, \"malformed\": %lld, \"fewest_tokens\": %lld, ",
        (long long)tokens, (long long)gaps, (long long)malformed, (long long)fewest);
    printf("\"tokens_per_second\": %.0f, \"tokens_per_read\": %.2f, \"bytes\": %lld, ",
        tokens / seconds, reads ? (double)tokens / reads : 0.0, (long long)bytes);
    printf("\"microseconds_per_token\": %.3f, \"cpu_share\": %.3f, \"own_cpu_share\": %.3f, ",
        tokens ? used / 1e3 / tokens : 0.0, used / 1e9 / seconds, own_used / 1e9 / seconds);
    printf("\"p50_ms\": %.2f, \"p99_ms\": %.2f, \"worst_ms\": %.2f}\n", percentile(&lateness, 0.5),
        percentile(&lateness, 0.99), lateness.worst_seconds * 1e3);
    return 0;
}
