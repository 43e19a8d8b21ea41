//go:build clibrary

// The C side of the library: what Go's runtime would do to the program that loads it is
// undone, and the calls are handed over.

#define _GNU_SOURCE
#define CRIU_NETLOCK_BUILD
#include "criu_netlock.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "_cgo_export.h"

#define EXPORT __attribute__((visibility("default")))

// Go's runtime would install handlers when the library is loaded (SIGSEGV, SIGBUS, SIGFPE,
// SIGPIPE, SIGURG), set SA_ONSTACK on the program's own, and have its threads take
// SIGCHLD and others from the program: a handler of the program's would run on a goroutine's
// stack, and a SIGCHLD that the program has blocked for its signalfd would be lost. All
// of that stands in a table of the runtime's, which is emptied before it is read; and its
// threads start with the mask that they find. What Go does without: a nil dereference
// ends the process at once, a write to a broken pipe is EPIPE alone, SIGPIPE being
// blocked; and SIGURG, for preemption, is off by the flags of `make lib`.
extern struct {
	int32_t flags;
	const char *name;
	intptr_t len;
} sigtable[65] __asm__("runtime.sigtable");

static sigset_t mask;
static pid_t loader;

// Before Go's own, which has no priority.
__attribute__((constructor(101))) static void before_go(void)
{
	sigset_t all;

	loader = getpid();
	if (strncmp(sigtable[SIGCHLD].name, "SIGCHLD", 7) == 0) // a Go that has it otherwise fails the tests
		for (int s = 1; s < 65; s++)
			sigtable[s].flags = 0;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &mask);
}

// After Go's own: the linker keeps the order of the objects, and Go's is the first.
__attribute__((constructor)) static void after_go(void)
{
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
}

// What this thread's checkpoint is, and what went wrong.
static __thread uint64_t checkpoint;
static __thread char error[1024];

static int fail(int code, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(error, sizeof(error), format, args);
	va_end(args);
	return code;
}

struct call {
	int (*f)(struct call *);
	const criu_netlock_opts *opts;
	const char *text; // the action, or the configuration file
	int number;	  // the pid, or what CRIU returned
	uint64_t checkpoint;
	char error[sizeof(error)];
	int ret;
};

static void *run(void *arg)
{
	struct call *c = arg;

	c->ret = c->f(c);
	return NULL;
}

// in_thread makes a call in a thread of its own, so that the program's thread keeps its
// signal mask, its alternate stack and its place: Go would use all three.
static int in_thread(struct call *c)
{
	sigset_t all, old;
	pthread_t t;
	int err, state;

	if (getpid() != loader)
		return fail(-2, "criu-netlock: this process was forked after libcriunetlock was loaded: load it in the child");
	c->checkpoint = checkpoint;
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	err = pthread_create(&t, NULL, run, c);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (err == 0)
		pthread_join(t, NULL);
	pthread_setcancelstate(state, NULL);
	if (err != 0)
		return fail(-1, "criu-netlock: start a thread: %s", strerror(err));
	checkpoint = c->checkpoint;
	memcpy(error, c->error, sizeof(error));
	return c->ret;
}

static int init(struct call *c)
{
	const criu_netlock_opts *o = c->opts;

	return criuNetlockInit(o->verb == CRIU_NETLOCK_RESTORE, o->pid, o->leave_running, o->log_fd, o->rules_not_dumped,
			       (char *)c->text, (char *)o->guard, &c->checkpoint, c->error, sizeof(c->error));
}

static int notify(struct call *c)
{
	return criuNetlockNotify(c->checkpoint, (char *)c->text, c->number, c->error, sizeof(c->error));
}

static int end(struct call *c)
{
	uint64_t it = c->checkpoint;

	c->checkpoint = 0;
	return criuNetlockClose(it, c->number, c->error, sizeof(c->error));
}

EXPORT int criu_netlock_init(const criu_netlock_opts *o)
{
	struct call c = { .f = init, .opts = o };

	if (o == NULL || o->size != sizeof(*o))
		return fail(-2, "criu_netlock_init: opts.size is not sizeof(criu_netlock_opts) of this library");
	if (o->verb != CRIU_NETLOCK_DUMP && o->verb != CRIU_NETLOCK_RESTORE)
		return fail(-2, "criu_netlock_init: opts.verb is neither CRIU_NETLOCK_DUMP nor CRIU_NETLOCK_RESTORE");
	if (o->verb == CRIU_NETLOCK_DUMP && (o->pid <= 0 || o->pid == getpid()))
		return fail(-2, "criu_netlock_init: opts.pid is %d: a process cannot lock itself", o->pid);
	if (checkpoint != 0)
		return fail(-2, "criu_netlock_init: this thread has a checkpoint that was not closed");
	// Go's environment is that of the moment when the library was loaded.
	c.text = o->config;
	if (c.text == NULL)
		c.text = getenv("CRIU_NETLOCK_CONFIG");
	return in_thread(&c);
}

EXPORT int criu_netlock_notify_pid(const char *action, int pid)
{
	struct call c = { .f = notify, .text = action, .number = pid };

	if (action == NULL || action[0] == '\0' || pid < 0)
		return fail(-2, "criu_netlock_notify: not a notification of CRIU's");
	if (checkpoint == 0)
		return fail(-2, "%s: no criu_netlock_init in this thread", action);
	return in_thread(&c);
}

EXPORT int criu_netlock_notify(char *action, criu_notify_arg_t na)
{
	// libcriu is the program's.
	int (*pid_of)(criu_notify_arg_t) = (int (*)(criu_notify_arg_t))dlsym(RTLD_DEFAULT, "criu_notify_pid");

	if (na != NULL && pid_of == NULL)
		return fail(-2, "criu_netlock_notify: criu_notify_pid is not in the program's global scope: use criu_netlock_notify_pid");
	return criu_netlock_notify_pid(action, na == NULL ? 0 : pid_of(na));
}

EXPORT int criu_netlock_close(int ret)
{
	struct call c = { .f = end, .number = ret };

	if (checkpoint == 0)
		return ret < 0 ? ret : fail(-2, "criu_netlock_close: no criu_netlock_init in this thread");
	return in_thread(&c);
}

EXPORT const char *criu_netlock_error(void)
{
	return error;
}
