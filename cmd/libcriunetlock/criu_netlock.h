/*
 * criu_netlock.h: criu-netlock's network lock for a program that drives CRIU through
 * libcriu, by the callback of criu_set_notify_cb. docs/libcriu.md has a whole program.
 *
 *	criu_netlock_opts o = { .size = sizeof(o), .verb = CRIU_NETLOCK_DUMP, .pid = pid };
 *
 *	criu_set_notify_cb(criu_netlock_notify);
 *	if (criu_netlock_init(&o) == 0)
 *		ret = criu_netlock_close(criu_dump());
 *
 * Link with -lcriunetlock -lcriu. The program needs the privileges of criu-netlock, and
 * CRIU's pids have to be its own: one pid namespace.
 *
 * Threads. libcriu calls the callback in the thread that called criu_dump or
 * criu_restore, and a checkpoint belongs to that thread: init, criu_dump or criu_restore
 * and close run in one thread. Several threads can each have a checkpoint (criu_local_*),
 * one at a time; not of containers that share a network namespace.
 *
 * Processes. The library has threads of its own from the moment that it is loaded, and
 * these do not come along in a fork(). A daemon must fork first and load the library
 * (dlopen) then; a child that goes on without an exec can not use it, and is told so. To
 * start the guard, and where iptables locks, the library starts children and waits for
 * them by their pids: the program sees a SIGCHLD, and should wait for its own by pid too.
 *
 * Signals. The library leaves every signal's disposition as it found it, takes none in
 * its threads, and sends none to the program. It does not read the standard streams, and
 * writes to none. Once loaded it cannot be unloaded: dlclose does nothing.
 *
 * Return values. 0, or a negative number: what went wrong, as the exit code of
 * criu-netlock with a minus (-2 bad input, -3 no such task, -4 refused namespace, -5
 * missing privilege, -6 no usable backend, -7 owned by others, -8 deadline, -9 unlocked
 * but tampered with, -1 anything else). criu_netlock_error() has it in words.
 */
#ifndef CRIU_NETLOCK_H
#define CRIU_NETLOCK_H

#include <stddef.h>

#ifndef CRIU_NETLOCK_BUILD
#include <criu/criu.h>
#else
typedef void *criu_notify_arg_t; /* the library itself is built without libcriu */
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum criu_netlock_verb {
	CRIU_NETLOCK_DUMP = 1,
	CRIU_NETLOCK_RESTORE = 2,
};

/* What is not set is 0. */
typedef struct criu_netlock_opts {
	size_t size; /* sizeof(criu_netlock_opts) */
	enum criu_netlock_verb verb;
	int pid;	   /* dump: the root task, as for criu_set_pid; a process cannot lock itself */
	int leave_running; /* dump: as for criu_set_leave_running */
	int log_fd;	   /* >2: a line for each notification that did something is written there */
	/* The configuration file; NULL: $CRIU_NETLOCK_CONFIG, or /etc/criu/netlock.toml. */
	const char *config;
	/* The program criu-netlock; NULL: the one in PATH, or /usr/local/sbin; "none": no guard. */
	const char *guard;
	/*
	 * dump: CRIU leaves the network namespace's rules out of the image, because the namespace
	 * is an external one (criu_add_external("net[...]...")) or to be empty in the restore
	 * (criu_set_empty_ns(CLONE_NEWNET)). Mode hold wants to know: without it, and on a kernel
	 * without nft_queue, a dump drops, and the line in the log says so (not_held).
	 */
	int rules_not_dumped;
} criu_netlock_opts;

/*
 * criu_netlock_init begins a checkpoint in this thread. It is called before criu_dump or
 * criu_restore, reads the configuration and locks nothing yet. It fails while the thread's
 * last checkpoint is not closed.
 *
 * At pre-dump, and with the first lock of a restore, the program criu-netlock is started
 * as the checkpoint's guard: should the program be killed, it unlocks the tasks that live
 * on. Without the program, or with guard = false in the configuration, nobody does, and
 * the line in the log says so.
 */
int criu_netlock_init(const criu_netlock_opts *opts);

/*
 * criu_netlock_notify is the callback for criu_set_notify_cb. It locks, checks and unlocks
 * as CRIU's action scripts do; any other notification it answers with 0. An unlock
 * that fails it does not return, since libcriu would break off for it: close tries again.
 *
 * A program with a callback of its own calls this one from there: at network-unlock and
 * post-resume before its own work, at setup-namespaces before and after it, elsewhere
 * after it; and returns non-zero if either fails, but for network-unlock and post-resume.
 */
int criu_netlock_notify(char *action, criu_notify_arg_t na);

/*
 * criu_netlock_notify_pid is the same for a program that has loaded libcriu with dlopen
 * and RTLD_LOCAL: pid is what criu_notify_pid returns, or 0.
 */
int criu_netlock_notify_pid(const char *action, int pid);

/*
 * criu_netlock_close ends the checkpoint of this thread. It must be called, with what
 * criu_dump or criu_restore has returned, after it has: CRIU can unlock nothing once a
 * callback has failed or CRIU is gone. If the tasks live on and are still locked, it
 * unlocks them; tasks that were dumped and are dead stay locked for the restore. It
 * returns ret if that says failure (is negative); if nothing went wrong here either, it
 * returns ret too; and its own negative number otherwise.
 */
int criu_netlock_close(int ret);

/*
 * criu_netlock_error says on one line what went wrong in the last call of this thread
 * that failed. It belongs to the library and is good until the next call; never NULL.
 */
const char *criu_netlock_error(void);

#ifdef __cplusplus
}
#endif

#endif
