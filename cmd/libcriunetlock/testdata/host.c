// A program that the library is loaded into: it looks whether it can tell, and misuses
// it. With -DLINKED it is linked with the library, otherwise it loads it.
//
//	host quiet PID		signals and threads, with handlers of its own
//	host die NUMBER PID	uses it, and dies by a signal
//	host hold PID		locks, says so, and unlocks when its input ends
//	host leave PID		locks and closes as if CRIU had failed
//	host misuse PID		errors
//	host threads PID PID	two checkpoints at once
//	host fork PID		a child without an exec

#define _GNU_SOURCE
#define CRIU_NETLOCK_BUILD // without libcriu
#include "criu_netlock.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef LINKED
#define load()
#else
static int (*p_init)(const criu_netlock_opts *);
static int (*p_notify)(char *, criu_notify_arg_t);
static int (*p_notify_pid)(const char *, int);
static int (*p_close)(int);
static const char *(*p_error)(void);
#define criu_netlock_init p_init
#define criu_netlock_notify p_notify
#define criu_netlock_notify_pid p_notify_pid
#define criu_netlock_close p_close
#define criu_netlock_error p_error
#endif

#define CHECK(what)                                                                                       \
	do {                                                                                              \
		if (!(what)) {                                                                            \
			fprintf(stderr, "line %d: " #what ": %s\n", __LINE__, criu_netlock_error());      \
			exit(1);                                                                          \
		}                                                                                         \
	} while (0)

#ifndef LINKED
static void load(void)
{
	void *lib = dlopen("libcriunetlock.so", RTLD_NOW);

	if (lib == NULL) {
		fprintf(stderr, "%s\n", dlerror());
		exit(1);
	}
	p_init = dlsym(lib, "criu_netlock_init");
	p_notify = dlsym(lib, "criu_netlock_notify");
	p_notify_pid = dlsym(lib, "criu_netlock_notify_pid");
	p_close = dlsym(lib, "criu_netlock_close");
	p_error = dlsym(lib, "criu_netlock_error");
}
#endif

static criu_netlock_opts dump_of(int pid)
{
	return (criu_netlock_opts){ .size = sizeof(criu_netlock_opts), .verb = CRIU_NETLOCK_DUMP, .pid = pid, .leave_running = 1, .guard = "none" };
}

static void cycle(int pid)
{
	criu_netlock_opts o = dump_of(pid);

	CHECK(criu_netlock_init(&o) == 0);
	CHECK(criu_netlock_notify_pid("pre-dump", 0) == 0);
	CHECK(criu_netlock_notify("network-lock", NULL) == 0);
	CHECK(criu_netlock_notify_pid("network-unlock", 0) == 0);
	CHECK(criu_netlock_close(0) == 0);
}

static volatile sig_atomic_t handled;
static volatile int handler_thread;

static void handler(int sig)
{
	handled = sig;
	handler_thread = gettid();
}

static const int mine[] = { SIGTERM, SIGINT, SIGCHLD, SIGPIPE, SIGSEGV, SIGBUS, SIGFPE, SIGURG, SIGALRM, SIGUSR1, SIGHUP, SIGPROF };
#define MINE (sizeof(mine) / sizeof(mine[0]))

static void handle(int sig)
{
	struct sigaction sa = { .sa_handler = handler }; // no SA_ONSTACK

	CHECK(sigaction(sig, &sa, NULL) == 0);
}

struct state {
	struct sigaction actions[NSIG];
	sigset_t mask;
	stack_t stack;
};

static void look(struct state *s)
{
	memset(s, 0, sizeof(*s));
	for (int sig = 1; sig < NSIG; sig++)
		if (sigaction(sig, NULL, &s->actions[sig]) == 0)
			s->actions[sig].sa_flags &= ~0x04000000; // SA_RESTORER, which is the C library's own
	pthread_sigmask(SIG_SETMASK, NULL, &s->mask);
	sigaltstack(NULL, &s->stack);
}

static void same(const struct state *was)
{
	struct state is;

	look(&is);
	for (int sig = 1; sig < NSIG; sig++) {
		const struct sigaction *a = &was->actions[sig], *b = &is.actions[sig];
		if (a->sa_handler != b->sa_handler || a->sa_flags != b->sa_flags) {
			fprintf(stderr, "signal %d: handler %p flags %x, now %p flags %x\n", sig, (void *)a->sa_handler, a->sa_flags,
				(void *)b->sa_handler, b->sa_flags);
			exit(1);
		}
		CHECK(sigismember(&was->mask, sig) == sigismember(&is.mask, sig));
	}
	CHECK(was->stack.ss_flags == is.stack.ss_flags && was->stack.ss_sp == is.stack.ss_sp);
}

// Every thread of the library's blocks whatever can be sent to the process.
static void threads_block(void)
{
	const int all[] = { SIGTERM, SIGINT, SIGCHLD, SIGPIPE, SIGURG, SIGALRM, SIGUSR1, SIGHUP, SIGPROF, SIGSEGV, SIGRTMIN };
	DIR *d = opendir("/proc/self/task");
	struct dirent *e;
	int threads = 0;

	CHECK(d != NULL);
	while ((e = readdir(d)) != NULL) {
		char name[300], text[256];
		unsigned long long blocked = 0;
		FILE *f;

		if (e->d_name[0] == '.' || atoi(e->d_name) == getpid())
			continue;
		snprintf(name, sizeof(name), "/proc/self/task/%s/status", e->d_name);
		if ((f = fopen(name, "r")) == NULL)
			continue; // it has ended
		while (fgets(text, sizeof(text), f) != NULL)
			sscanf(text, "SigBlk: %llx", &blocked);
		fclose(f);
		threads++;
		for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
			if (!(blocked >> (all[i] - 1) & 1)) {
				fprintf(stderr, "thread %s takes signal %d\n", e->d_name, all[i]);
				exit(1);
			}
	}
	closedir(d);
	CHECK(threads > 0);
}

static int quiet(int pid)
{
	struct state was;

#ifndef LINKED
	for (size_t i = 0; i < MINE; i++)
		handle(mine[i]);
	signal(SIGUSR2, SIG_IGN);
#endif
	look(&was);
	load();
#ifdef LINKED
	for (int sig = 1; sig < NSIG; sig++) // a new program's are the defaults
		if (was.actions[sig].sa_handler != SIG_DFL || was.actions[sig].sa_flags != 0) {
			fprintf(stderr, "signal %d: handler %p flags %x\n", sig, (void *)was.actions[sig].sa_handler, was.actions[sig].sa_flags);
			exit(1);
		}
	for (int sig = 1; sig < NSIG; sig++)
		CHECK(sigismember(&was.mask, sig) != 1);
#endif
	same(&was);
#ifdef LINKED
	for (size_t i = 0; i < MINE; i++)
		handle(mine[i]);
	look(&was);
#endif
	for (int i = 0; i < 20; i++)
		cycle(pid);
	same(&was);
	CHECK(handled == 0);
	threads_block();
	for (size_t i = 0; i < MINE; i++) {
		handled = handler_thread = 0;
		CHECK(kill(getpid(), mine[i]) == 0);
		CHECK(handled == mine[i] && handler_thread == getpid());
	}
	return 0;
}

static int die(int sig, int pid)
{
	int p[2];

	load();
	cycle(pid);
	switch (sig) {
	case SIGSEGV:
		*(volatile int *)0 = 1;
		break;
	case SIGPIPE:
		if (pipe(p) == 0 && close(p[0]) == 0 && write(p[1], "x", 1) < 0)
			perror("write");
		break;
	default:
		kill(getpid(), sig);
	}
	fprintf(stderr, "signal %d did not end it\n", sig);
	return 1;
}

static int hold(int pid, int ret)
{
	criu_netlock_opts o = dump_of(pid);

	load();
	CHECK(criu_netlock_init(&o) == 0);
	CHECK(criu_netlock_notify_pid("network-lock", 0) == 0);
	if (ret == 0) {
		printf("locked\n");
		fflush(stdout);
		getchar();
		CHECK(criu_netlock_notify_pid("network-unlock", 0) == 0);
	}
	CHECK(criu_netlock_close(ret) == ret);
	return 0;
}

static int misuse(int pid)
{
	criu_netlock_opts o = dump_of(pid), bad;
	char image_of_criu = 0;

	load();
	CHECK(criu_netlock_error()[0] == '\0');
	CHECK(criu_netlock_notify_pid("network-lock", 0) == -2 && strstr(criu_netlock_error(), "no criu_netlock_init"));
	CHECK(criu_netlock_close(-52) == -52);
	CHECK(criu_netlock_close(0) == -2);
	CHECK(criu_netlock_init(NULL) == -2);
	bad = o, bad.size--;
	CHECK(criu_netlock_init(&bad) == -2);
	bad = o, bad.verb = 0;
	CHECK(criu_netlock_init(&bad) == -2);
	bad = o, bad.pid = getpid();
	CHECK(criu_netlock_init(&bad) == -2);
	bad = o, bad.pid = 0;
	CHECK(criu_netlock_init(&bad) == -2);
	bad = o, bad.config = "/dev/null/nothing";
	CHECK(criu_netlock_init(&bad) == -2 && strstr(criu_netlock_error(), "/dev/null/nothing"));

	CHECK(criu_netlock_init(&o) == 0);
	CHECK(criu_netlock_error()[0] == '\0');
	CHECK(criu_netlock_init(&o) == -2 && strstr(criu_netlock_error(), "not closed"));
	CHECK(criu_netlock_notify_pid("", 0) == -2);
	CHECK(criu_netlock_notify_pid(NULL, 0) == -2);
	CHECK(criu_netlock_notify_pid("network-lock", -1) == -2);
	CHECK(criu_netlock_notify_pid("network-lock", 1) == -2); // another one than opts.pid
	// Without libcriu there is nothing to ask for the pid.
	CHECK(criu_netlock_notify("network-lock", (criu_notify_arg_t)&image_of_criu) == -2 && strstr(criu_netlock_error(), "criu_notify_pid"));
	CHECK(criu_netlock_notify_pid("no-such-action", 0) == 0);
	CHECK(criu_netlock_close(0) == 0);

	// A task in our own namespace: there is nothing to lock, and CRIU does not ask for it.
	bad = o, bad.pid = getppid();
	CHECK(criu_netlock_init(&bad) == 0);
	CHECK(criu_netlock_notify_pid("network-lock", 0) == -4);
	CHECK(strchr(criu_netlock_error(), '\n') == NULL && criu_netlock_error()[0] != '\0');
	CHECK(criu_netlock_close(-52) == -52);
	cycle(pid);
	return 0;
}

static pthread_barrier_t both;

static void *other(void *arg)
{
	int pid = *(int *)arg;
	criu_netlock_opts o = dump_of(pid);

	CHECK(criu_netlock_notify_pid("network-lock", 0) == -2); // the other thread's is not ours
	pthread_barrier_wait(&both);
	for (int i = 0; i < 20; i++) {
		CHECK(criu_netlock_init(&o) == 0);
		CHECK(criu_netlock_notify_pid("network-lock", 0) == 0);
		pthread_barrier_wait(&both);
		CHECK(criu_netlock_notify_pid("network-unlock", 0) == 0);
		CHECK(criu_netlock_close(0) == 0);
	}
	return NULL;
}

static int threads(int pid1, int pid2)
{
	pthread_t a, b;

	load();
	pthread_barrier_init(&both, NULL, 2);
	CHECK(pthread_create(&a, NULL, other, &pid1) == 0);
	CHECK(pthread_create(&b, NULL, other, &pid2) == 0);
	CHECK(pthread_join(a, NULL) == 0 && pthread_join(b, NULL) == 0);
	return 0;
}

static int forked(int pid)
{
	criu_netlock_opts o = dump_of(pid);
	int status;
	pid_t child;

	load();
	cycle(pid);
	child = fork();
	if (child == 0) {
		CHECK(criu_netlock_init(&o) == -2 && strstr(criu_netlock_error(), "forked"));
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	cycle(pid);
	return 0;
}

int main(int argc, char **argv)
{
	int n[2] = { argc > 2 ? atoi(argv[2]) : 0, argc > 3 ? atoi(argv[3]) : 0 };

	if (argc < 3)
		return 2;
	if (strcmp(argv[1], "quiet") == 0)
		return quiet(n[0]);
	if (strcmp(argv[1], "die") == 0)
		return die(n[0], n[1]);
	if (strcmp(argv[1], "hold") == 0)
		return hold(n[0], 0);
	if (strcmp(argv[1], "leave") == 0)
		return hold(n[0], -52);
	if (strcmp(argv[1], "misuse") == 0)
		return misuse(n[0]);
	if (strcmp(argv[1], "threads") == 0)
		return threads(n[0], n[1]);
	if (strcmp(argv[1], "fork") == 0)
		return forked(n[0]);
	return 2;
}
